"""Runs of decode.cu and prefill.cu: kernels that count in their arrays by address and strides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..compile import Launch, Recipe, fast_divide, fill, load_source, params_dtype, prepare
from ..plan_layout import DecodeLayout, PrefillLayout
from ..recipes import RunShape

Addresses = Mapping[str, int]  # of a plan's buffers and its status word, by name


class DirectRun:
    """A launch that is repeated for runs of one shape with other addresses."""

    def __init__(self, recipe: Recipe, device: str, fields: Mapping[str, Any], *, last: str) -> None:
        """last: the last field that the shape of a run decides."""
        self._launch = prepare(recipe, device, fields)
        self._write_addresses = self._launch.writer("k", "scoring")
        self._scoring = tuple(fields["scoring"].values())
        self._write_shape = self._launch.writer("q_row_stride", last)
        self._grid = 0

    def place(self, addresses: Addresses) -> None:
        """Where the plan's buffers are."""
        place(self._launch, addresses)

    def bind(self, run: RunShape, grid: int, *extents: int) -> None:
        """The shape of the runs that follow; extents: the fields up to `last` that it decides."""
        item = 4 if run.out_is_float32 else 2
        self._write_shape(
            *(stride // 2 for stride in run.q_strides),
            *(stride // item for stride in run.out_strides),
            *(stride // 16 for stride in (*run.k_strides, *run.v_strides)),
            run.out_is_float32,
            *extents,
        )
        self._grid = grid

    def launch(self, stream: int, addresses: Sequence[int]) -> None:
        """addresses: of K, V and RunArrays, 0 for what is not given."""
        self._write_addresses(*addresses, *self._scoring)
        self._launch(stream, self._grid)


def place(launch: Launch, addresses: Addresses) -> None:
    """Write the addresses that the launch has fields for."""
    names = launch.params.dtype.names or ()
    fill(launch.params, {name: address for name, address in addresses.items() if name in names})


def scoring(layout: DecodeLayout | PrefillLayout) -> dict[str, Any]:
    """The fields of the kernels' Scoring behind its addresses, by the names of the spec's."""
    names, options = params_dtype(load_source("scores.cuh"), "Scoring").names or (), layout.spec.scoring._asdict()
    return {name: options[name] for name in names if name in options}


def positions(layout: DecodeLayout | PrefillLayout) -> dict[str, Any]:
    """The fields of Positions."""
    return {
        "page_size": fast_divide(layout.spec.page_size),
        "page_stride": layout.page_stride,
        "causal": layout.spec.scoring.causal,
        "window_left": layout.spec.scoring.window_left,
    }
