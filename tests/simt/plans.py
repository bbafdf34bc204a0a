"""A plan whose owner is NumPy: the real layouts, recipes and launches, with kernels that the SIMT shim runs.

plan = HostPlan(inputs)              # or a batch with spare requests, on a card of another kind
plan.plan()                          # the kernels of a step; what they wrote is in plan.buffers, open to changes
plan.run(q, kv, out, lse)            # the attention kernel
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import paged_attn as pa
from paged_attn import compile as kernels
from paged_attn import tensor_map
from paged_attn.card import A100, Card
from paged_attn.launches.steps import steps_of
from paged_attn.plan_layout import Capacities, PrefillLayout, plan_layout
from paged_attn.recipes import DecodeRecipe, RunShape
from paged_attn.spec import RunArrays
from tests.cases import Inputs
from tests.simt import card as shim
from tests.specs import spec_of

STRUCTS = {
    "requests": ("plan_requests", "Request"), "sorted": ("plan_tiles", "Request"), "items": ("decode", "DecodeItem"),
}  # fmt: skip


class HostPlan:
    """pages: the capacity; by default what the table has. recipe: of decode, in place of the one for these capacities.
    source, constants: those of the attention kernel."""

    def __init__(
        self,
        inputs: Inputs,
        *,
        spare_requests: int = 0,
        pages: int = 0,
        card: Card = A100,
        recipe: DecodeRecipe | None = None,
        reverse: bool = False,
        source: str | None = None,
        **constants: int,
    ) -> None:
        self.inputs, self._reverse = inputs, reverse
        self._compiler = {"source": source, "constants": constants}
        case = inputs.case
        capacities = Capacities(case.batch_size + spare_requests, max(pages, inputs.indices.size))
        spec = spec_of(case, num_pages=len(inputs.k_pages))
        layout = plan_layout(spec, case.page_stride, capacities, False, card)
        self.layout = layout if recipe is None or isinstance(layout, PrefillLayout) else replace(layout, recipe=recipe)
        with _on_shim(reverse, **self._compiler):
            self._steps = steps_of(self.layout, "cuda:0")
        self.buffers: dict[str, np.ndarray] = {}
        for name, num_bytes in self.layout.buffers.items():
            poison = 0 if name in ("arrivals", "claims") else 0xFF
            buffer = np.full(max(num_bytes, 16), poison, np.uint8)
            self.buffers[name] = buffer.view(_dtype(name))
        self.status = np.zeros(16, np.uint8)
        self._steps.place({name: _address(array) for name, array in (*self.buffers.items(), ("status", self.status))})

    def plan(self) -> None:
        """A step of all requests of the case."""
        inputs, case = self.inputs, self.inputs.case
        table = inputs.indptr, inputs.indices, inputs.last_page_len, inputs.page_offset, inputs.total_len
        addresses = [_address(array) for array in (*table, None if case.is_decode else inputs.qo_indptr)]
        with _on_shim(self._reverse):
            self._steps.launch_plan(0, addresses, case.batch_size, inputs.indices.size)

    def run(
        self, q: np.ndarray, kv: pa.PagedKV, out: np.ndarray, lse: np.ndarray | None, sinks: np.ndarray | None = None
    ) -> None:
        """q, out, lse: rows."""
        arrays = RunArrays(q, out, lse, sinks)
        with _on_shim(self._reverse, **self._compiler):
            self._steps.bind(RunShape.of(arrays, kv))
            self._steps.launch_run(0, tuple(map(_address, (kv.k_pages, kv.v_pages, *arrays))))


@contextmanager
def _on_shim(reverse: bool, source: str | None = None, constants: dict[str, int] | None = None) -> Iterator[None]:
    """Kernels are compiled, without a cache, and launched by the shim."""

    def module(path: Path, device: str, defines: tuple[tuple[str, int], ...]) -> Any:
        attends = path.stem in ("decode", "prefill", "prefill_hopper")
        text = source if attends and source is not None else kernels.load_source(path.name)
        given = dict(defines) | (constants or {} if attends else {})
        return shim._RawModule(code=text, options=kernels.options(None, **given))

    with (
        patch.object(kernels, "_module", module),
        patch.object(kernels, "_kernel", kernels.Kernel),
        patch.object(kernels, "_device", lambda device: nullcontext()),
        patch.object(kernels, "capture_of_others", nullcontext),
        patch.object(kernels, "_launch_function", lambda: shim._launch),
        patch.object(tensor_map, "_encode", shim.host_map),
        patch.object(shim, "reverse", reverse),
    ):
        yield


def _dtype(name: str) -> Any:
    if name not in STRUCTS:
        return np.uint32
    kernel, struct = STRUCTS[name]
    return kernels.params_dtype(kernels.load_source(kernel), struct)


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data
