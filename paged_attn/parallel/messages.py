"""Merging by messages: ranks exchange their states by collective calls on bytes, and each merges what it received.

A state of `rows` rows and `heads` heads is one message, v behind which is s, each rounded up to 16 bytes. Three ways,
with n ranks; the bytes are those that one rank sends to all others together:

    all-gather                             every rank gets all states and merges them
                                           (n - 1) * state(rows, heads)
    all-to-all by heads                    rank r gets the r-th part of the heads of all states, and merges that
                                           (n - 1) * state(rows, heads / n)
    all-to-all by heads, then all-gather   and then every rank gets the merged parts of all
                                           (n - 1) * (state(rows, heads / n) + result(rows, heads / n))

    state(rows, heads)  = rows * heads * (dim * bytes of partial_dtype + 4)
    result(rows, heads) = rows * heads * (dim * bytes of out_dtype + 4)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backends
from ..holders import TableArrays
from ..interop import FLOAT32, on_device_of
from ..merge import merge_states
from .ranks import Lengths, Merge, MergeShape, Ranks

ALL_GATHER, BY_HEADS, BY_HEADS_AND_BACK = (
    "all-gather", "all-to-all by heads", "all-to-all by heads, then all-gather",
)  # fmt: skip
BYTES_OF_A_CALL = 1 << 20  # what travels in the time that one more call takes, 7 us at some 130 GB/s
_UINT64 = np.dtype(np.uint64)
_UNIT = 16  # bytes: kernels load as many at once


class MessageRanks(Ranks):
    """Ranks that have two collective calls on bytes."""

    def buffers(self, num_messages: int, num_bytes: int) -> list[Any]:
        """uint8 [num_messages * num_bytes] for each rank of this process, on its device."""
        return [empty_bytes(num_messages * num_bytes, device) for device in self.devices]

    def all_gather(self, buffers: list[Any]) -> None:
        """Row r of each uint8 [num_ranks, bytes] becomes what rank r has there in its buffer."""
        raise NotImplementedError

    def all_to_all(self, sent: list[Any], received: list[Any]) -> None:
        """Row r of each uint8 `received` [num_ranks, bytes] becomes what rank r sent to that rank: row `rank` of what
        it has in `sent`."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise TimeoutError where an exchange that is under way does not end; this waits for it."""

    def status(self) -> None:
        self.check()
        super().status()

    def way(self, shape: MergeShape) -> str:
        """How states of this shape travel: the way that sends least, if it saves more than its second call costs."""
        if shape.shard is not None:
            return BY_HEADS
        if shape.heads % self.num_ranks:
            return ALL_GATHER
        saved = _bytes(ALL_GATHER, shape, self.num_ranks) - _bytes(BY_HEADS_AND_BACK, shape, self.num_ranks)
        return BY_HEADS_AND_BACK if saved > BYTES_OF_A_CALL else ALL_GATHER

    def prepare(self, shape: MergeShape) -> Merge:
        return MessageMerge(self, shape)

    def lengths(self) -> Lengths:
        return MessageLengths(self)


def empty_bytes(count: int, device: str) -> Any:
    return backends.of(device).empty((count,), np.dtype(np.uint8), device)


class MessageLengths(Lengths):
    """Checksums that are exchanged by messages of one unit, once a step."""

    ranks: MessageRanks

    def __init__(self, ranks: MessageRanks) -> None:
        self._messages = [x.reshape(ranks.num_ranks, _UNIT) for x in ranks.buffers(ranks.num_ranks, _UNIT)]
        own = [x[rank, : _UINT64.itemsize].view(_UINT64) for rank, x in zip(ranks.ranks, self._messages, strict=True)]
        super().__init__(ranks, own)
        self._is_compared = False
        self._statuses = [backends.of(device).zeros((1,), np.dtype(np.uint32), device) for device in ranks.devices]

    def update(self, tables: list[TableArrays]) -> None:
        super().update(tables)
        self._is_compared = any(table.device != "cpu" for table in tables)  # on all ranks, or on none
        if not self._is_compared:
            return
        self.ranks.all_gather(self._messages)
        for rank, messages, status in zip(self.ranks.ranks, self._messages, self._statuses, strict=True):
            backends.of(f"cuda:{status.device.id}").compare_checksums(messages.view(_UINT64), rank, status)

    def status(self) -> None:
        if not self._is_compared:
            return
        for rank, status in zip(self.ranks.ranks, self._statuses, strict=True):
            (found,) = status.get().tolist()
            if found:
                raise ValueError(
                    f"the lengths of rank {rank} are not those of rank {found - 1} (total_len, or the rank that holds "
                    f"the first page of a sequence); make the same appends, forks and truncations on every rank"
                )


class MessageMerge(Merge):
    """Buffers of messages, and views of them."""

    ranks: MessageRanks

    def __init__(self, ranks: MessageRanks, shape: MergeShape) -> None:
        super().__init__(ranks, shape)
        n = ranks.num_ranks
        self.way = ranks.way(shape)
        self.bytes_a_step = _bytes(self.way, shape, n)
        part = shape.heads // n
        if self.way == ALL_GATHER:
            self._states = ranks.buffers(n, _state_bytes(shape.rows, shape.heads, shape.dim, shape.partial_dtype))
            return
        self._states = ranks.buffers(1, _state_bytes(shape.rows, shape.heads, shape.dim, shape.partial_dtype))
        size = _state_bytes(shape.rows, part, shape.dim, shape.partial_dtype)
        self._sent, self._received = ranks.buffers(n, size), ranks.buffers(n, size)
        if self.way == BY_HEADS_AND_BACK:
            self._results = ranks.buffers(n, _state_bytes(shape.rows, part, shape.dim, shape.out_dtype))

    def states(self, rows: int) -> list[tuple[Any, Any]]:
        shape = self.shape
        num_messages = self.ranks.num_ranks if self.way == ALL_GATHER else 1
        states = []
        for rank, buffer in zip(self.ranks.ranks, self._states, strict=True):
            v, s, _ = _views(buffer, num_messages, rows, shape.heads, shape.dim, shape.partial_dtype)
            own = rank if self.way == ALL_GATHER else 0
            states.append((v[own], s[own]))
        return states

    def __call__(
        self,
        states: list[tuple[Any, Any]],
        outs: list[Any],
        lses: list[Any],
        sinks: list[Any | None],
        checksums: list[Any | None],
    ) -> None:
        n, shape, rows = self.ranks.num_ranks, self.shape, states[0][0].shape[0]
        if self.way == ALL_GATHER:
            views = [_views(x, n, rows, shape.heads, shape.dim, shape.partial_dtype) for x in self._states]
            self.ranks.all_gather([messages for _, _, messages in views])
            for i, (v, s, _) in enumerate(views):
                self._merge(i, v, s, sinks[i], outs[i], lses[i])
            return
        part = shape.heads // n
        sent, received = (
            [_views(x, n, rows, part, shape.dim, shape.partial_dtype) for x in buffers]
            for buffers in (self._sent, self._received)
        )
        for (v, s), (v_sent, s_sent, _) in zip(states, sent, strict=True):
            _copy(v_sent, v.reshape(rows, n, part, shape.dim).swapaxes(0, 1))
            _copy(s_sent, s.reshape(rows, n, part).swapaxes(0, 1))
        self.ranks.all_to_all([messages for _, _, messages in sent], [messages for _, _, messages in received])
        if shape.shard is not None:
            for i, (v, s, _) in enumerate(received):
                self._merge(i, v, s, sinks[i], outs[i], lses[i])
            return
        results = [_views(x, n, rows, part, shape.dim, shape.out_dtype) for x in self._results]
        for i, (v, s, _) in enumerate(received):
            rank = self.ranks.ranks[i]
            self._merge(i, v, s, sinks[i], results[i][0][rank], results[i][1][rank])
        self.ranks.all_gather([messages for _, _, messages in results])
        for (v, s, _), out, lse in zip(results, outs, lses, strict=True):
            _copy(out.reshape(rows, n, part, shape.dim), v.swapaxes(0, 1))
            _copy(lse.reshape(rows, n, part), s.swapaxes(0, 1))

    def status(self) -> None:
        self.ranks.check()

    def _merge(self, i: int, v: Any, s: Any, sinks: Any | None, out: Any, lse: Any) -> None:
        """Merge for local rank i: v [num_ranks, rows, heads or its part of them, dim]."""
        part = self.shape.heads // self.ranks.num_ranks
        first = self.ranks.ranks[i] * part
        if out.shape[1] < v.shape[2]:  # all heads are here, and a part is wanted
            v, s = v[:, :, first : first + part], s[:, :, first : first + part]
        if sinks is not None and out.shape[1] < self.shape.heads:
            sinks = sinks[first : first + part]
        merge_states(v.swapaxes(0, 1), s.swapaxes(0, 1), sinks=sinks, out=out, lse=lse)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _UNIT) * _UNIT


def _state_bytes(rows: int, heads: int, dim: int, dtype: np.dtype) -> int:
    """Bytes of a message."""
    return _rounded(rows * heads * dim * dtype.itemsize) + _rounded(rows * heads * FLOAT32.itemsize)


def _bytes(way: str, shape: MergeShape, num_ranks: int) -> int:
    """Bytes that a rank sends in a step."""
    heads = shape.heads if way == ALL_GATHER else shape.heads // num_ranks
    message = _state_bytes(shape.rows, heads, shape.dim, shape.partial_dtype)
    if way == BY_HEADS_AND_BACK:
        message += _state_bytes(shape.rows, heads, shape.dim, shape.out_dtype)
    return (num_ranks - 1) * message


def _views(buffer: Any, num_messages: int, rows: int, heads: int, dim: int, dtype: np.dtype) -> tuple[Any, Any, Any]:
    """v [num_messages, rows, heads, dim], s [num_messages, rows, heads] and uint8 [num_messages, bytes] of messages of
    this size at the beginning of a buffer."""
    size = _state_bytes(rows, heads, dim, dtype)
    messages = buffer[: num_messages * size]
    v = messages.view(dtype).reshape(num_messages, -1)[:, : rows * heads * dim]
    behind = _rounded(rows * heads * dim * dtype.itemsize) // FLOAT32.itemsize
    s = messages.view(FLOAT32).reshape(num_messages, -1)[:, behind : behind + rows * heads]
    shape = num_messages, rows, heads
    return v.reshape(*shape, dim), s.reshape(shape), messages.reshape(num_messages, size)


def _copy(target: Any, source: Any) -> None:
    """target[...] = source, of one dtype and device: as integers, since CuPy does not copy every float, and on that
    device, since CuPy copies on the current one's stream, in no order with what is on the other's."""
    bits = f"u{target.dtype.itemsize}"
    with on_device_of(target):
        target.view(bits)[...] = source.view(bits)
