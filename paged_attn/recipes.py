"""Recipes: which kernel serves a call on a card, and how it is compiled and launched.

Pure functions of a call's spec and a card: kernels' constants, threads and shared memory are known here alone. Plans,
`warm_up`, `doctor`, the compile matrix and the tests read them. Nothing here looks at sequence lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import compile, tensor_map
from .card import Card
from .compile import Recipe
from .interop import BFLOAT16, FLOAT32
from .spec import RUN_ARRAYS, AttentionSpec, RunArrays

if TYPE_CHECKING:
    from .holders import KVPages


@functools.cache
def struct_bytes(kernel: str, struct: str) -> int:
    """The size of a struct in the text of a kernel."""
    return compile.params_dtype(compile.load_source(kernel), struct).itemsize


def defines(**constants: int) -> tuple[tuple[str, int], ...]:
    """Constants in the form that a Recipe has them."""
    return tuple((name, int(value)) for name, value in sorted(constants.items()))


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def with_constants(recipe: AnyRecipe, names: Iterable[str]) -> AnyRecipe:
    """The recipe of an attention kernel, or of merge_states, for calls that have these (RunArrays.constants)."""
    return replace(recipe, constants=defines(**dict(recipe.constants) | dict.fromkeys(names, 1)))


# -- tables, and the metadata of a step ------------------------------------------------------------------------------

THREADS = 256
SCAN_THREADS = 1024  # the one block of kernels that scan over a batch
SCAN_BYTES = 256  # its shared memory (table_rows.cuh)

MOST_ROW_BLOCKS = 1024

PLAN_REQUESTS = Recipe(kernel="plan_requests", threads=SCAN_THREADS, shared_bytes=SCAN_BYTES)
PLAN_SPLITS = Recipe(kernel="plan_splits", threads=SCAN_THREADS, shared_bytes=258 * 4 + SCAN_BYTES + 4)
PLAN_TILES = Recipe(kernel="plan_tiles", threads=SCAN_THREADS, shared_bytes=256 * 4 + SCAN_BYTES)
SPLIT_ROWS = Recipe(kernel="split_rows", threads=SCAN_THREADS, shared_bytes=SCAN_BYTES)
BLOCK_TABLE_ROWS = Recipe(kernel="block_table_rows", threads=SCAN_THREADS, shared_bytes=SCAN_BYTES)
SEQ_LENS, SPLIT_PAGES, BLOCK_TABLE_PAGES, TO_BLOCK_TABLE, TABLE_SLOTS, CHECK_TABLE = (
    Recipe(kernel=name, threads=THREADS)
    for name in ("seq_lens", "split_pages", "block_table_pages", "to_block_table", "table_slots", "check_table")
)
UPDATE_PAGE_LISTS, BUILD_TABLE, COPY_PAGES = (
    Recipe(kernel=name, threads=THREADS) for name in ("update_page_lists", "build_table", "copy_pages")
)
TABLE_CHECKSUM, COMPARE_CHECKSUMS = (
    Recipe(kernel=name, threads=32) for name in ("table_checksum", "compare_checksums")
)
TABLES = (
    SEQ_LENS, SPLIT_ROWS, SPLIT_PAGES, BLOCK_TABLE_ROWS, BLOCK_TABLE_PAGES, TO_BLOCK_TABLE, TABLE_SLOTS, CHECK_TABLE,
    UPDATE_PAGE_LISTS, BUILD_TABLE, COPY_PAGES, TABLE_CHECKSUM, COMPARE_CHECKSUMS,
)  # fmt: skip


def row_blocks(rows: int, entries: int) -> int:
    """Blocks for the kernels that give every row the same number: some, where rows are few and long."""
    return rows * max(1, min(-(-entries // (rows * 8 * THREADS)), MOST_ROW_BLOCKS // rows))


# -- append and merge ------------------------------------------------------------------------------------------------

APPEND_THREADS = 256
MERGE_WARPS = 4
EXCHANGE_THREADS = 256  # a warp an item


@dataclass(frozen=True, kw_only=True)
class AppendRecipe(Recipe):
    """A block has threads (across a token's pieces of 16 bytes, tokens)."""

    tokens_per_block: int


@functools.lru_cache(maxsize=256)
def append_recipe(num_kv_heads: int, head_dim: int, v_head_dim: int) -> AppendRecipe:
    pieces = num_kv_heads * max(head_dim, v_head_dim) // 8
    across = min(APPEND_THREADS, _ceil_div(pieces, 32) * 32)
    tokens = max(1, APPEND_THREADS // across)
    constants = defines(HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim)
    return AppendRecipe(kernel="append", threads=(across, tokens), constants=constants, tokens_per_block=tokens)


@functools.lru_cache(maxsize=1024)
def merge_recipe(
    kernel: str,
    heads: int,
    head_dim: int,
    vector: int,
    v_dtype: np.dtype[Any],
    out_dtype: np.dtype[Any],
    sinks: bool = False,
) -> Recipe:
    """merge_state or merge_states, with loads and stores of `vector` numbers."""
    constants = _merge_constants(head_dim, vector, v_dtype, out_dtype, sinks)
    return Recipe(kernel=kernel, threads=32 * min(MERGE_WARPS, heads), constants=constants)


def exchange_recipe(head_dim: int, v_dtype: np.dtype[Any], out_dtype: np.dtype[Any]) -> Recipe:
    """The kernel that ranks exchange and merge their states by; 16 bytes of v at once."""
    constants = _merge_constants(head_dim, 16 // v_dtype.itemsize, v_dtype, out_dtype, sinks=True)
    return Recipe(kernel="exchange", threads=EXCHANGE_THREADS, constants=constants)


def _merge_constants(
    head_dim: int, vector: int, v_dtype: np.dtype[Any], out_dtype: np.dtype[Any], sinks: bool
) -> tuple[tuple[str, int], ...]:
    return defines(
        HEAD_DIM=head_dim,
        VEC=vector,
        BFLOAT16=BFLOAT16 in (v_dtype, out_dtype),
        V_FLOAT32=v_dtype == FLOAT32,
        OUT_FLOAT32=out_dtype == FLOAT32,
        SINKS=sinks,
    )


def merge_recipes(heads: int, head_dim: int, dtype: np.dtype[Any]) -> Iterator[Recipe]:
    """All that merging contiguous states of `dtype`, or in float32, can need, here or of ranks; sinks apart."""
    for v_dtype in (dtype, FLOAT32):
        for out_dtype in (dtype, FLOAT32):
            vector = np.gcd(head_dim * v_dtype.itemsize, 16) // v_dtype.itemsize
            for kernel in ("merge_state", "merge_states"):
                yield merge_recipe(kernel, heads, head_dim, int(vector), v_dtype, out_dtype)
            if head_dim % 8 == 0:
                yield exchange_recipe(head_dim, v_dtype, out_dtype)


# -- decode ----------------------------------------------------------------------------------------------------------

# Warps of a CTA; and, where CTAs fill all SMs even so, of one of two that share an SM: each hides what the other does
# before its first load and after its last one. Rows of 112 dims do not gain (trial 13).
WARPS, WARPS_OF_MANY, MANY_PAIRS = 8, 4, 512

# Slots for tiles of K and V that a warp has: two, as long as other warps of the SM have loads under way meanwhile. More
# pay where a CTA has an SM for itself and its rows are short, or another block of columns reads the same K and V; and
# where rows end inside of a line, so that neighbours fetch part of what a warp asks for (trials 14 and 18).
STAGES, STAGES_OF_PART_LINES, STAGES_OF_SHARED_KV, STAGES_OF_SHORT_ROWS = 2, 3, 3, 4

# CTAs that start together, so that the card spreads them evenly over its parts, and that blocks of columns which read
# the same K and V do so at the same time. Not for many CTAs, where two have to wait for room (trial 27).
CLUSTER, MOST_CLUSTERED_PAIRS_PER_SM = 2, 8

CTA_SHARED_BYTES = 1024  # that CUDA takes beside those of the kernel


@dataclass(frozen=True, kw_only=True)
class DecodeRecipe(Recipe):
    """The decode kernel for one combination of q_len, group size, head dims and dtype."""

    columns: int  # query rows (token, head) that share one pass over a KV head, a multiple of 8
    column_blocks: int  # passes needed for q_len * group_size rows
    stages: int  # tiles of K and V that a warp has room for
    ctas_per_sm: int  # that run at a time, at least

    @property
    def warps(self) -> int:
        return self.num_threads // 32


def decode_recipe(spec: AttentionSpec, num_requests: int, batch_invariant: bool, card: Card) -> DecodeRecipe:
    """For steps of up to `num_requests`.

    Of a batch-invariant plan, what bits depend on (columns and warps) does not depend on the number of requests.
    """
    assert spec.q_len is not None
    dims, num_pairs = (spec.head_dim, spec.v_head_dim), num_requests * spec.num_kv_heads
    rows, widest = spec.q_len * spec.group_size, max(dims)
    # Every 8 columns cost v_head_dim / 4 accumulator registers a thread and head_dim / 8 of Q; beyond this a kernel
    # would spill.
    max_columns = 32 if widest <= 64 else 16 if widest <= 128 else 8
    columns = min(max_columns, _ceil_div(rows, 8) * 8)
    column_blocks = _ceil_div(rows, columns)
    warps = WARPS
    two_ctas_fit_registers = columns == 8 or (*dims, columns) == (128, 128, 16)
    smaller_ctas_pay = widest != 112 and (num_pairs >= MANY_PAIRS or batch_invariant)
    if widest > 128 or (two_ctas_fit_registers and smaller_ctas_pay):
        warps = WARPS_OF_MANY
    one_cta_per_sm = num_pairs * column_blocks <= card.num_sms
    stages = STAGES
    if widest in (80, 96):
        stages = STAGES_OF_PART_LINES
    elif one_cta_per_sm and widest <= 64:
        stages = STAGES_OF_SHORT_ROWS
    elif one_cta_per_sm and column_blocks > 1:
        stages = STAGES_OF_SHARED_KV
    ctas = (16 if two_ctas_fit_registers and widest <= 128 else 8) // warps  # that the registers of an SM are for
    while True:
        shared_bytes = _decode_shared_bytes(*dims, columns, warps, stages)
        if stages == STAGES or ctas * (shared_bytes + CTA_SHARED_BYTES) <= card.shared_bytes:
            break
        stages -= 1
    clusters_pay = column_blocks > 1 or num_pairs <= MOST_CLUSTERED_PAIRS_PER_SM * card.num_sms
    constants = _attention_constants(spec) | {"COLUMNS": columns, "WARPS": warps, "STAGES": stages}
    return DecodeRecipe(
        kernel="decode",
        constants=defines(**constants, SHARED_BYTES=shared_bytes),
        threads=32 * warps,
        shared_bytes=shared_bytes,
        cluster=CLUSTER if card.is_hopper and clusters_pay else 1,
        columns=columns,
        column_blocks=column_blocks,
        stages=stages,
        ctas_per_sm=min(ctas, card.shared_bytes // (shared_bytes + CTA_SHARED_BYTES)),
    )


def decode_recipes(spec: AttentionSpec, max_batch_size: int | None, card: Card) -> Iterator[DecodeRecipe]:
    """All that steps of up to `max_batch_size` requests (None: of any number) can need, by plans of either kind."""
    last_change = max(MANY_PAIRS, card.num_sms) // spec.num_kv_heads + 1  # of what is compiled
    for num_requests in range(1, min(max_batch_size or last_change, last_change) + 1):
        for batch_invariant in (False, True):
            yield decode_recipe(spec, num_requests, batch_invariant, card)


def _decode_shared_bytes(head_dim: int, v_head_dim: int, columns: int, warps: int, stages: int) -> int:
    k_tile, v_tile = 16 * head_dim * 2, 16 * v_head_dim * 2  # 16 tokens
    ring = stages * max(k_tile, v_tile) if stages % 2 else stages // 2 * (k_tile + v_tile)
    out = columns * (v_head_dim + 4) * 4
    shared_bytes = warps * (max(ring, out) + columns * 8) + 32
    if (head_dim, v_head_dim, columns) == (128, 128, 16):  # Q_IN_SHARED of the kernel
        shared_bytes = _ceil_div(shared_bytes, 128) * 128 + columns * head_dim * 2
    return shared_bytes


# -- prefill ---------------------------------------------------------------------------------------------------------

# Results of the Hopper prefill leave by TMA where a plan's pages have room for so many tokens of each request: while
# they do, the Q of the tile after next has to wait, which short tiles do not hide. Without a capacity the room is the
# power of two above what a step has: so much, or half of it (trial 6).
TMA_OUT_TOKENS = 1024
BEYOND_32_BITS = 2**32 - 1  # an offset in units of 16 bytes that no array reaches (load_global.cuh)


@dataclass(frozen=True)
class RunShape:
    """What a kernel is told of a run's arrays beside their addresses. Strides are in bytes."""

    q_shape: tuple[int, int, int]  # [rows, num_qo_heads, head_dim]
    q_strides: tuple[int, int]  # (row, head)
    constants: tuple[str, ...]  # RunArrays.constants
    out_strides: tuple[int, int]
    out_is_float32: bool
    pool_shape: tuple[int, int, int, int]  # (pages, slots, heads, head_dim), whatever the layout
    k_strides: tuple[int, int, int]  # (page, slot, head)
    v_strides: tuple[int, int, int]

    @staticmethod
    def of(arrays: RunArrays, kv: KVPages) -> RunShape:
        """arrays: in rows."""
        return RunShape(
            q_shape=arrays.q.shape,
            q_strides=arrays.q.strides[:2],
            constants=arrays.constants(),
            out_strides=arrays.out.strides[:2],
            out_is_float32=arrays.out.dtype.itemsize == 4,
            pool_shape=(kv.num_pages, kv.page_size, kv.num_kv_heads, kv.head_dim),
            k_strides=kv.k_strides,
            v_strides=kv.v_strides,
        )

    @property
    def q_units(self) -> tuple[int, int]:
        """Strides of q in units of 16 bytes; that of an axis of one does not count."""
        rows, heads, _ = self.q_shape
        return self.q_strides[0] // 16 if rows > 1 else 0, self.q_strides[1] // 16 if heads > 1 else 0


@dataclass(frozen=True, kw_only=True)
class PrefillRecipe(Recipe):
    """The portable prefill kernel, which takes any run."""

    tile_rows: int  # packed (token, head of the group) rows a CTA

    def accepts(self, run: RunShape) -> bool:
        """Whether the kernel can count in the run's arrays."""
        return True

    def most_tiles(self, packed_rows: int, num_requests: int) -> int:
        """No batch of num_requests requests with so many rows has more tiles; the last is for rows past the batch."""
        return packed_rows // self.tile_rows + num_requests + 1


@dataclass(frozen=True, kw_only=True)
class HopperPrefillRecipe(PrefillRecipe):
    """The Hopper kernel."""

    gathers: bool  # threads copy from the pool, whose pages no TMA box fits
    sends: bool  # 16-bit results leave by TMA

    def accepts(self, run: RunShape) -> bool:
        if self.sends and run.out_is_float32:
            return False
        (rows, heads, _), (row, head) = run.q_shape, run.q_units
        if min(row, head) < 0 or rows * row + heads * head >= BEYOND_32_BITS:
            return False
        pool = self._gathers_from if self.gathers else self._maps
        return pool(run.pool_shape, run.k_strides) and pool(run.pool_shape, run.v_strides)

    @staticmethod
    def _gathers_from(shape: tuple[int, int, int, int], strides: tuple[int, int, int]) -> bool:
        reach = sum(extent * (stride // 16) for extent, stride in zip(shape, strides, strict=False))
        return min(strides) >= 0 and reach < BEYOND_32_BITS

    @staticmethod
    def _maps(shape: tuple[int, int, int, int], strides: tuple[int, int, int]) -> bool:
        return tensor_map.pool_geometry(*shape, strides) is not None


def prefill_recipes(spec: AttentionSpec, card: Card, *, is_long: bool = True) -> tuple[PrefillRecipe, ...]:
    """In order: the first that accepts a run serves it, and the last accepts any.

    is_long: requests are expected to be of TMA_OUT_TOKENS or more.
    """
    portable = portable_prefill_recipe(spec)
    has_dims = spec.v_head_dim == spec.head_dim and (64 <= spec.head_dim <= 128 or spec.head_dim == 256)
    if not (card.is_hopper and has_dims):
        return (portable,)
    some_out = tensor_map.out_geometry(16, spec.num_qo_heads, spec.head_dim, spec.group_size)
    storing = _hopper_prefill_recipe(spec, sends=False)
    if is_long and some_out is not None:
        return _hopper_prefill_recipe(spec, sends=True), storing, portable
    return storing, portable


def portable_prefill_recipe(spec: AttentionSpec) -> PrefillRecipe:
    """32 rows a warp where their accumulators fit into registers, and Q and K into shared memory, else 16."""
    wide = spec.v_head_dim > 128 or spec.head_dim > 192
    tile_rows, block = (64, 32) if wide else (128, 64)
    k_row, v_row = 2 * spec.head_dim, 2 * spec.v_head_dim  # bytes; results are stored over Q
    shared_bytes = tile_rows * max(k_row, v_row) + block * (k_row + v_row) + 4 * block * 4 + tile_rows * 16
    return PrefillRecipe(
        kernel="prefill",
        constants=defines(**_attention_constants(spec), TILE_ROWS=tile_rows, SHARED_BYTES=shared_bytes),
        threads=128,
        shared_bytes=shared_bytes,
        tile_rows=tile_rows,
    )


def _hopper_prefill_recipe(spec: AttentionSpec, *, sends: bool) -> HopperPrefillRecipe:
    # Q, 128 rows, and three blocks each of K and V, 128 rows too, of whole lines of 128 bytes; where rows are wide, two
    # of 64 rows. Then what the rows of Q see, tile records and barriers.
    row, line, rows = 2 * spec.head_dim, 128, 4 * 64 if spec.head_dim > 128 else 6 * 128
    shared_bytes = 128 * row + rows * _ceil_div(row, line) * line + 3072
    gathers = tensor_map.box_tokens(spec.page_size) < tensor_map.LEAST_BOX_TOKENS
    constants = _attention_constants(spec) | {"GATHER": gathers, "TMA_OUT": sends}
    return HopperPrefillRecipe(
        kernel="prefill_hopper",
        constants=defines(**constants, SHARED_BYTES=shared_bytes),
        threads=384,
        shared_bytes=shared_bytes,
        tile_rows=128,
        gathers=gathers,
        sends=sends,
    )


def _attention_constants(spec: AttentionSpec) -> dict[str, int]:
    """What all attention kernels are compiled with."""
    return {
        "HEAD_DIM": spec.head_dim,
        "V_HEAD_DIM": spec.v_head_dim,
        "BFLOAT16": spec.dtype == BFLOAT16,
        **spec.scoring.constants(),
        **{array.constant: False for array in RUN_ARRAYS.values() if array.constant},
    }


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
