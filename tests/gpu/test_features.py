"""Sinks, dims of V and ranks on a card: tests/features.py, CUDA graphs, JAX."""

from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases, child
from tests.gpu.answers import on_gpu
from tests.gpu.capture import captured

cupy = pytest.importorskip("cupy")

CASE = cases.Case("gpt_oss", (300, 0, 1, 129), num_qo_heads=64, num_kv_heads=8, dtype="bfloat16", window_left=127)


def test_features() -> None:
    assert child.run("tests.features", "gpu", seconds=600) == {}


def right(inputs: cases.Inputs, sinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.empty(inputs.q.shape, np.float32)
    options: dict[str, Any] = {"out": out, "sinks": sinks, "return_lse": True}
    return pa.decode(inputs.q, inputs.kv(), inputs.table(), **options, **inputs.options())


def some_sinks(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(1, 2, CASE.num_qo_heads).astype(np.float32)


def assert_right(inputs: cases.Inputs, sinks: np.ndarray, out: Any, lse: Any) -> None:
    tolerances = {"tolerance": cases.OUT_TOLERANCE[CASE.dtype], "lse_tolerance": cases.LSE_TOLERANCE}
    expected, expected_lse = right(inputs, sinks)
    cases.assert_close(out.get(), expected, lse.get(), expected_lse, **tolerances)


def test_a_graph_reads_the_sinks_anew() -> None:
    """A graph of a plan and a run, replayed with other sinks in the same array, which padding rows never get."""
    inputs = cases.build(CASE)
    kv, table, q = inputs.kv(on_gpu), inputs.table(on_gpu), on_gpu(np.concatenate([inputs.q] * 2))
    sinks, out = on_gpu(some_sinks(0)), cupy.empty(q.shape, q.dtype)
    lse = cupy.empty(q.shape[:-1], np.float32)
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=len(q), max_pages=inputs.indices.size)

    def step() -> None:
        plan.plan(kv, table, CASE.num_qo_heads, **inputs.options())
        plan.run(q, kv, sinks=sinks, out=out, lse=lse)

    step()
    graph = captured(step)
    rows = len(inputs.q)
    for seed in (1, 2):
        sinks.set(some_sinks(seed))
        out.fill(np.nan)
        cupy.cuda.Device().synchronize()
        graph.launch()
        cupy.cuda.Device().synchronize()
        assert_right(inputs, some_sinks(seed), out[:rows], lse[:rows])
        assert (out[rows:] == 0).all() and (lse[rows:] == -np.inf).all()


def test_sinks_of_jax(gpu: Any) -> None:
    jax = pytest.importorskip("jax")
    inputs, sinks = cases.build(CASE), some_sinks(3)

    def to_jax(array: np.ndarray) -> Any:
        return jax.device_put(array, gpu)

    options = {"return_lse": True, **inputs.options()}
    out, lse = pa.decode(to_jax(inputs.q), inputs.kv(to_jax), inputs.table(to_jax), sinks=to_jax(sinks), **options)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    found, found_lse = pa.decode(
        on_gpu(inputs.q), inputs.kv(on_gpu), inputs.table(on_gpu), sinks=on_gpu(sinks), **options
    )
    assert np.asarray(out).tobytes() == found.get().tobytes()
    assert np.asarray(lse).tobytes() == found_lse.get().tobytes()
    assert_right(inputs, sinks, found, found_lse)
