"""The launches of prefill_hopper.cu for one plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cupy

from ... import compile, planner, tensor_map
from ...interop import FLOAT_DTYPES
from .launch import SCAN_BYTES, SCAN_THREADS, launch_prepared
from .memory import device_index
from .pool import units_of_16_bytes

if TYPE_CHECKING:
    from ...layout import PagedKV
    from ...spec import AttentionSpec

TILES_BYTES = 256 * 4 + SCAN_BYTES  # shared memory of plan_tiles
NOWHERE = 2**32 - 1  # a place in units of 16 bytes that no array reaches (load_global.cuh)
_BFLOAT16 = FLOAT_DTYPES["bfloat16"]


class HopperPrefill:
    """The launches of prefill_hopper.cu for one plan: the order of its tiles once a step, the kernel once a layer."""

    def __init__(
        self,
        spec: AttentionSpec,
        device: str,
        shape: planner.PrefillShape,
        constants: dict[str, Any],
        fields: dict[str, Any],
        ordered: Any,
        claims: Any,
        is_long: bool,
    ) -> None:
        self._spec, self._device, self._tile_rows = spec, device, shape.tile_rows
        self._num_requests: int = fields["num_requests"]
        self._num_sms = card_of(device).num_sms
        tiles = compile.kernel("plan_tiles", device, shared_bytes=TILES_BYTES)
        self.order_tiles = compile.Launch(
            tiles,
            SCAN_THREADS,
            tiles.params(
                {
                    "requests": fields["requests"],
                    "sorted": ordered,
                    "max_batch_size": self._num_requests,
                    "window_left": spec.window_left,
                    "group_size": spec.group_size,
                    "tile_rows": shape.tile_rows,
                }
            ),
        )
        gather = tensor_map.box_tokens(spec.page_size) < tensor_map.LEAST_BOX_TOKENS
        constants = constants | {"SHARED_BYTES": shape.shared_bytes, "GATHER": gather}
        kernel_of = functools.partial(
            compile.kernel, "prefill_hopper", device, shared_bytes=shape.shared_bytes, **constants
        )
        some_out = tensor_map.out_geometry(16, spec.num_qo_heads, spec.head_dim, spec.group_size)
        self._may_send = is_long and some_out is not None  # by TMA
        kernel_of(TMA_OUT=self._may_send)  # now; the other one with the first float32 out
        own = {
            "page_ids": fields["page_ids"],
            "claims": claims,
            "list": {
                "requests": ordered,
                "positions": fields["positions"],
                "group_size": compile.fast_divide(spec.group_size),
                "num_requests": self._num_requests,
                "num_kv_heads": spec.num_kv_heads,
            },
            "box_tokens": tensor_map.box_tokens(spec.page_size),
            "sm_scale": spec.sm_scale,
            "logits_soft_cap": spec.logits_soft_cap,
        }
        pool_of = _gathered_pool if gather else functools.partial(_mapped_pool, spec.dtype == _BFLOAT16)
        make_layer = functools.partial(_HopperLayer.make, kernel_of, shape.threads, own, pool_of)
        self._layer = functools.lru_cache(maxsize=1024)(make_layer)
        self._q_strides, self._out_form = (0, 0), (0, 0, 0, False)
        self._sends = False
        self._out_geometry: tensor_map.OutGeometry | None = None  # None: too few rows for a box, so none is sent
        self._rows, self._tiles, self._grid = 0, 0, 0

    def bind(self, q: Any, kv: PagedKV, out: Any) -> bool:
        """Take over what the form of a run decides; or say no, where the kernel cannot count in q or in the pool."""
        rows, heads, _ = q.shape
        q_row, q_head = (q.strides[0] // 16 if rows > 1 else 0), (q.strides[1] // 16 if heads > 1 else 0)
        self._sends = self._may_send and out.dtype.itemsize == 2
        layer = self._layer(kv.k_address, kv.v_address, kv.form, self._sends)
        if layer is None or min(q_row, q_head) < 0 or rows * q_row + heads * q_head >= NOWHERE:
            return False
        itemsize = out.dtype.itemsize
        self._q_strides = q_row, q_head
        self._out_form = out.strides[0] // itemsize, out.strides[1] // itemsize, self._spec.num_qo_heads, itemsize == 4
        self._out_geometry = tensor_map.out_geometry(*out.shape, self._spec.group_size)
        self._rows = rows
        self._tiles = most_tiles(rows * self._spec.group_size, self._tile_rows, self._num_requests)
        self._grid = min(self._num_sms, self._tiles * self._spec.num_kv_heads)
        return True

    def run(self, stream: int, q: int, kv: PagedKV, out: int, lse: int) -> None:
        """Launch, for arrays at these addresses."""
        geometry = self._out_geometry
        layer = self._layer(kv.k_address, kv.v_address, kv.form, self._sends)
        assert layer is not None  # a matter of the form, which bind has seen
        layer.write(q, *self._q_strides, out, lse, *self._out_form)
        layer.tile_list["q_rows"], layer.tile_list["num_tiles"] = self._rows, self._tiles
        if self._sends and geometry is not None and layer.sends_to != (out, geometry):
            layer.out_map["words"] = tensor_map.out_map(out, geometry, self._spec.dtype == _BFLOAT16)
            layer.sends_to = out, geometry
        launch_prepared(layer.launch, stream, self._grid)


@dataclass
class _HopperLayer:
    """The launch of prefill_hopper.cu for a layer's pools, and the fields that runs write."""

    launch: compile.Launch
    write: Callable[..., None]  # from "q" to "to"
    tile_list: Any
    out_map: Any
    sends_to: tuple[int, tensor_map.OutGeometry] | None = None  # what out_map is of

    @staticmethod
    def make(
        kernel_of: Callable[..., compile.Kernel],
        threads: int,
        fields: dict[str, Any],
        pool_of: Callable[[int, tuple[int, int, int, int], tuple[int, int, int]], dict[str, Any] | None],
        k: int,
        v: int,
        form: Any,
        tma_out: bool,
    ) -> _HopperLayer | None:
        """For pools at k and v, made once; None where the kernel cannot count in their form."""
        *_, extents, k_strides, v_strides = form
        pools = pool_of(k, extents, k_strides), pool_of(v, extents, v_strides)
        if None in pools:
            return None
        kernel = kernel_of(TMA_OUT=tma_out)
        launch = compile.Launch(kernel, threads, kernel.params(fields | {"k": pools[0], "v": pools[1]}))
        return _HopperLayer(launch, launch.writer("q", "to"), launch.params["list"], launch.params["out_map"])


def _gathered_pool(
    pointer: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int]
) -> dict[str, Any] | None:
    """The fields of the kernel's Pool where threads copy from it."""
    units = units_of_16_bytes(strides)
    reach = sum(extent * unit for extent, unit in zip(shape, units, strict=False))
    return {"pages": pointer, "strides": units} if min(units) >= 0 and reach < NOWHERE else None


def _mapped_pool(
    bfloat16: bool, pointer: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int]
) -> dict[str, Any] | None:
    """The fields of the kernel's Pool where TMA copies from it."""
    page, slot, head = strides
    geometry = tensor_map.pool_geometry(*shape, (page * 2, slot * 2, head * 2))
    return None if geometry is None else tensor_map.pool_map(pointer, geometry, bfloat16)


@functools.cache
def is_hopper(device: str) -> bool:
    return bool(cupy.cuda.Device(device_index(device)).compute_capability == "90")


@functools.cache
def card_of(device: str) -> planner.Card:
    attributes = cupy.cuda.Device(device_index(device)).attributes
    num_sms, shared_bytes = attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerMultiprocessor"]
    return planner.Card(int(num_sms), int(shared_bytes), has_clusters=is_hopper(device))


def most_tiles(packed_rows: int, tile_rows: int, num_requests: int) -> int:
    """No batch of num_requests requests with so many rows has more tiles; the last is for rows behind the batch."""
    return packed_rows // tile_rows + num_requests + 1
