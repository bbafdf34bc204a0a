"""The contract of plan and run: what is copied, capacities, what must agree, and in which library results come back."""

import itertools
import threading
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_attn as pa
from paged_attn.backends import reference
from paged_attn.card import A100, H100, Card
from paged_attn.splits import decode_grid, decode_items, decode_splits
from tests.cases import Case, Inputs, build
from tests.specs import decode_recipe

DECODE_CASE = Case("plan_decode", (40, 0, 1, 17), page_offsets=(1, 0, 0, 2), total_lens=(60, 0, 1, 49))
PREFILL_CASE = replace(DECODE_CASE, name="plan_prefill", q_lens=(5, 2, 0, 17))


def planned(inputs: Inputs, **capacities: Any) -> Any:
    case = inputs.case
    if case.is_decode:
        plan = pa.BatchDecodeWithPagedKVCache(**capacities)
        plan.plan(inputs.kv(), inputs.table(), case.num_qo_heads, q_len=case.q_len, **inputs.options())
    else:
        plan = pa.BatchPrefillWithPagedKVCache(**capacities)
        plan.plan(inputs.kv(), inputs.table(), inputs.qo_indptr, case.num_qo_heads, **inputs.options())
    return plan


def once(inputs: Inputs, q: Any = None, **options: Any) -> Any:
    q, options = inputs.q if q is None else q, inputs.options() | options
    if inputs.case.is_decode:
        return pa.decode(q, inputs.kv(), inputs.table(), **options)
    return pa.prefill(q, inputs.qo_indptr, inputs.kv(), inputs.table(), **options)


def assert_same(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


# -- a plan keeps what it was given ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [DECODE_CASE, replace(DECODE_CASE, name="plan_q_len", q_len=3), PREFILL_CASE], ids=str)
def test_plan_copies_the_metadata(case: Case) -> None:
    inputs = build(case)
    expected = once(inputs, return_lse=True)
    plan = planned(inputs)
    for name in ("indptr", "indices", "last_page_len", "page_offset", "total_len", "qo_indptr"):
        getattr(inputs, name)[...] = 1
    for _ in range(2):
        assert_same(plan.run(inputs.q, inputs.kv(), return_lse=True), expected)


def test_a_plan_serves_every_layer_and_every_step() -> None:
    inputs = build(PREFILL_CASE)
    plan = planned(inputs)
    layers = [inputs.kv(), pa.PagedKV(inputs.v_pages, inputs.k_pages, layout="NHD")]
    for kv in layers:
        expected = pa.prefill(inputs.q, inputs.qo_indptr, kv, inputs.table())
        np.testing.assert_array_equal(plan.run(inputs.q, kv), expected)
    for kv_lens, q_lens in (((3,), (3,)), ((100, 90, 80, 70, 60, 50), (1, 2, 3, 4, 5, 6))):  # shrink, then grow
        step = build(Case("step", kv_lens, q_lens=q_lens))
        plan.plan(step.kv(), step.table(), step.qo_indptr, 8)
        assert_same(plan.run(step.q, step.kv(), return_lse=True), once(step, return_lse=True))


def test_a_request_gives_the_same_bits_alone_and_in_any_batch() -> None:
    batch = build(Case("invariant", (33, 100, 7), q_lens=(3, 20, 7)))
    out = once(batch)
    for request in range(3):
        pages, rows = (slice(*indptr[request : request + 2]) for indptr in (batch.indptr, batch.qo_indptr))
        table = pa.PageTable(
            np.array([0, pages.stop - pages.start], np.int32),
            batch.indices[pages],
            batch.last_page_len[request : request + 1],
            page_size=16,
        )
        indptr = np.array([0, rows.stop - rows.start], np.int32)
        np.testing.assert_array_equal(pa.prefill(batch.q[rows], indptr, batch.kv(), table), out[rows])


def test_run_before_plan_says_so() -> None:
    inputs = build(DECODE_CASE)
    with pytest.raises(RuntimeError, match=r"call plan\(kv, table, \.\.\.\)"):
        pa.BatchDecodeWithPagedKVCache().run(inputs.q, inputs.kv())


# -- capacities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len", [1, 3])
def test_decode_rows_past_the_batch_are_empty(q_len: int) -> None:
    inputs = build(replace(DECODE_CASE, name=f"capacity{q_len}", q_len=q_len))
    plan = planned(inputs, max_batch_size=6, max_pages=20)
    expected = once(inputs, return_lse=True)
    assert_same(plan.run(inputs.q, inputs.kv(), return_lse=True), expected)
    padded = np.concatenate([inputs.q, np.full_like(inputs.q[:2], np.nan)])
    out, lse = np.full_like(padded, np.nan), np.full(padded.shape[:-1], np.nan, np.float32)
    plan.run(padded, inputs.kv(), out=out, lse=lse)
    assert_same((out[:4], lse[:4]), expected)
    assert not out[4:].any() and np.isneginf(lse[4:]).all()
    with pytest.raises(ValueError, match=r"q must have shape \[4 or 6, .*q\.shape=\(5, "):
        plan.run(padded[:5], inputs.kv())


def test_prefill_rows_past_the_batch_are_empty() -> None:
    inputs = build(PREFILL_CASE)
    plan = planned(inputs, max_batch_size=4, max_pages=6, max_tokens=30)
    expected = once(inputs, return_lse=True)
    padded = np.concatenate([inputs.q, np.full_like(inputs.q[:6], np.nan)])
    out, lse = plan.run(padded, inputs.kv(), return_lse=True)
    assert_same((out[:24], lse[:24]), expected)
    assert not out[24:].any() and np.isneginf(lse[24:]).all()
    with pytest.raises(ValueError, match=r"q must have shape \[24 or 30, .*q\.shape=\(29, "):
        plan.run(padded[:29], inputs.kv())


@pytest.mark.parametrize("capacity", [{"max_batch_size": 3}, {"max_pages": 5}, {"max_tokens": 23}], ids=str)
def test_a_step_over_capacity_is_refused_and_the_step_before_stays(capacity: dict[str, int]) -> None:
    ((name, limit),) = capacity.items()
    small, large = build(Case("small", (20,), q_lens=(2,))), build(PREFILL_CASE)
    plan = planned(small, **capacity)
    with pytest.raises(pa.PageTableError, match=rf"{name}={limit + 1}.*{name}={limit};.*larger {name}"):
        plan.plan(large.kv(), large.table(), large.qo_indptr, 8)
    np.testing.assert_array_equal(plan.run(small.q, small.kv()), once(small))


@pytest.mark.parametrize("q_lens", [None, (2, 3)])
def test_max_pages_counts_from_the_first_page_of_the_step(q_lens: tuple[int, ...] | None) -> None:
    """A table whose indptr does not begin at 0: the pages of all its requests together."""
    inputs = build(Case("first_page", (40, 20), q_lens=q_lens))
    used = inputs.indices[: inputs.indptr[-1]]
    behind = pa.PageTable(
        inputs.indptr + np.int32(100),
        np.concatenate([np.full(100, -7, np.int32), used]),
        inputs.last_page_len,
        page_size=inputs.case.page_size,
    )
    kind = pa.BatchDecodeWithPagedKVCache if q_lens is None else pa.BatchPrefillWithPagedKVCache
    arguments = (inputs.kv(), behind, *([] if q_lens is None else [inputs.qo_indptr]), 8)
    plan = kind(max_pages=used.size)
    plan.plan(*arguments)
    np.testing.assert_array_equal(plan.run(inputs.q, inputs.kv()), once(inputs))
    with pytest.raises(pa.PageTableError, match=f"needs max_pages={used.size}, .*max_pages={used.size - 1};"):
        kind(max_pages=used.size - 1).plan(*arguments)


def test_a_plan_that_fails_leaves_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the backend raises: spec, rows and table of the step before stay, also when there was none."""
    small, large = build(replace(DECODE_CASE, name="before", window_left=5)), build(replace(DECODE_CASE, name="after"))
    plan = planned(small, max_pages=30)
    never = pa.BatchDecodeWithPagedKVCache()
    with monkeypatch.context() as patch:
        patch.setattr(reference, "seq_lens", lambda table: (_ for _ in ()).throw(MemoryError("no memory")))
        for failing in (plan, never):
            with pytest.raises(MemoryError):
                failing.plan(large.kv(), large.table(), 16)
    np.testing.assert_array_equal(plan.run(small.q, small.kv()), once(small))
    with pytest.raises(RuntimeError, match=r"run\(\) was called before plan"):
        never.run(small.q, small.kv())


def test_an_array_for_a_number_is_refused_after_a_good_plan_too() -> None:
    """Also one of no axis, which is a number: it is taken, and read again when it has changed."""
    inputs = build(DECODE_CASE)
    plan = planned(inputs)
    heads, scale = np.array(8), np.array(0.5)
    for value in (np.array([8, 8]), np.array([8])):
        for good in (8, np.int64(8), heads):
            plan.plan(inputs.kv(), inputs.table(), good, sm_scale=scale if good is heads else 0.5)
            with pytest.raises(TypeError, match=r"num_qo_heads must be an int, got an array of shape .*pass an int"):
                plan.plan(inputs.kv(), inputs.table(), value)
            with pytest.raises(TypeError, match=r"sm_scale must be a float, got an array of shape .*pass a float"):
                plan.plan(inputs.kv(), inputs.table(), 8, sm_scale=value)
    np.testing.assert_array_equal(plan.run(inputs.q, inputs.kv()), once(inputs, sm_scale=0.5))
    scale[...] = 0.25
    plan.plan(inputs.kv(), inputs.table(), heads, sm_scale=scale)
    np.testing.assert_array_equal(plan.run(inputs.q, inputs.kv()), once(inputs, sm_scale=0.25))


def test_slots_are_of_64_or_32_bits() -> None:
    """Those that a jitted function returns are int32 while jax_enable_x64 is off."""
    tokens = np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float16)
    pools = []
    for make in (np.array, lambda x: np.array(x, np.int32), jnp.array):
        pages = np.zeros((2, 3, 4, 2, 16), np.float16)
        slots = make([5, -1, 11])
        assert slots.dtype == (np.int64 if make is np.array else np.int32)
        pa.append(pa.PagedKV(*pages, layout="NHD"), slots, tokens, tokens)
        cache = pa.PagedKVCache(3, 4, 2, 16, layout="NHD", dtype="float16", device="cpu")
        cache.write(slots, tokens, tokens)
        np.testing.assert_array_equal(cache.layers[0].k_pages, pages[0])
        pools.append(pages)
        for slot in (12, -2):
            with pytest.raises(pa.PageTableError, match=rf"slots\[0\] = {slot} .*pass slots in \[0, 12\), or -1"):
                pa.append(pa.PagedKV(*pages, layout="NHD"), make([slot, 0, 0]), tokens, tokens)
    assert (pools[0] == pools[1]).all() and (pools[0] == pools[2]).all() and pools[0].any()


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_capacity_is_a_positive_int(value: Any, error: type) -> None:
    for name in ("max_batch_size", "max_pages", "max_tokens"):
        with pytest.raises(error, match=name):
            pa.BatchPrefillWithPagedKVCache(**{name: value})


# -- what must agree ---------------------------------------------------------------------------------------------------


def mistagged(inputs: Inputs) -> pa.PagedKV:
    """The pool under the tag that it does not have."""
    return pa.PagedKV(inputs.k_pages, inputs.v_pages, layout="HND" if inputs.case.layout == "NHD" else "NHD")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_layout_that_hangs_others_is_refused(layout: str) -> None:
    case = Case(
        "wrong_layout", (512, 512), num_qo_heads=64, num_kv_heads=8, head_dim=128, page_size=32, layout=layout
    )  # fmt: skip
    inputs = build(case)
    wrong = mistagged(inputs)
    plan = planned(inputs)
    for _ in range(50):  # as in a timing loop
        with pytest.raises(
            pa.LayoutMismatchError, match=f"page_size=8 .*page_size=32; .*tag the pool layout='{layout}'"
        ):
            pa.decode(inputs.q, wrong, inputs.table())
        with pytest.raises(pa.LayoutMismatchError, match=f"tag the pool layout='{layout}'"):
            plan.plan(wrong, inputs.table(), 64)
        with pytest.raises(pa.LayoutMismatchError, match=f"plan was made for {layout}"):
            plan.run(inputs.q, wrong)
    np.testing.assert_array_equal(plan.run(inputs.q, inputs.kv()), once(inputs))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_where_shapes_agree_the_tags_decide(layout: str) -> None:
    inputs = build(Case("same_shape", (20, 8), num_qo_heads=8, num_kv_heads=8, page_size=8, layout=layout))
    other = mistagged(inputs)
    assert inputs.kv().k_pages.shape == other.k_pages.shape
    for plan, q in (
        (planned(inputs), inputs.q),
        (planned(replace(inputs, case=replace(inputs.case, q_lens=(1, 1)))), inputs.q),
    ):
        with pytest.raises(pa.LayoutMismatchError, match=f"kv has layout {other.layout}.*plan was made for {layout}"):
            plan.run(q, other)


def test_the_same_cache_in_the_other_layout_gives_the_same_result() -> None:
    inputs = build(PREFILL_CASE)
    kv = inputs.kv().to_layout("HND")
    out = pa.prefill(inputs.q, inputs.qo_indptr, kv, inputs.table())
    np.testing.assert_array_equal(out, once(inputs))


Q = np.zeros((4, 8, 64), np.float16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[:3]}, ValueError, r"q must have shape \[4, 8, 64\].*\(3, 8, 64\)"),
        ({"q": Q[:, :4]}, ValueError, r"q must have shape \[4, 8, 64\].*\(4, 4, 64\)"),
        ({"q": Q[..., :32]}, ValueError, r"q must have shape \[4, 8, 64\].*\(4, 8, 32\)"),
        ({"q": Q[0]}, ValueError, r"q must have shape .*q\.shape=\(8, 64\)"),
        ({"q": np.zeros((4, 2, 8, 64), np.float16)}, ValueError, r"\[4, 1, 8, 64\].*\(4, 2, 8, 64\)"),
        ({"q": Q.astype(np.float32)}, TypeError, r"q must be float16.*got float32.*q\.astype"),
        ({"q": Q.tolist()}, TypeError, "q must be an array.*list"),
        ({"out": np.zeros((4, 8, 32), np.float16)}, ValueError, r"out must have shape \[4, 8, 64\].*\(4, 8, 32\)"),
        ({"out": np.zeros(Q.shape, np.float64)}, TypeError, "out must be float16 or float32, got float64"),
        ({"out": jnp.zeros(Q.shape, jnp.float16)}, ValueError, "out is a JAX array, which is immutable"),
        ({"out": np.broadcast_to(np.float16(0), Q.shape)}, ValueError, "out is a read-only NumPy array"),
        ({"lse": np.zeros((4, 8), np.float16)}, TypeError, "lse must be float32, got float16"),
        ({"lse": np.zeros(4, np.float32)}, ValueError, r"lse must have 2 axes.*\(4,\)"),
        ({"kv": np.zeros((9, 16, 2, 64), np.float16)}, TypeError, "kv must be a PagedKV, got ndarray"),
        (
            {"kv": pa.PagedKV(*np.zeros((2, 9, 8, 2, 64), np.float16), layout="NHD")},
            pa.LayoutMismatchError,
            "kv has page_size=8 .*page_size=16",
        ),
        (
            {"kv": pa.PagedKV(*np.zeros((2, 9, 16, 4, 64), np.float16), layout="NHD")},
            pa.LayoutMismatchError,
            "kv has num_kv_heads=4 .*num_kv_heads=2",
        ),
        (
            {"kv": pa.PagedKV(*np.zeros((2, 9, 16, 2, 32), np.float16), layout="NHD")},
            ValueError,
            "kv has head_dim=32 .*64",
        ),
        (
            {"kv": pa.PagedKV(*np.zeros((2, 1, 16, 2, 64), np.float16), layout="NHD")},
            ValueError,
            "num_pages=1 .*at least 9",
        ),
        ({"kv": pa.PagedKV(*np.zeros((2, 9, 16, 2, 64)), layout="NHD")}, TypeError, "kv is float64 .*float16"),
    ],
)
@pytest.mark.parametrize("ran_before", [False, True])
def test_run_refuses_what_the_plan_was_not_made_for(
    change: dict[str, Any], error: type, message: str, ran_before: bool
) -> None:
    inputs = build(DECODE_CASE)
    assert inputs.k_pages.shape[0] == 9
    plan = planned(inputs)
    if ran_before:
        plan.run(inputs.q, inputs.kv(), return_lse=True)
        plan.run(inputs.q, inputs.kv(), out=inputs.q.copy(), lse=np.empty(inputs.q.shape[:2], np.float32))
    out, lse = np.full_like(inputs.q, 7), np.full(inputs.q.shape[:2], 7, np.float32)
    with pytest.raises(error, match=message):
        plan.run(**({"q": inputs.q, "kv": inputs.kv(), "out": out, "lse": lse} | change))
    assert (out == 7).all() and (lse == 7).all()


def test_arrays_that_were_right_are_wrong_for_another_plan() -> None:
    inputs = build(DECODE_CASE)
    plan = planned(inputs)
    plan.run(inputs.q, inputs.kv())
    plan.plan(inputs.kv(), inputs.table(), 2 * DECODE_CASE.num_qo_heads)
    with pytest.raises(ValueError, match="q must have shape"):
        plan.run(inputs.q, inputs.kv())


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("indptr", 1, 99),
        ("indptr", 2, -1),
        ("indices", 0, 9),
        ("indices", 2, -1),
        ("last_page_len", 0, 0),
        ("last_page_len", 3, 17),
        ("page_offset", 0, -1),
        ("total_len", 3, -5),
        ("qo_indptr", 0, 1),
        ("qo_indptr", 2, 3),
        ("qo_indptr", 4, 25),
    ],
)
def test_values_of_host_metadata_are_checked_before_anything_runs(
    field: str, index: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = build(PREFILL_CASE)
    getattr(inputs, field)[index] = value
    monkeypatch.delattr(reference, "Plan")  # whoever gets as far as that fails otherwise
    with pytest.raises(pa.PageTableError, match=field) as caught:
        once(inputs)
    assert caught.value.field == field


def test_a_one_shot_call_checks_everything_before_it_makes_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(DECODE_CASE)
    monkeypatch.delattr(reference, "Plan")
    with pytest.raises(ValueError, match="out must have shape"):
        once(inputs, out=np.zeros((4, 8, 63), np.float16))
    with pytest.raises(
        ValueError, match=r"q has 7 heads.*multiple of num_kv_heads=2 \(q\.shape=\(4, 7, 64\)\).*2, 4, 6"
    ):
        once(inputs, q=inputs.q[:, :7])
    with pytest.raises(ValueError, match=r"q must be \[batch, num_qo_heads, head_dim\] or .*q\.shape=\(8, 64\)"):
        once(inputs, q=inputs.q[0])
    for name, value, error in (
        ("window_left", -2, ValueError),
        ("window_left", 1.5, TypeError),
        ("logits_soft_cap", -1.0, ValueError),
        ("logits_soft_cap", np.nan, ValueError),
        ("sm_scale", np.inf, ValueError),
        ("sm_scale", "1", TypeError),
    ):
        with pytest.raises(error, match=name):
            once(inputs, **{name: value})


def test_a_plan_and_a_cache_show_what_they_are() -> None:
    inputs = build(DECODE_CASE)
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=8)
    assert repr(plan) == "BatchDecodeWithPagedKVCache(max_batch_size=8, batch_invariant=False): not planned"
    plan.plan(inputs.kv(), inputs.table(), DECODE_CASE.num_qo_heads, window_left=7)
    assert "num_qo_heads=8" in repr(plan) and "window_left=7" in repr(plan)
    cache = pa.PagedKVCache(9, 16, 2, 64, layout="NHD", dtype="float16", num_layers=3, device="cpu")
    cache.reserve([cache.new_sequence()], 17)
    assert repr(cache).startswith("PagedKVCache(3 x PagedKV(num_pages=9, page_size=16")
    assert repr(cache).endswith("1 sequences, 7 pages free)")


# -- forms of q and of results -----------------------------------------------------------------------------------------


def test_q_len_is_an_axis_of_q() -> None:
    case = Case("q_len", (40, 0, 2, 17), q_len=3)
    inputs = build(case)
    plan = planned(inputs)
    out, lse = plan.run(inputs.q, inputs.kv(), return_lse=True)
    assert (out.shape, lse.shape) == ((4, 3, 8, 64), (4, 3, 8))
    rows = pa.prefill(inputs.q.reshape(12, 8, 64), np.arange(0, 13, 3, dtype=np.int32), inputs.kv(), inputs.table())
    np.testing.assert_array_equal(out.reshape(12, 8, 64), rows)
    for q in (inputs.q[:, :2], inputs.q[:, 0], inputs.q.reshape(12, 8, 64)):
        with pytest.raises(ValueError, match=r"q must have shape \[4, 3, 8, 64\]"):
            plan.run(q, inputs.kv())
    single = build(Case("q_len1", (40, 3)))
    np.testing.assert_array_equal(once(single, q=single.q[:, None])[:, 0], once(single))


def test_a_strided_q_and_pool_are_taken_as_they_lie() -> None:
    inputs = build(DECODE_CASE)
    expected = once(inputs)
    qkv = np.full((4, 12, 64), np.nan, np.float16)
    qkv[:, :8] = inputs.q
    combined = np.stack([inputs.k_pages, inputs.v_pages], axis=1)
    out = pa.decode(qkv[:, :8], pa.PagedKV.combined(combined, layout="NHD"), inputs.table())
    np.testing.assert_array_equal(out, expected)


def test_out_and_lse_are_written_and_out_may_be_float32() -> None:
    inputs = build(PREFILL_CASE)
    expected, expected_lse = once(inputs, return_lse=True)
    out, lse = np.empty(inputs.q.shape, np.float32), np.empty(inputs.q.shape[:2], np.float32)
    results = planned(inputs).run(inputs.q, inputs.kv(), out=out, lse=lse, return_lse=True)
    assert results[0] is out and results[1] is lse
    np.testing.assert_array_equal(out.astype(np.float16), expected)
    np.testing.assert_array_equal(lse, expected_lse)
    assert (out != out.astype(np.float16)).any()
    lse[...] = 7
    assert once(inputs, out=out, lse=lse) is out
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("max_batch_size", [None, 2])
def test_an_empty_batch_gives_empty_results(max_batch_size: int | None) -> None:
    inputs = build(Case("empty_batch", ()))
    q, table = np.zeros((0, 8, 64), np.float16), inputs.table()
    for out, lse in (
        pa.decode(q, inputs.kv(), table, return_lse=True),
        pa.prefill(q, np.zeros(1, np.int32), inputs.kv(), table, return_lse=True),
        planned(inputs, max_batch_size=max_batch_size).run(q, inputs.kv(), return_lse=True),
    ):
        assert (out.shape, lse.shape) == ((0, 8, 64), (0, 8))
    if max_batch_size:
        out, lse = planned(inputs, max_batch_size=2).run(np.ones((2, 8, 64), np.float16), inputs.kv(), return_lse=True)
        assert not out.any() and np.isneginf(lse).all()


def test_an_empty_batch_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(Case("empty_batch", ()))
    for name in ("Plan", "append", "merge_states", "merge_state"):
        monkeypatch.delattr(reference, name)
    empty = np.zeros((0, 2, 64), np.float16)
    assert pa.decode(np.zeros((0, 8, 64), np.float16), inputs.kv(), inputs.table()).shape == (0, 8, 64)
    pa.append(inputs.kv(), np.zeros(0, np.int64), empty, empty)
    assert pa.merge_states(empty[:, None], np.zeros((0, 1, 2), np.float32))[0].shape == (0, 2, 64)


# -- JAX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_arrays_come_in_and_go_out(dtype: str) -> None:
    for case in (replace(DECODE_CASE, dtype=dtype), replace(PREFILL_CASE, dtype=dtype, layout="HND")):
        inputs = build(case)
        expected, expected_lse = once(inputs, return_lse=True)
        kv, table, q = inputs.kv(jnp.asarray), inputs.table(jnp.asarray), jnp.asarray(inputs.q)
        if case.is_decode:
            results = pa.decode(q, kv, table, return_lse=True, **inputs.options())
        else:
            results = pa.prefill(q, jnp.asarray(inputs.qo_indptr), kv, table, return_lse=True, **inputs.options())
        assert all(isinstance(result, jax.Array) for result in results)
        assert results[0].dtype == q.dtype
        assert_same(results, (expected, expected_lse))


def test_the_library_of_results_is_that_of_q() -> None:
    inputs = build(DECODE_CASE)
    assert isinstance(pa.decode(inputs.q, inputs.kv(jnp.asarray), inputs.table(jnp.asarray)), np.ndarray)
    assert isinstance(pa.decode(jnp.asarray(inputs.q), inputs.kv(), inputs.table()), jax.Array)
    out = np.empty_like(inputs.q)
    assert pa.decode(jnp.asarray(inputs.q), inputs.kv(), inputs.table(), out=out) is out
    v, s = once(inputs, return_lse=True)
    assert all(isinstance(x, jax.Array) for x in pa.merge_state(jnp.asarray(v), s, v, jnp.asarray(s)))
    assert all(isinstance(x, np.ndarray) for x in pa.merge_states(v[:, None], jnp.asarray(s[:, None])))


def test_a_jax_pool_is_read_but_not_written() -> None:
    inputs = build(DECODE_CASE)
    token = np.zeros((1, 2, 64), np.float16)
    with pytest.raises(ValueError, match="kv cannot be written"):
        pa.append(inputs.kv(jnp.asarray), np.zeros(1, np.int64), token, token)
    pa.append(inputs.kv(), np.zeros(1, np.int64), jnp.asarray(token), jnp.asarray(token))
    assert not inputs.k_pages[0, 0].any()


# -- how decode is divided ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sms", [84, 132, 142])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 8, 200])
@pytest.mark.parametrize("rows", [8, 24, 40])  # one, two and three blocks of columns
@pytest.mark.parametrize("has_clusters", [True, False])
def test_what_is_not_left_whole_has_an_item_for_each_of_its_splits(
    rows: int, num_kv_heads: int, num_sms: int, has_clusters: bool
) -> None:
    card = Card(num_sms, H100.shared_bytes, 90 if has_clusters else 80)
    for busy in range(1, 4 * num_sms // num_kv_heads + 2):
        recipe = decode_recipe(rows, 128, busy * num_kv_heads, card=card)
        splits = decode_splits(busy, num_kv_heads, recipe, False, 2**31, card)
        ctas_per_item = num_kv_heads * recipe.column_blocks
        assert splits.ctas_per_item == ctas_per_item and splits.ctas_at_a_time == num_sms * recipe.ctas_per_sm
        # As kernels/splits.cu counts them.
        together = splits.ctas_at_a_time if busy * ctas_per_item > splits.ctas_at_a_time else num_sms
        others = busy - busy * ctas_per_item // together * together // ctas_per_item
        if others:
            assert others * (together // (others * ctas_per_item) - 1) <= splits.extra_items


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("num_sms", [84, 132, 142])
def test_items_that_splitting_may_add_grow_with_the_batch(num_sms: int, batch_invariant: bool) -> None:
    """A plan has room for its capacity, and a run of less takes no more."""
    for num_kv_heads, rows in itertools.product((1, 3, 8, 200), (8, 40)):
        recipe = decode_recipe(rows, 128, batch_invariant=batch_invariant)
        card = Card(num_sms, H100.shared_bytes, 90)
        extra = [
            decode_splits(batch, num_kv_heads, recipe, batch_invariant, 2**20, card).extra_items
            for batch in range(4 * num_sms)
        ]
        assert extra == sorted(extra)


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 200])
def test_a_grid_is_whole_clusters_and_every_block_of_it_has_an_item(num_kv_heads: int) -> None:
    for batch, rows in itertools.product(range(1, 300), (8, 40)):
        recipe = decode_recipe(rows, 128, batch * num_kv_heads)
        splits = decode_splits(batch, num_kv_heads, recipe, False, 2**20, H100)
        grid = decode_grid(batch, splits, recipe.cluster)
        assert grid % recipe.cluster == 0 and grid >= (batch + splits.extra_items) * splits.ctas_per_item
        assert (grid - 1) // splits.ctas_per_item < decode_items(batch, splits)


@pytest.mark.parametrize("columns", [8, 16])
@pytest.mark.parametrize(("num_pairs", "warps"), [(1, 8), (511, 8), (512, 4)])
def test_blocks_of_decode_share_a_multiprocessor(columns: int, num_pairs: int, warps: int) -> None:
    """With 128 dims, beside 1 KiB a block that CUDA takes; on cards of 164 KiB (compute capability 8.0) and more."""
    shape = decode_recipe(columns, 128, num_pairs)
    assert shape.warps == warps
    assert 16 // warps * (shape.shared_bytes + 1024) <= 164 * 1024


@pytest.mark.parametrize(
    ("group_size", "head_dim", "num_pairs", "card", "stages"),
    [
        (4, 128, 1, H100, 2), (4, 128, 4096, H100, 2), (16, 128, 64, H100, 2),
        (32, 128, 66, H100, 3), (32, 128, 67, H100, 2), (32, 128, 1, A100, 2),
        (4, 64, 132, H100, 4), (4, 64, 133, H100, 2), (4, 64, 108, A100, 4), (4, 64, 109, A100, 2),
        (8, 80, 4096, H100, 3), (8, 96, 1, H100, 3), (8, 112, 1, H100, 2),
    ],
)  # fmt: skip
def test_a_warp_has_room_for_more_tiles_where_that_pays_and_the_multiprocessor_has_the_memory(
    group_size: int, head_dim: int, num_pairs: int, card: Card, stages: int
) -> None:
    shape = decode_recipe(group_size, head_dim, num_pairs, card=card)
    assert shape.stages == stages
    assert 16 // shape.warps * (shape.shared_bytes + 1024) <= card.shared_bytes


@pytest.mark.parametrize(
    ("rows", "num_pairs", "card", "cluster"),
    [
        (4, 1, H100, 2), (4, 8 * 132, H100, 2), (4, 8 * 132 + 1, H100, 1),
        (32, 10**6, H100, 2), (4, 1, A100, 1), (32, 10**6, A100, 1),
    ],
)  # fmt: skip
def test_blocks_start_in_twos_where_the_card_can_and_they_are_few_or_read_the_same(
    rows: int, num_pairs: int, card: Card, cluster: int
) -> None:
    assert decode_recipe(rows, 128, num_pairs, card=card).cluster == cluster


def test_a_block_of_decode_fits_the_smallest_card() -> None:
    """99 KiB a block, 100 KiB a multiprocessor (compute capability 8.6, 8.9, 12.0)."""
    card = Card(84, 100 * 1024, 89)
    for head_dim, columns, num_pairs in itertools.product(range(16, 257, 16), (8, 16, 24, 32), (1, 100, 600)):
        shape = decode_recipe(columns, head_dim, num_pairs, card=card)
        assert shape.shared_bytes <= 99 * 1024
        assert 1 <= shape.ctas_per_sm <= card.shared_bytes // (shape.shared_bytes + 1024)


def test_warps_of_a_batch_invariant_plan_do_not_depend_on_the_batch() -> None:
    few, many = (decode_recipe(4, 128, num_pairs, batch_invariant=True) for num_pairs in (1, 4096))
    assert (few.columns, few.warps) == (many.columns, many.warps) == (8, 4)


# -- status and supports -----------------------------------------------------------------------------------------------


def test_a_cpu_has_no_fault_to_report() -> None:
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.status()
    inputs = build(DECODE_CASE)
    planned(inputs).status()
    pa.status("cpu")


def test_supports_answers_by_question() -> None:
    for op in ("append", "decode", "prefill", "merge"):
        assert pa.supports(op, device="cpu")
        assert pa.supports(op, device="cpu", dtype="float64", head_dim=7, page_size=3, layout="HND").reason == ""
        answer = pa.supports(op, device="cuda", dtype="float64")
        assert not answer and "float16, bfloat16" in answer.reason and "on the CPU" in answer.reason
    for op in ("append", "decode", "prefill"):
        answer = pa.supports(op, device="cuda", dtype="float16", head_dim=72)
        assert not answer and "multiple of 16 up to 256, not 72; pad it with zeros" in answer.reason
        wide = pa.supports(op, device="cuda", v_head_dim=272).reason
        assert "up to 256, not 272; pass NumPy arrays" in wide, "zeros make it no narrower"
    assert "multiple of num_kv_heads" in pa.supports(device="cpu", num_qo_heads=30, num_kv_heads=8).reason
    assert pa.supports(device="cpu", num_qo_heads=40, num_kv_heads=8)
    for dtype in ("int8", "float8_e4m3fn", np.int32):
        assert "dtype must be one of" in pa.supports(device="cpu", dtype=dtype).reason
    assert not pa.supports(device="cuda:99")
    with pytest.raises(ValueError, match="op is 'encode'"):
        pa.supports("encode")


def test_merge_on_a_gpu_takes_float32_and_attention_does_not() -> None:
    assert "decode on a GPU takes float16, bfloat16, not float32" in pa.supports(device="cuda", dtype="float32").reason
    assert "not float32" not in pa.supports("merge", device="cuda", dtype="float32").reason


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan_class", [pa.BatchDecodeWithPagedKVCache, pa.BatchPrefillWithPagedKVCache])
def test_a_plan_serves_one_thread_at_a_time(plan_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that finds another thread inside raises; when that one has left, it works."""
    case = Case("threads", (9, 3), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, q_lens=(1, 1))
    inputs = build(case)
    kv, table, attention = inputs.kv(), inputs.table(), plan_class()
    arguments = (kv, table, 4) if plan_class is pa.BatchDecodeWithPagedKVCache else (kv, table, inputs.qo_indptr, 4)
    attention.plan(*arguments)
    right = attention.run(inputs.q, kv)
    inside, leave = threading.Event(), threading.Event()
    run = reference.Plan.run

    def slow(*arguments: Any) -> None:
        inside.set()
        assert leave.wait(10)
        run(*arguments)

    monkeypatch.setattr(reference.Plan, "run", slow)
    results: list[Any] = []
    other = threading.Thread(target=lambda: results.append(attention.run(inputs.q, kv)))
    other.start()
    assert inside.wait(10)
    try:
        with pytest.raises(RuntimeError, match=r"run\(\) was called while .* one thread at a time"):
            attention.run(inputs.q, kv)
        with pytest.raises(RuntimeError, match=r"plan\(\) was called while .* one thread at a time"):
            attention.plan(*arguments)
    finally:
        leave.set()
        other.join()
    np.testing.assert_array_equal(results[0], right)
    attention.plan(*arguments)
    np.testing.assert_array_equal(attention.run(inputs.q, kv), right)
