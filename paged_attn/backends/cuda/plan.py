"""Plans of decode and prefill: a step's metadata, and the launches that read it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from ... import compile, lifetimes, planner
from ...interop import FLOAT_DTYPES
from ...spec import check_capacities
from .hopper import HopperPrefill, card_of, is_hopper, most_tiles
from .launch import SCAN_BYTES, SCAN_THREADS, launch_prepared, row_blocks
from .memory import current_device, device_index, is_capturing, zeros
from .pool import units_of_16_bytes
from .status import STATUS_BYTES, device_word, raise_word
from .uploads import int32_addresses

if TYPE_CHECKING:
    from ...layout import PagedKV
    from ...page_table import PageTable
    from ...spec import AttentionSpec

REQUEST_BYTES, ITEM_BYTES = 32, 64  # structs Request, DecodeItem
SPLITS_BYTES = 258 * 4 + SCAN_BYTES + 4  # shared memory of plan_splits
INT_LARGEST = 2**31 - 1
_BFLOAT16 = FLOAT_DTYPES["bfloat16"]


@dataclass(frozen=True)
class _Launches:
    """What a plan repeats for steps of one shape, and what writes their parameters."""

    plan_requests: compile.Launch
    write_step: Callable[..., None]
    plan_splits: compile.Launch | None  # decode
    splits: Callable[[int], planner.DecodeSplits] | None  # by the batch size
    attend: compile.Launch
    write_addresses: Callable[..., None]
    write_form: Callable[..., None]
    grid: Callable[[int], tuple[int, ...]]  # rows of q -> CTAs, and the last fields of write_form
    hopper: HopperPrefill | None  # prefill, on a Hopper card


class Plan:
    """One step's metadata in buffers of its own, and the launches that read them.

    With capacities the buffers are made once (by the first update) and never move, unless a later step has more heads
    or larger ones; without, they grow by doubling. A graph that captures the launches keeps the buffers that they have.
    """

    def __init__(
        self,
        device: str,
        *,
        max_batch_size: int | None = None,
        max_pages: int | None = None,
        max_tokens: int | None = None,
        batch_invariant: bool = False,
        one_shot: bool = False,
    ) -> None:
        self._device, self._index = device, device_index(device)
        self._max_batch_size, self._max_pages, self._max_tokens = max_batch_size, max_pages, max_tokens
        self._batch_invariant = batch_invariant
        self._one_shot = one_shot
        self._status = device_word(device) if one_shot else zeros((STATUS_BYTES,), np.uint8, device)
        self._capturable = max_batch_size is not None and max_pages is not None
        self._buffers: dict[str, Any] = {}
        self._last_capture = -1  # whose graph keeps the buffers
        self._shape: Any = None  # what the launches were prepared for
        self._batch_size, self._parts = -1, 0  # of the last step; the blocks that copy its pages
        self._form: Any = None  # of the last run: all but addresses stays written while it is the same
        self._grid = 0
        self._hopper: HopperPrefill | None = None  # for that form
        self._launches: _Launches

    def update(self, spec: AttentionSpec, table: PageTable, qo_indptr: Any) -> None:
        """Copy and clean a step's table on the device, and prepare the launch that run() repeats."""
        check_capacities(
            table,
            qo_indptr,
            spec.q_len,
            max_batch_size=self._max_batch_size,
            max_pages=self._max_pages,
            max_tokens=self._max_tokens,
        )
        if cupy.cuda.runtime.getDevice() == self._index:
            self._update(spec, table, qo_indptr)
        else:
            with current_device(self._device):
                self._update(spec, table, qo_indptr)

    def _update(self, spec: AttentionSpec, table: PageTable, qo_indptr: Any) -> None:
        """The update, with the plan's device as the current one."""
        device, batch_size = self._device, table.batch_size
        stream = cupy.cuda.get_current_stream(self._index)
        capturing = is_capturing(stream)
        if capturing:
            self._check_capturable("plan")
        arrays = table.indptr, table.indices, table.last_page_len, table.page_offset, table.total_len, qo_indptr
        if table.device == "cpu" or isinstance(qo_indptr, np.ndarray):
            _memory, addresses = int32_addresses(arrays, device)
        else:
            addresses = [0 if array is None else array.data.ptr for array in arrays]  # as ScheduleParams has them
        num_indices = table.indices.size
        num_requests = batch_size if self._max_batch_size is None else self._max_batch_size
        # Without a capacity there is room to grow: a step with a page more is prepared already.
        max_pages = 1 << num_indices.bit_length() if self._max_pages is None else self._max_pages
        shape = (spec, table.page_stride, num_requests, max_pages)
        if self._shape != shape:
            before = dict(self._buffers)
            try:
                self._launches = self._prepare(*shape)
            except BaseException:
                self._buffers = before  # the step before is still to be run
                raise
            self._shape, self._form, self._batch_size = shape, None, -1
        if not self._one_shot:
            self._status.data.memset_async(0, STATUS_BYTES, stream)
        launches, stream_address = self._launches, stream.ptr
        if capturing:
            self._keep_with_graph(stream_address)
        if batch_size != self._batch_size:
            self._parts = row_blocks(batch_size, max_pages) if batch_size else 0
            if launches.plan_splits and launches.splits:
                splits, params = launches.splits(batch_size), launches.plan_splits.params
                params["batch"], params["extra_items"] = batch_size, splits.extra_items
                params["ragged_ctas"] = splits.ragged_ctas
            self._batch_size = batch_size
        launches.write_step(*addresses, batch_size, num_indices)
        launches.plan_requests(stream_address, 1 + self._parts)
        if launches.hopper:
            launches.hopper.order_tiles(stream_address, 1)
        elif launches.plan_splits:
            launches.plan_splits(stream_address, 1)

    def _prepare(self, spec: AttentionSpec, page_stride: int, num_requests: int, max_pages: int) -> _Launches:
        """The buffers and the launches for steps of this shape: all that does not change from step to step."""
        device = self._device
        requests = self._buffer("requests", (num_requests + 1) * REQUEST_BYTES)
        page_ids = self._buffer("page_ids", max_pages * 4)
        kernel = compile.kernel("plan_requests", device, shared_bytes=SCAN_BYTES)
        params = kernel.params(
            {
                "requests": requests,
                "page_ids": page_ids,
                "status": self._status,
                "max_batch_size": num_requests,
                "max_pages": max_pages,
                "page_size": spec.page_size,
                "page_stride": page_stride,
                "num_pages": spec.num_pages,
                "q_len": spec.q_len or 0,
                "total_rows_limit": INT_LARGEST if self._max_tokens is None else self._max_tokens,
                "tile_rows": planner.prefill_shape(spec.head_dim).tile_rows,
                "group_size": spec.group_size,
            }
        )
        plan_requests = compile.Launch(kernel, SCAN_THREADS, params)

        fields = {
            "requests": requests,
            "page_ids": page_ids,
            "positions": {
                "page_size": compile.fast_divide(spec.page_size),
                "page_stride": page_stride,
                "causal": spec.causal,
                "window_left": spec.window_left,
            },
            "num_qo_heads": spec.num_qo_heads,
            "num_kv_heads": spec.num_kv_heads,
            "group_size": spec.group_size,
            "sm_scale": spec.sm_scale,
            "logits_soft_cap": spec.logits_soft_cap,
        }
        constants: dict[str, Any] = {
            "HEAD_DIM": spec.head_dim,
            "BFLOAT16": spec.dtype == _BFLOAT16,
            "SOFT_CAP": spec.logits_soft_cap > 0,
        }
        kernel_shape: planner.DecodeShape | planner.PrefillShape
        hopper, plan_splits, cluster = None, None, 1
        splits_of: Callable[[int], planner.DecodeSplits] | None = None
        if spec.q_len is None:
            kernel_shape = planner.prefill_shape(spec.head_dim)
            name, last = "prefill", "num_tiles"
            fields["num_requests"] = num_requests
            hopper_shape = planner.prefill_hopper_shape(spec.head_dim)
            if hopper_shape and is_hopper(device):
                ordered = self._buffer("ordered", (num_requests + 1) * REQUEST_BYTES)
                claims = self._buffer("claims", 4)
                is_long = max_pages * spec.page_size >= planner.TMA_OUT_TOKENS * num_requests
                is_long = is_long or self._batch_invariant  # whatever else is in the batch
                hopper = HopperPrefill(spec, device, hopper_shape, constants, fields, ordered, claims, is_long)
            constants["TILE_ROWS"] = kernel_shape.tile_rows
            grid: Callable[[int], tuple[int, ...]] = functools.partial(_prefill_grid, spec, num_requests)
        else:
            num_pairs = num_requests * spec.num_kv_heads
            kernel_shape = planner.decode_shape(
                spec.q_len, spec.group_size, spec.head_dim, num_pairs, self._batch_invariant, card_of(device)
            )
            columns, column_blocks = kernel_shape.columns, kernel_shape.column_blocks
            name, last = "decode", "batch"
            constants |= {"COLUMNS": columns, "WARPS": kernel_shape.warps, "STAGES": kernel_shape.stages}
            splits_of = functools.partial(
                planner.decode_splits,
                num_kv_heads=spec.num_kv_heads,
                shape=kernel_shape,
                batch_invariant=self._batch_invariant,
                max_tokens=max_pages * spec.page_size,
                num_sms=card_of(device).num_sms,
            )
            splits = splits_of(num_requests)
            most_items = planner.decode_items(num_requests, splits)
            partials = splits.most_partials * splits.ctas_an_item * columns
            items = self._buffer("items", most_items * ITEM_BYTES)
            fields |= {
                "items": items,
                "num_kv_heads": compile.fast_divide(spec.num_kv_heads),
                "group_size": compile.fast_divide(spec.group_size),
                "q_len": spec.q_len,
                "column_blocks": compile.fast_divide(column_blocks),
                "num_page_ids": max_pages,
                "partials": self._buffer("partials", partials * (spec.head_dim + 4) * 4),
                "arrivals": self._buffer("arrivals", num_requests * splits.ctas_an_item * 4),
            }
            del fields["requests"]
            cluster = kernel_shape.cluster
            grid = functools.partial(_decode_grid, spec.q_len, splits_of, cluster)
            kernel = compile.kernel("plan_splits", device, shared_bytes=SPLITS_BYTES)
            params = kernel.params(
                {
                    "requests": requests,
                    "items": items,
                    "max_batch_size": num_requests,
                    "max_items": most_items,
                    "positions": fields["positions"],
                    "ctas_an_item": splits.ctas_an_item,
                    "num_sms": card_of(device).num_sms,
                    "ctas_at_a_time": splits.ctas_at_a_time,
                    "fixed_splits": splits.fixed_splits,
                }
            )
            plan_splits = compile.Launch(kernel, SCAN_THREADS, params)
        constants["SHARED_BYTES"] = kernel_shape.shared_bytes
        kernel = compile.kernel(name, device, shared_bytes=kernel_shape.shared_bytes, **constants)
        attend = compile.Launch(kernel, kernel_shape.threads, kernel.params(fields), cluster)
        return _Launches(
            plan_requests=plan_requests,
            write_step=plan_requests.writer("indptr", "num_indices"),
            plan_splits=plan_splits,
            splits=splits_of,
            attend=attend,
            write_addresses=attend.writer("q", "lse"),
            write_form=attend.writer("q_row_stride", last),
            grid=grid,
            hopper=hopper,
        )

    def run(self, spec: AttentionSpec, q: Any, kv: PagedKV, out: Any, lse: Any, form: Any) -> None:
        """Attend. form: the same object while nothing but addresses differs from the run before."""
        stream: int = cupy.cuda.get_current_stream(self._index).ptr
        if cupy.cuda.runtime.streamIsCapturing(stream):
            self._check_capturable("run")
            self._keep_with_graph(stream)
        if form is not self._form:
            self._bind(q, kv, out)
            self._form = form
        lse_address = 0 if lse is None else lse.data.ptr
        if self._hopper:
            self._hopper.run(stream, q.data.ptr, kv, out.data.ptr, lse_address)
            return
        launches = self._launches
        launches.write_addresses(q.data.ptr, kv.k_address, kv.v_address, out.data.ptr, lse_address)
        launch_prepared(launches.attend, stream, self._grid)

    def _bind(self, q: Any, kv: PagedKV, out: Any) -> None:
        """Write what the form of a run decides."""
        self._form = None
        launches, q_strides, out_strides, out_itemsize = self._launches, q.strides, out.strides, out.dtype.itemsize
        self._hopper = launches.hopper if launches.hopper and launches.hopper.bind(q, kv, out) else None
        self._grid, *extents = launches.grid(q.shape[0])
        launches.write_form(
            q_strides[0] // 2,
            q_strides[1] // 2,
            out_strides[0] // out_itemsize,
            out_strides[1] // out_itemsize,
            *units_of_16_bytes(kv.k_strides),
            *units_of_16_bytes(kv.v_strides),
            out_itemsize == 4,
            *extents,
        )

    def _check_capturable(self, call: str) -> None:
        if self._one_shot:
            raise ValueError(
                "a one-shot call was made while the stream is capturing a CUDA graph, and what it plans lasts for one "
                "call only; make a BatchDecodeWithPagedKVCache or BatchPrefillWithPagedKVCache with max_batch_size= "
                "and max_pages=, plan and run it once, then capture its plan() and run()"
            )
        if not self._capturable:
            raise ValueError(
                f"{call}() was called while the stream is capturing a CUDA graph, but the plan has no capacity, so "
                f"its buffers may move; make it with max_batch_size= and max_pages="
            )

    def _keep_with_graph(self, stream: int) -> None:
        """The graph that is captured reads the buffers at every replay, also when this plan has others, or is gone."""
        capture = lifetimes.capture_id(stream)
        if capture != self._last_capture:
            lifetimes.keep_with_graph(stream, (self._status, *self._buffers.values()))
            self._last_capture = capture

    def raise_status(self) -> None:
        """PageTableError for the first fault that the last update met. Waits for the device."""
        raise_word(self._status)

    def _buffer(self, name: str, num_bytes: int) -> Any:
        """A buffer of at least num_bytes that stays where it is while it is large enough; it starts as zeros."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < num_bytes:
            if is_capturing(cupy.cuda.get_current_stream()):
                raise ValueError(
                    f"plan() needs {num_bytes} bytes for its {name} while the stream is capturing a CUDA graph; "
                    f"call plan() once with these shapes before the capture, which makes the buffers"
                )
            size = num_bytes if buffer is None else max(num_bytes, 2 * buffer.nbytes)
            buffer = self._buffers[name] = zeros((max(size, 16),), np.uint8, self._device)
        return buffer


def _decode_grid(q_len: int, splits: Callable[[int], planner.DecodeSplits], cluster: int, rows: int) -> tuple[int, int]:
    """CTAs, and the run's batch: items behind those of the batch belong to rows that q does not have."""
    batch = rows // q_len
    return planner.decode_grid(batch, splits(batch), cluster), batch


def _prefill_grid(spec: AttentionSpec, num_requests: int, rows: int) -> tuple[int, int, int]:
    """CTAs, and the run's q_rows and num_tiles."""
    tiles = most_tiles(rows * spec.group_size, planner.prefill_shape(spec.head_dim).tile_rows, num_requests)
    return tiles * spec.num_kv_heads, rows, tiles
