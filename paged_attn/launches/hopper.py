"""Runs of prefill_hopper.cu, which sees pools, and the results that it sends, as tensors of the copy engine TMA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import tensor_map
from ..compile import Launch, fast_divide, prepare
from ..interop import BFLOAT16
from ..plan_layout import PrefillLayout
from ..recipes import HopperPrefillRecipe, RunShape
from .runs import Addresses, place, positions, scoring

Strides = tuple[int, int, int]  # (page, slot, head), in bytes


class HopperRun:
    """A launch for each layer's pools, repeated for runs of one shape with other addresses."""

    def __init__(self, recipe: HopperPrefillRecipe, layout: PrefillLayout, device: str) -> None:
        self._recipe, self._layout = recipe, layout
        self._is_bfloat16 = layout.spec.dtype == BFLOAT16
        self._prepare = functools.partial(prepare, recipe, device)
        self._prepare({})  # compiles
        self._addresses: Addresses = {}
        self._layers_of = functools.lru_cache(maxsize=8)(self._new_layers)  # by the pools' shape and strides
        self._layer: Callable[[int, int], _Layer]  # by the pools' addresses
        self._scoring = tuple(scoring(layout).values())
        self._q_strides, self._out_form = (0, 0), (0, 0, 0, False)
        self._out_geometry: tensor_map.OutGeometry | None = None  # None: fewer rows than a box, so none is sent
        self._extents, self._grid = (0, 0), 0

    def place(self, addresses: Addresses) -> None:
        """Where the plan's buffers are. Followed by a bind."""
        self._addresses = addresses
        self._layers_of.cache_clear()

    def bind(self, run: RunShape, grid: int, rows: int, tiles: int) -> None:
        """The shape of the runs that follow."""
        spec, item = self._layout.spec, 4 if run.out_is_float32 else 2
        self._layer = self._layers_of(run.pool_shape, run.k_strides, run.v_strides)
        self._q_strides = run.q_units
        row, head = run.out_strides
        self._out_form = row // item, head // item, spec.num_qo_heads, run.out_is_float32
        self._out_geometry = tensor_map.out_geometry(*run.q_shape, spec.group_size) if self._recipe.sends else None
        self._extents, self._grid = (rows, tiles), min(self._layout.card.num_sms, grid)

    def launch(self, stream: int, addresses: Sequence[int]) -> None:
        """addresses: of K, V and RunArrays, 0 for what is not given."""
        k, v, q, out, lse, *scored_by = addresses
        layer, geometry = self._layer(k, v), self._out_geometry
        layer.write(q, *self._q_strides, out, lse, *self._out_form, *scored_by, *self._scoring)
        if layer.extents != self._extents:
            layer.tile_list["q_rows"], layer.tile_list["num_tiles"] = layer.extents = self._extents
        if geometry is not None and layer.sends_to != (out, geometry):
            layer.out_map["words"] = tensor_map.out_map(out, geometry, self._is_bfloat16)
            layer.sends_to = out, geometry
        layer.launch(stream, self._grid)

    def _new_layers(
        self, shape: tuple[int, int, int, int], k_strides: Strides, v_strides: Strides
    ) -> Callable[[int, int], _Layer]:
        """The layers whose pools have this shape and these strides, each made when it is first run."""

        def make(k: int, v: int) -> _Layer:
            pools = {"k": self._pool(k, shape, k_strides), "v": self._pool(v, shape, v_strides)}
            launch = self._prepare(self._fields() | pools)
            place(launch, self._addresses)
            return _Layer(launch, launch.writer("q", "scoring"), launch.params["list"], launch.params["out_map"])

        return functools.lru_cache(maxsize=1024)(make)

    def _pool(self, address: int, shape: tuple[int, int, int, int], strides: Strides) -> dict[str, Any]:
        """The fields of the kernel's Pool."""
        if self._recipe.gathers:
            return {"pages": address, "strides": tuple(stride // 16 for stride in strides)}
        geometry = tensor_map.pool_geometry(*shape, strides)
        assert geometry is not None  # or the recipe would not have accepted the run
        return tensor_map.pool_map(address, geometry, self._is_bfloat16)

    def _fields(self) -> dict[str, Any]:
        """The fields that no run changes."""
        spec = self._layout.spec
        return {
            "list": {
                "requests": self._addresses["sorted"],
                "positions": positions(self._layout),
                "group_size": fast_divide(spec.group_size),
                "num_requests": self._layout.capacities.requests,
                "num_kv_heads": spec.num_kv_heads,
            },
            "box_tokens": tensor_map.box_tokens(spec.page_size),
        }


@dataclass
class _Layer:
    """The launch for a layer's pools, and the fields that runs write."""

    launch: Launch
    write: Callable[..., None]  # from "q" to "scoring"
    tile_list: Any
    out_map: Any
    extents: tuple[int, int] = (-1, -1)  # rows and tiles that tile_list has
    sends_to: tuple[int, tensor_map.OutGeometry] | None = None  # what out_map is of
