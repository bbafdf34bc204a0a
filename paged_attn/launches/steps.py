"""The launches of a plan, on addresses: the kernels of a step once a step, the attention kernel once a layer.

Nothing here owns memory: buffers (plan_layout says which) and arrays are given by address, so their owner may be CuPy
or XLA. `place` says where the buffers are, `bind` what shapes and strides the runs that follow have.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..compile import Launch, fast_divide, prepare
from ..plan_layout import DecodeLayout, PrefillLayout
from ..recipes import (
    PLAN_REQUESTS,
    PLAN_SPLITS,
    PLAN_TILES,
    DecodeRecipe,
    HopperPrefillRecipe,
    PrefillRecipe,
    RunShape,
    row_blocks,
    with_sinks,
)
from .hopper import HopperRun
from .runs import Addresses, DirectRun, place, positions, scoring


class DecodeSteps:
    """plan_requests and plan_splits once a step, decode once a layer."""

    def __init__(self, layout: DecodeLayout, device: str) -> None:
        capacities, most = layout.capacities, layout.splits(layout.capacities.requests)
        self._layout, self._device, self._batch_size = layout, device, -1
        self._plan_requests = _PlanRequests(layout, device)
        self._plan_splits = prepare(PLAN_SPLITS, device, {
            "max_batch_size": capacities.requests,
            "max_items": layout.most_items,
            "positions": positions(layout),
            "ctas_an_item": most.ctas_per_item,
            "num_sms": layout.card.num_sms,
            "ctas_at_a_time": most.ctas_at_a_time,
            "fixed_splits": most.fixed_splits,
        })  # fmt: skip
        self._runs: dict[DecodeRecipe, DirectRun] = {}
        self._addresses: Addresses = {}
        self.launch_run = self._run_of(layout.recipe)  # with sinks when a run has them

    def place(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._plan_requests.place(addresses)
        place(self._plan_splits, addresses)
        for run in self._runs.values():
            run.place(addresses)

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
        self.launch_run = self._run_of(with_sinks(recipe) if run.has_sinks else recipe)
        self.launch_run.bind(run, self._layout.grid(batch), batch)

    def _run_of(self, recipe: DecodeRecipe) -> DirectRun:
        run = self._runs.get(recipe)
        if run is None:
            spec = self._layout.spec
            run = DirectRun(recipe, self._device, last="batch", fields={
                "positions": positions(self._layout),
                "num_qo_heads": spec.num_qo_heads,
                "num_kv_heads": fast_divide(spec.num_kv_heads),
                "group_size": fast_divide(spec.group_size),
                "q_len": spec.q_len,
                "column_blocks": fast_divide(recipe.column_blocks),
                "num_page_ids": self._layout.capacities.pages,
                "scoring": scoring(self._layout),
            })  # fmt: skip
            run.place(self._addresses)
            self._runs[recipe] = run
        return run


class PrefillSteps:
    """plan_requests, and on Hopper plan_tiles, once a step; one of the prefill kernels once a layer."""

    def __init__(self, layout: PrefillLayout, device: str) -> None:
        self._layout, self._device = layout, device
        self._addresses: Addresses = {}
        self._plan_requests = _PlanRequests(layout, device)
        self._plan_tiles: Launch | None = None
        if layout.orders_tiles:
            self._plan_tiles = prepare(PLAN_TILES, device, {
                "max_batch_size": layout.capacities.requests,
                "window_left": layout.spec.scoring.window_left,
                "group_size": layout.spec.group_size,
                "tile_rows": layout.recipes[0].tile_rows,
            })  # fmt: skip
        self._runs: dict[PrefillRecipe, DirectRun | HopperRun] = {}
        self.recipe = layout.recipes[0]  # of the last bind; the first is compiled now, others when a run needs them
        self.launch_run = self._run_of(self.recipe)

    def place(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._plan_requests.place(addresses)
        if self._plan_tiles is not None:
            place(self._plan_tiles, addresses)
        for run in self._runs.values():
            run.place(addresses)

    def launch_plan(self, stream: int, table: Sequence[int], batch_size: int, num_indices: int) -> None:
        """table: addresses, as ScheduleParams begins."""
        self._plan_requests(stream, table, batch_size, num_indices)
        if self._plan_tiles is not None:
            self._plan_tiles(stream, 1)

    def bind(self, run: RunShape) -> None:
        self.recipe = next(recipe for recipe in self._layout.recipes if recipe.accepts(run))
        rows, spec = run.q_shape[0], self._layout.spec
        tiles = self.recipe.most_tiles(rows * spec.group_size, self._layout.capacities.requests)
        self.launch_run = self._run_of(self.recipe)
        self.launch_run.bind(run, tiles * spec.num_kv_heads, rows, tiles)

    def _run_of(self, recipe: PrefillRecipe) -> DirectRun | HopperRun:
        run = self._runs.get(recipe)
        if run is None:
            if isinstance(recipe, HopperPrefillRecipe):
                run = HopperRun(recipe, self._layout, self._device)
            else:
                run = self._portable_run(recipe)
            run.place(self._addresses)
            self._runs[recipe] = run
        return run

    def _portable_run(self, recipe: PrefillRecipe) -> DirectRun:
        spec = self._layout.spec
        return DirectRun(recipe, self._device, last="num_tiles", fields={
            "positions": positions(self._layout),
            "num_requests": self._layout.capacities.requests,
            "num_qo_heads": spec.num_qo_heads,
            "num_kv_heads": spec.num_kv_heads,
            "group_size": spec.group_size,
            "sm_scale": spec.scoring.sm_scale,
            "logits_soft_cap": spec.scoring.logits_soft_cap,
        })  # fmt: skip


class _PlanRequests:
    """Copies a step's table, and cleans it."""

    def __init__(self, layout: DecodeLayout | PrefillLayout, device: str) -> None:
        spec, capacities = layout.spec, layout.capacities
        self._max_pages = capacities.pages
        self._batch_size, self._blocks = -1, 0
        self._launch = prepare(PLAN_REQUESTS, device, {
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
