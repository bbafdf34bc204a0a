"""The launches of a plan, on addresses: the kernels of a step once a step, the attention kernel once a layer.

Nothing here owns memory: buffers (plan_layout says which) and arrays are given by address, so their owner may be CuPy
or XLA. `place` says where the buffers are, `bind` what shapes and strides the runs that follow have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .. import recipes
from ..compile import Launch, Recipe, fast_divide, prepare
from ..plan_layout import DecodeLayout, PrefillLayout
from ..recipes import DecodeRecipe, HopperPrefillRecipe, PrefillRecipe, RunShape, row_blocks, with_constants
from .hopper import HopperRun
from .runs import Addresses, DirectRun, place, positions, scoring


class DecodeSteps:
    """plan_requests and plan_splits once a step, decode once a layer."""

    def __init__(self, layout: DecodeLayout, device: str) -> None:
        most = layout.splits(layout.capacities.requests)
        self._layout, self._batch_size = layout, -1
        self._plan_requests = _PlanRequests(layout, device)
        self._plan_splits = prepare(recipes.PLAN_SPLITS, device, {
            "max_batch_size": layout.capacities.requests,
            "max_items": layout.most_items,
            "positions": positions(layout),
            "ctas_an_item": most.ctas_per_item,
            "num_sms": layout.card.num_sms,
            "ctas_at_a_time": most.ctas_at_a_time,
            "fixed_splits": most.fixed_splits,
        })  # fmt: skip
        self._runs = _Runs(functools.partial(_decode_run, layout, device))
        self.launch_run = self._runs[layout.recipe].launch

    def place(self, addresses: Addresses) -> None:
        self._plan_requests.place(addresses)
        place(self._plan_splits, addresses)
        self._runs.place(addresses)

    def launch_plan(self, stream: int, table: Sequence[int], batch_size: int, num_indices: int) -> None:
        """table: addresses, as ScheduleParams begins."""
        if batch_size != self._batch_size:
            splits, params = self._layout.splits(batch_size), self._plan_splits.params
            params["batch"], params["extra_items"] = batch_size, splits.extra_items
            params["ragged_ctas"] = splits.ragged_ctas
            self._batch_size = batch_size
        self._plan_requests(stream, table, batch_size, num_indices)
        self._plan_splits(stream, 1)

    def bind(self, run: RunShape) -> None:
        """Items past the run's batch belong to rows that q does not have."""
        assert self._layout.spec.q_len is not None
        batch, recipe = run.q_shape[0] // self._layout.spec.q_len, self._layout.recipe
        bound = self._runs[with_constants(recipe, run.constants)]
        bound.bind(run, self._layout.grid(batch), batch)
        self.launch_run = bound.launch


class PrefillSteps:
    """plan_requests, and on Hopper plan_tiles, once a step; one of the prefill kernels once a layer."""

    def __init__(self, layout: PrefillLayout, device: str) -> None:
        self._layout = layout
        self._plan_requests = _PlanRequests(layout, device)
        self._plan_tiles: Launch | None = None
        if layout.orders_tiles:
            self._plan_tiles = prepare(recipes.PLAN_TILES, device, {
                "max_batch_size": layout.capacities.requests,
                "window_left": layout.spec.scoring.window_left,
                "group_size": layout.spec.group_size,
                "tile_rows": layout.recipes[0].tile_rows,
            })  # fmt: skip
        self._runs = _Runs(functools.partial(_prefill_run, layout, device))
        self.recipe = layout.recipes[0]  # of the last bind
        self.launch_run = self._runs[self.recipe].launch

    def place(self, addresses: Addresses) -> None:
        self._plan_requests.place(addresses)
        if self._plan_tiles is not None:
            place(self._plan_tiles, addresses)
        self._runs.place(addresses)

    def launch_plan(self, stream: int, table: Sequence[int], batch_size: int, num_indices: int) -> None:
        """table: addresses, as ScheduleParams begins."""
        self._plan_requests(stream, table, batch_size, num_indices)
        if self._plan_tiles is not None:
            self._plan_tiles(stream, 1)

    def bind(self, run: RunShape) -> None:
        recipe = next(recipe for recipe in self._layout.recipes if recipe.accepts(run))
        self.recipe = with_constants(recipe, run.constants)
        rows, spec = run.q_shape[0], self._layout.spec
        tiles = recipe.most_tiles(rows * spec.group_size, self._layout.capacities.requests)
        bound = self._runs[self.recipe]
        bound.bind(run, tiles * spec.num_kv_heads, rows, tiles)
        self.launch_run = bound.launch


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
AnyRun = TypeVar("AnyRun", bound=DirectRun | HopperRun)


class _Runs(Generic[AnyRecipe, AnyRun]):
    """The runs of a plan by recipe, each compiled when it is first needed."""

    def __init__(self, make: Callable[[AnyRecipe], AnyRun]) -> None:
        self._make = make
        self._made: dict[AnyRecipe, AnyRun] = {}
        self._addresses: Addresses = {}

    def place(self, addresses: Addresses) -> None:
        self._addresses = addresses
        for run in self._made.values():
            run.place(addresses)

    def __getitem__(self, recipe: AnyRecipe) -> AnyRun:
        run = self._made.get(recipe)
        if run is None:
            run = self._make(recipe)
            run.place(self._addresses)
            self._made[recipe] = run
        return run


def _decode_run(layout: DecodeLayout, device: str, recipe: DecodeRecipe) -> DirectRun:
    return DirectRun(recipe, device, last="batch", fields={
        "positions": positions(layout),
        "num_qo_heads": layout.spec.num_qo_heads,
        "num_kv_heads": fast_divide(layout.spec.num_kv_heads),
        "group_size": fast_divide(layout.spec.group_size),
        "q_len": layout.spec.q_len,
        "column_blocks": fast_divide(recipe.column_blocks),
        "num_page_ids": layout.capacities.pages,
        "scoring": scoring(layout),
    })  # fmt: skip


def _prefill_run(layout: PrefillLayout, device: str, recipe: PrefillRecipe) -> DirectRun | HopperRun:
    if isinstance(recipe, HopperPrefillRecipe):
        return HopperRun(recipe, layout, device)
    return DirectRun(recipe, device, last="num_tiles", fields={
        "positions": positions(layout),
        "num_requests": layout.capacities.requests,
        "num_qo_heads": layout.spec.num_qo_heads,
        "num_kv_heads": layout.spec.num_kv_heads,
        "group_size": fast_divide(layout.spec.group_size),
        "scoring": scoring(layout),
    })  # fmt: skip


class _PlanRequests:
    """Copies a step's table, and cleans it."""

    def __init__(self, layout: DecodeLayout | PrefillLayout, device: str) -> None:
        spec, capacities = layout.spec, layout.capacities
        self._max_pages = capacities.pages
        self._batch_size, self._blocks = -1, 0
        self._launch = prepare(recipes.PLAN_REQUESTS, device, {
            "max_batch_size": capacities.requests,
            "max_pages": capacities.pages,
            "page_size": spec.page_size,
            "page_stride": layout.page_stride,
            "num_pages": spec.num_pages,
            "q_len": spec.q_len or 0,
            "total_rows_limit": capacities.rows,
            "tile_rows": layout.tile_rows,
            "group_size": spec.group_size,
        })  # fmt: skip
        self._write_step = self._launch.writer("indptr", "num_indices")

    def place(self, addresses: Addresses) -> None:
        place(self._launch, addresses)

    def __call__(self, stream: int, table: Sequence[int], batch_size: int, num_indices: int) -> None:
        if batch_size != self._batch_size:  # one block scans the requests, the others copy page ids
            self._blocks = 1 + (row_blocks(batch_size, self._max_pages) if batch_size else 0)
            self._batch_size = batch_size
        self._write_step(*table, batch_size, num_indices)
        self._launch(stream, self._blocks)


def steps_of(layout: DecodeLayout | PrefillLayout, device: str) -> DecodeSteps | PrefillSteps:
    """The launches of a plan, compiled; `place` must come next."""
    return DecodeSteps(layout, device) if isinstance(layout, DecodeLayout) else PrefillSteps(layout, device)
