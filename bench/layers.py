"""A decode step of a model: one plan, then append and decode in each of 32 layers, as one CUDA graph."""

from __future__ import annotations

from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import Case
from tests.gpu.capture import captured

from .check import Expected
from .session import Session
from .workload import Workload, kv_bytes, random_normal

LAYERS = 32
ALLOWED_US = 2.0  # of each layer, beside the read floor of its keys and values


def measure_layers(case: Case, session: Session) -> dict[str, Any]:
    """Microseconds of the step's graph; of the read floor of one layer; of a graph that reads each layer's pool."""
    import cupy

    layers = [Workload.build(case, cupy, combined=session.combined) for _ in range(LAYERS)]
    first, num_bytes = layers[0], kv_bytes(case)
    new_tokens = (2, case.batch_size, case.num_kv_heads, case.head_dim)
    k, v = random_normal(cupy, new_tokens, first.q.dtype, seed=2)
    requests = cupy.asarray(np.arange(case.batch_size, dtype=np.int32))
    slots = first.table.slots(requests, cupy.asarray(np.array(case.kv_lens, np.int32) - 1))
    outs = [cupy.empty_like(layer.q) for layer in layers]
    wrapper = pa.BatchDecodeWithPagedKVCache(
        max_batch_size=case.batch_size, max_pages=len(first.indices), batch_invariant=session.batch_invariant
    )

    def step() -> None:
        wrapper.plan(first.kv, first.table, case.num_qo_heads)
        for layer, out in zip(layers, outs, strict=True):
            pa.append(layer.kv, slots, k, v)
            wrapper.run(layer.q, layer.kv, out=out)

    def check() -> None:
        expected = Expected(first)  # all layers hold the same numbers, each in other memory
        for number, out in enumerate(outs):
            try:
                expected.check(out)
            except AssertionError as error:
                raise AssertionError(f"layer {number}: {error}") from error
            out.view(np.uint16).fill(0)

    step()
    check()
    graph = captured(step)
    graph.launch()
    check()
    reads = [session.stopwatch.read_floor(layer.storage, num_bytes) for layer in layers]

    def read_all() -> None:
        for read in reads:
            read()

    floors = captured(read_all)
    calls = {"read_floor_us": reads[0], "run_us": graph.launch, "reads_us": floors.launch}
    times = session.stopwatch.interleave(calls, session.reps)
    figures = {name: samples.summary() for name, samples in times.items()}
    wrapper.status()
    pa.status()
    median, floor = figures["run_us"]["median"], LAYERS * figures["read_floor_us"]["median"]
    return {
        "layers": LAYERS,
        "kv_mb": round(LAYERS * num_bytes / 1e6, 4),
        **figures,
        "floors_us": round(floor, 2),
        "ratio": round(median / floor, 4),
        "over_allowed": round((median - LAYERS * ALLOWED_US) / floor, 4),
    }
