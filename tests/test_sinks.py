"""Sinks in calls that tests/cases.py has no case for: plans, partial results, merges, JAX, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import paged_attn as pa
from tests.cases import SINKS, Case, assert_close, build

GPT_OSS = next(case for case in SINKS if case.name == "decode_sinks_window")


def test_sinks_are_one_more_state_without_values() -> None:
    inputs = build(GPT_OSS)
    arguments = inputs.q.astype(np.float32), pool32(inputs), inputs.table()
    out, lse = pa.decode(*arguments, sinks=inputs.sinks, return_lse=True, **inputs.options())
    plain, plain_lse = pa.decode(*arguments, return_lse=True, **inputs.options())
    state = np.zeros_like(plain), np.broadcast_to(inputs.sinks, plain_lse.shape)
    merged, merged_lse = pa.merge_state(plain, plain_lse, *state)
    assert_close(merged, out, merged_lse, lse, tolerance=1e-5)


def pool32(inputs) -> pa.PagedKV:
    pages = (pages.astype(np.float32) for pages in (inputs.k_pages, inputs.v_pages))
    return pa.PagedKV(*pages, layout=inputs.case.layout)


@pytest.mark.parametrize("base", ["e", 2])
def test_partial_results_take_their_sinks_when_they_are_merged(base) -> None:
    inputs = build(GPT_OSS)
    kv, table, q = pool32(inputs), inputs.table(), inputs.q.astype(np.float32)
    options = {"window_left": -1}
    out, lse = pa.decode(q, kv, table, sinks=inputs.sinks, return_lse=True, **options)
    chunks = 3
    parts, logs = pa.decode(np.tile(q, (chunks, 1, 1)), kv, table.split(chunks), return_lse=True, **options)
    logs = logs / np.float32(np.log(2) if base == 2 else 1)
    v, s = (x.reshape(chunks, len(q), *x.shape[1:]).swapaxes(0, 1) for x in (parts, logs))
    merged, log = pa.merge_states(v, s, base=base, sinks=inputs.sinks)
    assert_close(merged, out, log * np.float32(np.log(2) if base == 2 else 1), lse, tolerance=1e-5)
    none, no_log = pa.merge_states(v, np.full_like(s, -np.inf), base=base, sinks=inputs.sinks)
    assert not none.any()
    np.testing.assert_allclose(no_log, np.broadcast_to(inputs.sinks / (np.log(2) if base == 2 else 1), no_log.shape))


def test_a_split_table_and_sinks_do_not_go_together() -> None:
    inputs = build(GPT_OSS)
    chunks = inputs.table().split(2)
    q = np.tile(inputs.q, (2, 1, 1))
    written = pa.PageTable(
        *(np.zeros(n, np.int32) for n in (9, 99, 8)), page_size=16, page_offset=np.zeros(8, np.int32),
        total_len=np.zeros(8, np.int32),
    )  # fmt: skip
    for table in (chunks, inputs.table().split(2, out=chunks), inputs.table().split(2, out=written)):
        with pytest.raises(ValueError, match=r"sinks were given with a table that split\(\) made.*merge_states"):
            pa.decode(q, inputs.kv(), table, sinks=inputs.sinks)
        plan = pa.BatchDecodeWithPagedKVCache()
        plan.plan(inputs.kv(), table, 64)
        plan.run(q, inputs.kv())
        with pytest.raises(ValueError, match="sinks were given"):
            plan.run(q, inputs.kv(), sinks=inputs.sinks)
        plan.plan(inputs.kv(), inputs.table(), 64)
        plan.run(inputs.q, inputs.kv(), sinks=inputs.sinks)


def test_rows_past_the_batch_have_no_sink() -> None:
    """A request without keys has the sink alone; a row past the batch is 0 and -inf."""
    inputs = build(Case("sinks_rows", (20, 0), sinks=True))
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=4, max_pages=9)
    plan.plan(inputs.kv(), inputs.table(), 8)
    out, lse = plan.run(np.concatenate([inputs.q] * 2), inputs.kv(), sinks=inputs.sinks, return_lse=True)
    assert not out[1:].any()
    np.testing.assert_array_equal(lse[1], inputs.sinks)
    assert (lse[2:] == -np.inf).all()
    once, once_lse = pa.decode(inputs.q, inputs.kv(), inputs.table(), sinks=inputs.sinks, return_lse=True)
    np.testing.assert_array_equal(out[:2], once)
    np.testing.assert_array_equal(lse[:2], once_lse)
    plain, plain_lse = plan.run(inputs.q, inputs.kv(), return_lse=True)  # sinks are a run's
    assert (plain[0] != out[0]).any() and plain_lse[1, 0] == -np.inf
    np.testing.assert_array_equal(plain[0, 1], out[0, 1])  # its sink is -inf


@pytest.mark.parametrize("sink", [1e4, -1e4, np.inf])
def test_sinks_far_from_all_scores(sink: float) -> None:
    inputs = build(Case("sinks_far", (20, 0)))
    plain, plain_lse = pa.decode(inputs.q, inputs.kv(), inputs.table(), return_lse=True)
    sinks = np.full(8, sink, np.float32)
    out, lse = pa.decode(inputs.q, inputs.kv(), inputs.table(), sinks=sinks, return_lse=True)
    if sink < 0:
        np.testing.assert_array_equal(out, plain)
        np.testing.assert_array_equal(lse[0], plain_lse[0])
    else:
        assert not out.any() and (lse[0] == sink).all()
    assert (lse[1] == sink).all()


def test_single_calls_take_sinks() -> None:
    inputs = build(Case("sinks_single", (33,), q_lens=(4,), sinks=True))
    right, lse = pa.prefill(
        inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(), sinks=inputs.sinks, return_lse=True
    )
    k, v, options = inputs.k[0], inputs.v[0], {"layout": "NHD", "sinks": inputs.sinks, "return_lse": True}
    out, logs = pa.single_prefill(inputs.q, k, v, **options)
    assert_close(out, right, logs, lse, tolerance=1e-3)
    out, logs = pa.single_decode(inputs.q[-1], k, v, **options)
    assert_close(out, right[-1], logs, lse[-1], tolerance=1e-3)


def test_jax_arrays_are_sinks() -> None:
    inputs = build(Case("sinks_jax", (33, 4), sinks=True))
    right = pa.decode(inputs.q, inputs.kv(), inputs.table(), sinks=inputs.sinks)
    out = pa.decode(jnp.asarray(inputs.q), inputs.kv(), inputs.table(), sinks=jnp.asarray(inputs.sinks))
    np.testing.assert_array_equal(out, right)


def test_v_has_a_dim_of_its_own_in_a_cache() -> None:
    """Appended, forked and copied pages of K and V of different sizes, in both layouts."""
    rng = np.random.default_rng(0)
    for layout in ("NHD", "HND"):
        cache = pa.PagedKVCache(
            12, 4, 2, 192, layout=layout, dtype="float32", v_head_dim=128, num_layers=2, device="cpu"
        )
        assert (cache.layers[0].head_dim, cache.layers[0].v_head_dim) == (192, 128)
        assert "v_head_dim=128" in repr(cache.layers[0])
        k, v = rng.standard_normal((10, 2, 192), np.float32), rng.standard_normal((10, 2, 128), np.float32)
        a = cache.new_sequence()
        slots = cache.reserve([a], 9)
        for layer in range(2):
            cache.write(slots, k[:9], v[:9] + layer, layer=layer)
        b = cache.fork(a)
        slots = cache.reserve([b], 1)  # copies the last page
        for layer in range(2):
            cache.write(slots, k[9:], v[9:] + layer, layer=layer)
        q = rng.standard_normal((1, 4, 192), np.float32)
        for seq, length in ((a, 9), (b, 10)):
            for layer in range(2):
                out = pa.decode(q, cache.layers[layer], cache.page_table([seq]))
                right = pa.single_decode(q[0], k[:length], v[:length] + layer, layout="NHD")
                assert out.shape == (1, 4, 128)
                np.testing.assert_allclose(out[0], right, rtol=1e-5, atol=1e-6)
