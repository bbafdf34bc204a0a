"""Decode and prefill of one case: check, then time beside the read floor and the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import paged_attn as pa
from tests.cases import Case

from .check import Expected
from .session import Session
from .workload import Workload, causal_flops, kv_bytes

BOUND_FLOORS, BOUND_US = 1.5, 8.0  # no point of the grid is to take longer than so many read floors and microseconds


@dataclass(frozen=True)
class Call:
    """The plan and the run of one library on a workload, whose result was right."""

    plan: Callable[[], None]  # once a step
    run: Callable[[], Any]  # once a layer
    status: Callable[[], None]

    @classmethod
    def build(cls, workload: Workload, expected: Expected, session: Session, library: Any = pa) -> Call:
        """library: this package, or that of another checkout."""
        case, q, (kv, table) = workload.case, workload.q, workload.of(library)
        heads, options = case.num_qo_heads, {"window_left": case.window_left}
        if case.is_decode:
            wrapper = library.BatchDecodeWithPagedKVCache(batch_invariant=session.batch_invariant)
            plan = partial(wrapper.plan, kv, table, heads, q_len=case.q_len, **options)
            q = q if case.q_len == 1 else q.reshape(case.batch_size, case.q_len, *q.shape[1:])
        else:
            wrapper = library.BatchPrefillWithPagedKVCache(batch_invariant=session.batch_invariant)
            plan = partial(wrapper.plan, kv, table, workload.qo_indptr, heads, **options)
        plan()
        run = partial(wrapper.run, q, kv, **({"sinks": workload.sinks} if case.sinks else {}))
        out, lse = run(return_lse=True)
        expected.check(out.reshape(-1, heads, case.head_dim), lse.reshape(-1, heads))
        run = partial(run, out=out, lse=lse if session.with_lse else None)
        return cls(plan, run, wrapper.status)


def measure(case: Case, session: Session) -> dict[str, Any]:
    """Microseconds of run(), of plan(), and of the fastest plain kernel that reads as many contiguous bytes as the keys
    and values seen have.

    Decode without a window has a second floor: plain loads of the pages, in the order of the table. Where the session
    is not plain, or the case has sinks, the run() of a plain session without sinks is timed in turns with its own.
    """
    import cupy

    workload, stopwatch = Workload.build(case, cupy, combined=session.combined), session.stopwatch
    expected = Expected(workload)
    call = Call.build(workload, expected, session)
    calls: dict[str, Callable[[], Any]] = {
        "read_floor_us": stopwatch.read_floor(workload.storage, kv_bytes(case)),
        "run_us": call.run,
        "plan_us": call.plan,
    }
    if case.is_decode and case.window_left < 0:
        pieces, piece_bytes = workload.pieces()
        num_bytes = pieces.size * piece_bytes
        calls["page_floor_us"] = stopwatch.read_floor(workload.storage, num_bytes, pieces, piece_bytes)
    if session != session.plain or case.sinks:
        plain = (Workload.build(case, cupy) if session.combined else workload).without_sinks
        calls["plain_us"] = Call.build(plain, Expected(plain), session.plain).run
    figures = session.measure("decode" if case.is_decode else "prefill", workload, expected.check, calls)
    call.status()
    median, flops = figures["run_us"]["median"], causal_flops(case)
    found = {
        "kv_mb": round(kv_bytes(case) / 1e6, 4),
        "gflop": round(flops / 1e9, 6),
        **figures,
        "ratio": round(median / figures["read_floor_us"]["median"], 4),
        "tflops": round(flops / median / 1e6, 1),
    }
    return found | ({"over_plain": round(median / figures["plain_us"]["median"], 4)} if "plain_us" in figures else {})


def measure_point(case: Case, session: Session) -> dict[str, Any]:
    """Microseconds of run() and of reading as many bytes, as one of many points: both with little effort."""
    import cupy

    workload = Workload.build(case, cupy, combined=session.combined)
    expected = Expected(workload)
    call = Call.build(workload, expected, session)
    floor = session.stopwatch.read_floor(workload.storage, kv_bytes(case), coarse=True)
    calls = {"read_floor_us": floor, "run_us": call.run}
    figures = session.measure("decode", workload, expected.check, calls)
    call.status()
    median, floor_us = figures["run_us"]["median"], figures["read_floor_us"]["median"]
    return {
        "kv_mb": round(kv_bytes(case) / 1e6, 4),
        **figures,
        "ratio": round(median / floor_us, 4),
        "over_bound": round(median / (BOUND_FLOORS * floor_us + BOUND_US), 4),
    }
