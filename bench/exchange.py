"""Microseconds of an exchange of partial states with its merge, for ranks on one card or on several, by rows.

Each rank replays a CUDA graph of 32 exchanges on a stream of its own; all start together, behind a spin that hides the
host's part. Beside them a graph of 32 merge_states of the same states on one card, which is what an exchange adds to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import paged_attn as pa
from paged_attn import parallel
from paged_attn.parallel.ranks import MergeShape

from .session import require_gpu
from .timing import Memory, spread

STEPS = 32  # of a graph
HEADS, DIM = 32, 128
WARM_UP = 3


class Exchange:
    """States of all ranks of a PeerRanks, which live in this process; their exchange, and where results go.

    rows: of HEADS, or of the heads of the fields given. fields: of MergeShape.
    """

    def __init__(self, comm: Any, rows: int, sinks: np.ndarray | None = None, **fields: Any) -> None:
        import cupy

        self.comm, self._cupy = comm, cupy
        defaults: dict[str, Any] = {"heads": HEADS, "dim": DIM, "shard": None}
        defaults |= {"partial_dtype": np.dtype(np.float32), "out_dtype": np.dtype(np.float16)}
        self.shape = shape = MergeShape(rows, **defaults | fields)
        self.merge = comm.prepare(shape)
        self.states = self.merge.states(rows)
        heads = shape.heads if shape.shard is None else shape.heads // comm.num_ranks
        self.outs = self._each(lambda _: cupy.empty((rows, heads, shape.dim), shape.out_dtype))
        self.lses = self._each(lambda _: cupy.empty((rows, heads), np.float32))
        self.sinks = self._each(lambda _: None if sinks is None else cupy.asarray(sinks))
        self.checksums = self._each(lambda _: cupy.zeros(1, np.uint64))
        self.streams = self._each(lambda _: cupy.cuda.Stream(non_blocking=True))

    def _each(self, make: Callable[[int], Any]) -> list[Any]:
        """make(i) for each rank, on its device, whose work is then over."""
        made = []
        for i, _ in enumerate(self.comm.devices):
            with self.on_device(i) as device:
                made.append(make(i))
                device.synchronize()
        return made

    @contextmanager
    def on_device(self, i: int) -> Iterator[Any]:
        with self._cupy.cuda.Device(int(self.comm.devices[i].removeprefix("cuda:"))) as device:
            yield device

    def write(self, v: np.ndarray, s: np.ndarray) -> None:
        """v [num_ranks, rows, heads, dim], s [num_ranks, rows, heads]."""

        def write(i: int) -> None:
            for target, source in zip(self.states[i], (v[i], s[i]), strict=True):
                bits = f"u{source.dtype.itemsize}"
                target.view(bits).set(source.view(bits))

        self._each(write)

    def random(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """States for `write`."""
        rng, shape = np.random.default_rng(seed), (self.comm.num_ranks, self.shape.rows, self.shape.heads)
        v = rng.standard_normal((*shape, self.shape.dim)).astype(self.shape.partial_dtype)
        return v, (rng.standard_normal(shape) * 3).astype(np.float32)

    def step(self) -> None:
        """Of all ranks, on their current streams."""
        self.merge(self.states, self.outs, self.lses, self.sinks, self.checksums)

    def one(self, i: int) -> None:
        """The part of rank i, on its stream of `streams`."""
        with self.on_device(i):
            given = self.states[i], self.outs[i], self.lses[i], self.sinks[i], self.checksums[i]
            self.merge.exchange(i, self.streams[i].ptr, *given)

    def graphs(self, steps: int) -> list[Any]:
        """A graph of each rank's part of so many steps, to be launched on its stream."""

        def capture(i: int) -> Any:
            self.streams[i].begin_capture()
            try:
                for _ in range(steps):
                    self.one(i)
            finally:
                graph = self.streams[i].end_capture()
            return graph

        return self._each(capture)

    def results(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """out and lse of each rank, when all work of its device is over."""
        return self._each(self._result)

    def _result(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        self._cupy.cuda.runtime.deviceSynchronize()
        out = self.outs[i].view(f"u{self.outs[i].itemsize}").get().view(self.shape.out_dtype)
        return out, self.lses[i].get()


def measure_exchange(rows: int, devices: Sequence[int], reps: int = 30) -> dict[str, Any]:
    """Microseconds of an exchange of `rows` states of 128, and of merge_states of the same."""
    cupy = require_gpu()
    with parallel.PeerRanks(0, len(devices), devices=devices) as comm:
        exchange = Exchange(comm, rows // HEADS)
        v, s = exchange.random(0)
        exchange.write(v, s)
        graphs = exchange.graphs(STEPS)
        with cupy.cuda.Device(devices[0]):
            memory = Memory()
            memory.spin(1)
        times = [_time_graphs(exchange, graphs, memory) for _ in range(WARM_UP + reps)][WARM_UP:]
        comm.status()
        with cupy.cuda.Device(devices[0]):
            states = cupy.asarray(v.swapaxes(0, 1)), cupy.asarray(s.swapaxes(0, 1))
            out, lse = pa.merge_states(*states, out=cupy.empty((rows // HEADS, HEADS, DIM), np.float16))
            for result, result_lse in exchange.results():
                np.testing.assert_array_equal(result, out.get())
                np.testing.assert_array_equal(result_lse, lse.get())
            merge_times = _time_merges(cupy, states, out, lse, memory, WARM_UP + reps)[WARM_UP:]
        return {
            "rows": rows, "dim": DIM, "devices": list(devices), "bytes_a_step": exchange.merge.bytes_a_step,
            "exchange_us": spread(times), "merge_states_us": spread(merge_times),
        }  # fmt: skip


def _time_graphs(exchange: Exchange, graphs: list[Any], memory: Memory) -> float:
    """Microseconds a step, of the slowest rank."""
    cuda, streams, events = exchange._cupy.cuda, exchange.streams, []
    with exchange.on_device(0), streams[0]:
        memory.spin()
        gate = cuda.Event(disable_timing=True)
        gate.record(streams[0])
    for i, (graph, stream) in enumerate(zip(graphs, streams, strict=True)):
        with exchange.on_device(i):
            start, end = cuda.Event(), cuda.Event()
            stream.wait_event(gate)
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            events.append((start, end))
    for _, end in events:
        end.synchronize()
    return max(float(cuda.get_elapsed_time(*pair)) for pair in events) * 1e3 / STEPS


def _time_merges(cupy: Any, states: Any, out: Any, lse: Any, memory: Memory, reps: int) -> list[float]:
    stream, times = cupy.cuda.Stream(non_blocking=True), []
    with stream:
        stream.begin_capture()
        for _ in range(STEPS):
            pa.merge_states(*states, out=out, lse=lse)
        graph = stream.end_capture()
        for _ in range(reps):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            memory.spin()
            start.record()
            graph.launch(stream)
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / STEPS)
    return times
