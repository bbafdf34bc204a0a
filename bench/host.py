"""What a step costs the host, and the eager wall time of a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import BENCH_DECODE, BENCH_PREFILL, Case

from .session import Session
from .timing import no_garbage_collection, spread
from .workload import Workload, random_normal, to_host

WARM_UP_CALLS = 20
CALLS_IN_FLIGHT = 16  # between two synchronisations: a full queue would make the host wait
BATCH_SIZE, KV_LEN = 256, 4096
LAYERS = 32


@dataclass(frozen=True)
class HostCall:
    """A call to be timed on the host: `prepare` gives it by the functions of a library, with all arrays bound."""

    name: str
    prepare: Callable[[Any], Callable[[], object]]

    def __str__(self) -> str:
        return self.name

    def times(self, calls: int) -> list[float]:
        """Microseconds of so many calls."""
        return host_times(self.prepare(pa), calls)


@dataclass(frozen=True)
class Probe:
    """One thing of several calls to be timed on the host."""

    name: str
    times: Callable[[int], list[float]]  # microseconds of so many repetitions

    def __str__(self) -> str:
        return self.name


def measure_host(probe: HostCall | Probe, session: Session) -> dict[str, Any]:
    """Microseconds on the host."""
    return {"host_us": spread(probe.times(10 * session.reps))}


def host_times(call: Callable[[], object], calls: int) -> list[float]:
    """Microseconds until each of some calls returned, while the device is not waited for."""
    import cupy

    for _ in range(WARM_UP_CALLS):
        call()
    times = []
    with no_garbage_collection():
        for i in range(calls):
            if i % CALLS_IN_FLIGHT == 0:
                cupy.cuda.get_current_stream().synchronize()
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e6)
    return times


@lru_cache(maxsize=1)
def _workload(cases: tuple[Case, ...], name: str) -> Workload:
    """The arrays of a case, which calls of one kind share, and the two checkouts of a comparison."""
    import cupy

    return Workload.build(next(case for case in cases if case.name == name), cupy)


def _decode(library: Any, *, part: str, host_table: bool = False) -> Callable[[], object]:
    """part: "run" or "plan" of a plan, or the "one-shot" function."""
    workload = _workload(BENCH_DECODE, "bs64_2k_g4")
    kv, table = workload.of(library)
    if host_table:
        table = library.PageTable(**workload.on_host())
    if part == "one-shot":
        return partial(library.decode, workload.q, kv, table)
    attention, heads = library.BatchDecodeWithPagedKVCache(), workload.case.num_qo_heads
    plan = partial(attention.plan, kv, table, heads)
    plan()
    out = attention.run(workload.q, kv)
    return partial(attention.run, workload.q, kv, out=out) if part == "run" else plan


def _prefill(library: Any, *, part: str) -> Callable[[], object]:
    """part: "run" or "plan" of a plan, or the "one-shot" function with metadata of the host."""
    workload = _workload(BENCH_PREFILL, "64x128_on_2048")
    kv, table = workload.of(library)
    if part == "one-shot":
        table = library.PageTable(**workload.on_host())
        return partial(library.prefill, workload.q, to_host(workload.qo_indptr), kv, table)
    attention, heads = library.BatchPrefillWithPagedKVCache(), workload.case.num_qo_heads
    plan = partial(attention.plan, kv, table, workload.qo_indptr, heads)
    plan()
    out = attention.run(workload.q, kv)
    return partial(attention.run, workload.q, kv, out=out) if part == "run" else plan


def _append(library: Any) -> Callable[[], object]:
    """64 tokens of one sequence."""
    import cupy

    cache = library.PagedKVCache(64, 16, num_kv_heads=8, head_dim=128, layout="NHD", dtype="float16", device="cuda")
    slots = cache.reserve([cache.new_sequence()], 64)
    k, v = random_normal(cupy, (2, 64, 8, 128), np.dtype(np.float16), 0)
    return partial(library.append, cache.layers[0], slots, k, v)


def _cache(calls: int, *, reserve: bool, page_table: bool, ragged: bool = False) -> list[float]:
    """Steps of 256 sequences of 4096 tokens and more; the pool is narrow, which the host does not notice.

    All take a page in the same step, every 16th; `ragged`: about 16 take one in each.
    """
    steps = WARM_UP_CALLS + calls
    pages = BATCH_SIZE * -(-(KV_LEN + 16 + steps) // 16)
    cache = pa.PagedKVCache(pages, 16, num_kv_heads=1, head_dim=16, layout="NHD", dtype="float16", device="cuda")
    sequences = np.array([cache.new_sequence() for _ in range(BATCH_SIZE)])
    cache.reserve(sequences, KV_LEN + np.arange(BATCH_SIZE) % 16 if ragged else KV_LEN)
    cache.page_table(sequences)

    def step() -> None:
        if reserve:
            cache.reserve(sequences, 1)
        if page_table:
            cache.page_table(sequences)

    return host_times(step, calls)


def _eager_layer(calls: int, *, per_step: bool = False) -> list[float]:
    """Wall time, device included, of append and decode in each of 32 layers; per_step: reserve, table and plan too."""
    import cupy

    case = next(case for case in BENCH_DECODE if case.name == "bs1_4k_g4")
    steps = calls // 10
    cache = pa.PagedKVCache(
        -(-(case.kv_lens[0] + steps + WARM_UP_CALLS) // 16), 16, case.num_kv_heads, case.head_dim,
        layout="NHD", dtype=case.dtype, num_layers=LAYERS, device="cuda",
    )  # fmt: skip
    sequences = np.array([cache.new_sequence()])
    cache.reserve(sequences, case.kv_lens[0])
    dtype = np.dtype(case.dtype)
    q = random_normal(cupy, (1, case.num_qo_heads, case.head_dim), dtype, 0)
    k, v = random_normal(cupy, (2, 1, case.num_kv_heads, case.head_dim), dtype, 1)
    attention, out, stream = pa.BatchDecodeWithPagedKVCache(), cupy.empty_like(q), cupy.cuda.get_current_stream()

    def marks() -> Iterator[float]:
        """When a step begins, when its layers begin, when they are over on the device."""
        stream.synchronize()
        yield time.perf_counter()
        slots = cache.reserve(sequences, 1)
        attention.plan(cache.layers[0], cache.page_table(sequences), case.num_qo_heads)
        if not per_step:
            stream.synchronize()
        yield time.perf_counter()
        for layer, kv in enumerate(cache.layers):
            cache.write(slots, k, v, layer=layer)
            attention.run(q, kv, out=out)
        stream.synchronize()
        yield time.perf_counter()

    times = []
    with no_garbage_collection():
        for _ in range(WARM_UP_CALLS + steps):
            step_began, layers_began, ended = marks()
            times.append((ended - (step_began if per_step else layers_began)) * 1e6 / LAYERS)
    attention.status()
    return times[WARM_UP_CALLS:]


HOST_CALLS = (
    HostCall("decode run()", partial(_decode, part="run")),
    HostCall("decode plan(), device table", partial(_decode, part="plan")),
    HostCall("decode plan(), NumPy table", partial(_decode, part="plan", host_table=True)),
    HostCall("decode(), device table", partial(_decode, part="one-shot")),
    HostCall("decode(), NumPy table", partial(_decode, part="one-shot", host_table=True)),
    HostCall("prefill run()", partial(_prefill, part="run")),
    HostCall("prefill plan(), device table", partial(_prefill, part="plan")),
    HostCall("prefill(), NumPy table", partial(_prefill, part="one-shot")),
    HostCall("append()", _append),
)
HOST = (
    *HOST_CALLS,
    Probe("reserve(), 256 x 4k", lambda calls: _cache(calls, reserve=True, page_table=False)),
    Probe("page_table(), 256 x 4k", lambda calls: _cache(calls, reserve=False, page_table=True)),
    Probe("reserve() + page_table(), 256 x 4k", lambda calls: _cache(calls, reserve=True, page_table=True)),
    Probe("the same, ragged", lambda calls: _cache(calls, reserve=True, page_table=True, ragged=True)),
    Probe("a layer of append + decode, bs1_4k, wall", _eager_layer),
    Probe("the same with a 32nd of reserve + table + plan", lambda calls: _eager_layer(calls, per_step=True)),
)
