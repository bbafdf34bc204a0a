"""Plans of decode and prefill: the owner of a step's buffers, which are CuPy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from ... import lifetimes
from ...card import card_of
from ...interop import device_index
from ...launches.steps import DecodeSteps, PrefillSteps, steps_of
from ...plan_layout import INT_LARGEST, Capacities, plan_layout
from ...recipes import RunShape
from .memory import current_device, is_capturing, zeros
from .status import STATUS_BYTES, device_word, raise_word
from .uploads import int32_addresses

if TYPE_CHECKING:
    from ...holders import KVPages, TableArrays
    from ...spec import AttentionSpec, RunArrays


class Plan:
    """One step's metadata in buffers that the plan owns, and the launches that read them.

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
        self._shape: Any = None  # of the steps that the launches are prepared for
        self._signature: Any = None  # of the last run: all but addresses stays written while it is the same
        self._steps: DecodeSteps | PrefillSteps

    def update(self, spec: AttentionSpec, table: TableArrays, qo_indptr: Any) -> None:
        """Copy and clean a step's table on the device, and prepare the launch that run() repeats."""
        if cupy.cuda.runtime.getDevice() == self._index:
            self._update(spec, table, qo_indptr)
        else:
            with current_device(self._device):
                self._update(spec, table, qo_indptr)

    def _update(self, spec: AttentionSpec, table: TableArrays, qo_indptr: Any) -> None:
        """The update, with the plan's device as the current one."""
        batch_size, num_indices = table.batch_size, table.indices.size
        stream = cupy.cuda.get_current_stream(self._index)
        capturing = is_capturing(stream)
        if capturing:
            self._check_capturable("plan")
        arrays = table.indptr, table.indices, table.last_page_len, table.page_offset, table.total_len, qo_indptr
        if table.device == "cpu" or isinstance(qo_indptr, np.ndarray):
            _memory, addresses = int32_addresses(arrays, self._device)
        else:
            addresses = [0 if array is None else array.data.ptr for array in arrays]
        num_requests = batch_size if self._max_batch_size is None else self._max_batch_size
        # Without a capacity there is room to grow: a step with a page more is prepared already.
        max_pages = 1 << num_indices.bit_length() if self._max_pages is None else self._max_pages
        shape = (spec, table.page_stride, num_requests, max_pages)
        if self._shape != shape:
            self._prepare(*shape)
            self._shape, self._signature = shape, None
        if not self._one_shot:
            self._status.data.memset_async(0, STATUS_BYTES, stream)
        if capturing:
            self._keep_with_graph(stream.ptr)
        self._steps.launch_plan(stream.ptr, addresses, batch_size, num_indices)

    def _prepare(self, spec: AttentionSpec, page_stride: int, num_requests: int, max_pages: int) -> None:
        """Buffers and launches for steps of this shape. Where that raises, those of the step before stay."""
        rows = INT_LARGEST if self._max_tokens is None else self._max_tokens
        capacities = Capacities(num_requests, max_pages, rows)
        layout = plan_layout(spec, page_stride, capacities, self._batch_invariant, card_of(self._device))
        steps = steps_of(layout, self._device)
        before = dict(self._buffers)
        try:
            addresses = {name: self._buffer(name, size).data.ptr for name, size in layout.buffers.items()}
        except BaseException:
            self._buffers = before
            raise
        steps.place(addresses | {"status": self._status.data.ptr})
        self._steps = steps

    def run(
        self, spec: AttentionSpec, arrays: RunArrays, kv: KVPages, addresses: Sequence[int], signature: Any
    ) -> None:
        """Attend. signature: equal to that of the run before where nothing but addresses differs from it."""
        stream: int = cupy.cuda.get_current_stream(self._index).ptr
        if cupy.cuda.runtime.streamIsCapturing(stream):
            self._check_capturable("run")
            self._keep_with_graph(stream)
        if signature != self._signature:
            self._signature = None
            self._steps.bind(RunShape.of(arrays, kv))
            self._signature = signature
        if cupy.cuda.runtime.getDevice() == self._index:
            self._steps.launch_run(stream, addresses)
        else:
            with current_device(self._device):
                self._steps.launch_run(stream, addresses)

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
