"""Decode and prefill of one case: check, then time beside the read floor and the peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import paged_attn as pa
from tests.cases import Case

from .check import Expected
from .session import Session
from .workload import Workload, causal_flops, kv_bytes


def measure_decode(case: Case, session: Session) -> dict[str, Any]:
    """Microseconds of run() and of two floors: the fastest plain kernel that reads as many contiguous bytes as the keys
    and values seen have, and the fastest that reads their pages in the order of the table."""
    import cupy

    workload = Workload.build(case, cupy, combined=session.combined)
    plan = pa.BatchDecodeWithPagedKVCache(batch_invariant=session.batch_invariant)
    plan.plan(workload.kv, workload.table, case.num_qo_heads, q_len=case.q_len, window_left=case.window_left)
    q = workload.q if case.q_len == 1 else workload.q.reshape(case.batch_size, case.q_len, *workload.q.shape[1:])
    return _measure("decode", workload, plan, q, session)


def measure_prefill(case: Case, session: Session) -> dict[str, Any]:
    """Microseconds and TFLOP/s of a causal run(), and the read floor of its keys and values."""
    import cupy

    workload = Workload.build(case, cupy, combined=session.combined)
    plan = pa.BatchPrefillWithPagedKVCache(batch_invariant=session.batch_invariant)
    plan.plan(
        workload.kv, workload.table, workload.qo_indptr, case.num_qo_heads, causal=True, window_left=case.window_left
    )
    return _measure("prefill", workload, plan, workload.q, session)


def _measure(operation: str, workload: Workload, plan: Any, q: Any, session: Session) -> dict[str, Any]:
    case, expected = workload.case, Expected(workload)
    out, lse = plan.run(q, workload.kv, return_lse=True)
    rows = (-1, case.num_qo_heads)
    expected.check(out.reshape(*rows, case.head_dim), lse.reshape(rows))
    run = partial(plan.run, q, workload.kv, out=out, lse=lse if session.with_lse else None)
    calls: dict[str, Callable[[], Any]] = {
        "read_floor_us": session.stopwatch.read_floor(workload.storage, kv_bytes(case)),
        "run_us": run,
    }
    if operation == "decode" and case.window_left < 0:  # every page is read: what do plain loads of pages take?
        pieces, piece_bytes = workload.pieces()
        calls["page_floor_us"] = session.stopwatch.read_floor(
            workload.storage, pieces.size * piece_bytes, pieces, piece_bytes
        )
    figures = session.measure(operation, workload, expected.check, calls)
    plan.status()
    median, flops = figures["run_us"]["median"], causal_flops(case)
    return {
        "kv_mb": round(kv_bytes(case) / 1e6, 4),
        "gflop": round(flops / 1e9, 6),
        **figures,
        "ratio": round(median / figures["read_floor_us"]["median"], 4),
        "tflops": round(flops / median / 1e6, 1),
    }
