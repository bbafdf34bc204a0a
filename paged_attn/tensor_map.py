"""How TMA, the copy engine of Hopper, sees a pool of pages, and the results of prefill.

One operation copies a *box*: 16 or 8 neighbouring tokens of one page and one KV head, or 64 columns of them. It fills
shared memory in the order that the tensor cores read: for every 8 tokens, for every 64 columns, 8 lines of 128 bytes.
That order is also the order of a tensor's dimensions, so the pool is described as one of five:

    64 columns | 8 tokens | pieces of 64 of head_dim | groups of 8 tokens | everything else

Where head_dim is no multiple of 64 there is one piece, as wide as head_dim: a box takes 64 columns of it all the same,
and columns that do not exist become zeros. The last dimension counts in steps of ``unit`` bytes, the greatest that
every page, head and box starts at a multiple of; any strided pool, NHD or HND, is thus one tensor. The driver is
touched inside functions only.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

LEAST_BOX_TOKENS = 8  # pages of fewer, or of odd numbers, are nothing for TMA

# Larger boxes are slower (trial 12).
_MOST_BOX_TOKENS = 16
_GROUP = 8  # tokens of one swizzle pattern: 8 lines of 128 bytes
_COLUMNS = 64  # 16-bit numbers of a line
_WARP_ROWS = 16  # of a tile
_OUT_HEAD_DIM = 128  # whose results leave by TMA (trial 6)
_MOST_BOXES = 2**31

# Of cuda.h: CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion.
_FLOAT16, _BFLOAT16 = 6, 9
_SWIZZLE_128B = 3
_L2_PROMOTION_128B = 2
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


def box_tokens(page_size: int) -> int:
    """Tokens of a box, which divide the page size: a power of two. TMA needs 8 or more."""
    return gcd(page_size, _MOST_BOX_TOKENS)


@dataclass(frozen=True)
class PoolGeometry:
    """A pool as a tensor of five dimensions. Strides are in bytes and begin with the second dimension."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    page_step: int  # steps of the last dimension from a page, 8 tokens, a head to the next
    rows_step: int
    head_step: int

    @property
    def outside(self) -> int:
        """An index of the last dimension past the pool: TMA gives zeros."""
        return self.dims[-1]


@lru_cache(maxsize=256)
def pool_geometry(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, strides: tuple[int, int, int]
) -> PoolGeometry | None:
    """The tensor of a pool of 16-bit numbers with ``strides`` (page, token, head) in bytes, multiples of 16.

    None where TMA cannot read it: a page size that is no multiple of 8, no page, more boxes than an index can count.
    """
    tokens = box_tokens(page_size)
    if tokens < LEAST_BOX_TOKENS or num_pages == 0:
        return None
    page, token, head = strides
    # Strides of axes along which no box is counted may be anything.
    counted = {
        "page": page if num_pages > 1 else 0,
        "rows": token * _GROUP if page_size > tokens else 0,
        "head": head if num_kv_heads > 1 else 0,
    }
    unit = gcd(*counted.values()) or 16
    steps = {name: stride // unit for name, stride in counted.items()}
    last_rows = (page_size - tokens) // _GROUP
    boxes = 1 + (num_pages - 1) * steps["page"] + last_rows * steps["rows"] + (num_kv_heads - 1) * steps["head"]
    if boxes >= _MOST_BOXES:
        return None
    columns = head_dim if head_dim % _COLUMNS else _COLUMNS
    inner = (_GROUP, head_dim // columns, tokens // _GROUP)
    return PoolGeometry(
        dims=(columns, *inner, boxes),
        strides=(token, _COLUMNS * 2, token * _GROUP, unit),
        box=(_COLUMNS, *inner, 1),
        page_step=steps["page"],
        rows_step=steps["rows"],
        head_step=steps["head"],
    )


@lru_cache(maxsize=1024)
def pool_map(pointer: int, geometry: PoolGeometry, bfloat16: bool) -> dict[str, Any]:
    """The fields of the kernel's ``Pool`` for the pool at ``pointer``: its map, and how to count in it. Made once."""
    return {
        "map": {"words": _encode(pointer, geometry.dims, geometry.strides, geometry.box, bfloat16)},
        "page_step": geometry.page_step,
        "rows_step": geometry.rows_step,
        "head_step": geometry.head_step,
        "outside": geometry.outside,
    }


@dataclass(frozen=True)
class OutGeometry:
    """An array [rows, heads, head_dim] as a tensor of four dimensions: 64 columns | heads | rows | pieces of head_dim.

    A box is 16 rows of a tile of the kernel, which are (token, head of the group) pairs.
    """

    dims: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    box: tuple[int, int, int, int]


@lru_cache(maxsize=256)
def out_geometry(rows: int, heads: int, head_dim: int, group_size: int) -> OutGeometry | None:
    """The tensor of contiguous 16-bit results.

    None where it is smaller than a box, where 16 rows of a tile are not one box of it (groups that are neither 1, 2, 4
    or 8 nor multiples of 16), and for a head_dim that does not gain by it.
    """
    heads_of_box = gcd(group_size, _WARP_ROWS)
    rows_of_box = _WARP_ROWS // heads_of_box
    fits = group_size == heads_of_box or rows_of_box == 1
    if head_dim != _OUT_HEAD_DIM or not fits or rows < rows_of_box:
        return None
    pieces = head_dim // _COLUMNS
    return OutGeometry(
        dims=(_COLUMNS, heads, rows, pieces),
        strides=(head_dim * 2, heads * head_dim * 2, _COLUMNS * 2),
        box=(_COLUMNS, heads_of_box, rows_of_box, pieces),
    )


@lru_cache(maxsize=1024)
def out_map(pointer: int, geometry: OutGeometry, bfloat16: bool) -> tuple[int, ...]:
    """The 16 words of the map of results at ``pointer``, a multiple of 16."""
    return _encode(pointer, geometry.dims, geometry.strides, geometry.box, bfloat16)


def _encode(
    pointer: int, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], bfloat16: bool
) -> tuple[int, ...]:
    """A CUtensorMap, as the driver makes it; ``strides`` begin with the second dimension."""
    rank = len(dims)
    memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    address = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    error = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        _BFLOAT16 if bfloat16 else _FLOAT16,
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        0,  # no interleaving
        _SWIZZLE_128B,
        _L2_PROMOTION_128B,
        0,  # zeros outside
    )
    if error:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled gives error {error} for an array at {pointer:#x} with dims {dims}, "
            f"strides {strides} and box {box}"
        )
    return tuple((ctypes.c_uint64 * (_MAP_BYTES // 8)).from_address(address))
