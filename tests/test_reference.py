"""The reference backend against a loop over dense K and V in float64, for every case, and the rule of closeness."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

import paged_attn as pa
from tests.cases import (
    BENCH_DECODE,
    BENCH_PREFILL,
    DECODE,
    DTYPES,
    GROUP_SIZES,
    HEAD_DIMS,
    LAYOUTS,
    LSE_TOLERANCE,
    LSE_TOLERANCE_SOFT_CAP,
    NEEDLE_CASES,
    OUT_TOLERANCE,
    PAGE_SIZES,
    PREFILL,
    SINKS,
    V_DIMS,
    Case,
    Inputs,
    assert_close,
    assert_needle,
    build,
    needle_places,
)


def dense_attention(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """out and lse (rows, not q_len) of a case, request by request and head by head, in float64."""
    case = inputs.case
    q = inputs.q.reshape(-1, case.num_qo_heads, case.head_dim).astype(np.float64)
    out, lse = np.zeros((*q.shape[:2], case.v_head_dim)), np.full(q.shape[:2], -np.inf)
    sinks = np.full(case.num_qo_heads, -np.inf) if inputs.sinks is None else inputs.sinks.astype(np.float64)
    row = 0
    for request, num_queries in enumerate(case.queries):
        k, v = inputs.k[request].astype(np.float64), inputs.v[request].astype(np.float64)
        position, total_len = case.positions(request), case.total_len(request)
        for own in range(total_len - num_queries, total_len):  # the position of the query
            visible = position <= own if case.causal else position < total_len
            if case.window_left >= 0:
                visible &= position >= own - case.window_left
            for head in range(case.num_qo_heads):
                kv_head = head // (case.num_qo_heads // case.num_kv_heads)
                scores = k[visible, kv_head] @ q[row, head] * case.sm_scale
                if case.logits_soft_cap > 0:
                    scores = case.logits_soft_cap * np.tanh(scores / case.logits_soft_cap)
                largest = max([*scores, sinks[head]])
                if largest > -np.inf:
                    weights = np.exp(scores - largest)
                    total = weights.sum() + np.exp(sinks[head] - largest)
                    out[row, head] = weights @ v[visible, kv_head] / total
                    lse[row, head] = largest + np.log(total)
            row += 1
    return out, lse


def attend(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of a case by the library, as rows."""
    case = inputs.case
    if case.is_decode:
        out, lse = pa.decode(
            inputs.q, inputs.kv(), inputs.table(), sinks=inputs.sinks, return_lse=True, **inputs.options()
        )
    else:
        out, lse = pa.prefill(
            inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(),
            sinks=inputs.sinks, return_lse=True, **inputs.options(),
        )  # fmt: skip
    assert out.dtype == inputs.q.dtype and out.shape == (*inputs.q.shape[:-1], case.v_head_dim)
    assert lse.dtype == np.float32 and lse.shape == inputs.q.shape[:-1]
    return out.reshape(-1, *out.shape[-2:]), lse.reshape(-1, lse.shape[-1])


@pytest.mark.parametrize("case", DECODE + PREFILL + SINKS + V_DIMS, ids=str)
def test_reference_is_dense_attention(case: Case) -> None:
    inputs = build(case)
    lse_tolerance = LSE_TOLERANCE_SOFT_CAP if case.logits_soft_cap else LSE_TOLERANCE
    tolerance = OUT_TOLERANCE[case.dtype]
    assert_close(*attend_both(inputs), tolerance=tolerance, lse_tolerance=lse_tolerance)


def attend_both(inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    out, lse = attend(inputs)
    expected, expected_lse = dense_attention(inputs)
    return out, expected, lse, expected_lse


# -- needles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NEEDLE_CASES, ids=str)
def test_a_needle_is_found_exactly_where_it_is_visible(case: Case) -> None:
    for place in needle_places(case):
        inputs = build(case, needle=place)
        assert_close(*attend_both(inputs), tolerance=OUT_TOLERANCE[case.dtype])
        assert_needle(inputs.case, place, *attend(inputs))


def test_assert_needle_refuses_an_answer_without_the_needle_and_one_with_a_hidden_needle() -> None:
    case = Case("needle_refused", (40,), q_lens=(40,))
    out, lse = attend(build(case, needle=20))
    assert_needle(case, 20, out, lse)
    for wrong_out, wrong_lse in (attend(build(case)), attend(build(replace(case, causal=False), needle=20))):
        with pytest.raises(AssertionError):
            assert_needle(case, 20, wrong_out, wrong_lse)


# -- the rule of closeness ---------------------------------------------------------------------------------------------


def test_assert_close_refuses_wrong_answers() -> None:
    expected = np.random.default_rng(0).standard_normal((50, 4, 64))
    lse = np.zeros((50, 4))
    assert_close(expected * (1 + 1e-3), expected, lse + 5e-5, lse, tolerance=2e-3)
    one_element = expected.copy()
    one_element[17, 2, 5] += 0.1
    nan, inf, minus_inf = (expected.copy() for _ in range(3))
    nan[3, 1, 0], inf[3, 1, 0], minus_inf[3, 1, 0] = np.nan, np.inf, -np.inf
    for wrong, message in (
        (one_element, r"1 of 200 rows .* row \(17, 2\)"),
        (expected * 1.01, "200 of 200 rows"),
        (nan, "NaN of out"),
        (inf, r"\+inf of out"),
        (expected[:-1], "shape"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close(wrong, expected, tolerance=2e-3)
    with pytest.raises(AssertionError, match="NaN of out"):
        assert_close(expected, nan, tolerance=2e-3)
    with pytest.raises(AssertionError, match=r"[+-]inf of out"):
        assert_close(minus_inf, inf, tolerance=2e-3)
    empty_row = expected.copy()
    empty_row[9, 0] = 0  # a row of zeros must be met exactly
    with pytest.raises(AssertionError, match=r"row \(9, 0\)"):
        assert_close(expected, empty_row, tolerance=2e-3)
    with pytest.raises(AssertionError, match=r"lse is off by 0\.001"):
        assert_close(expected, expected, lse + 1e-3, lse, tolerance=2e-3)
    with pytest.raises(AssertionError, match="-inf of lse"):
        assert_close(expected, expected, lse - np.inf, lse, tolerance=2e-3)


def test_assert_close_refuses_attention_that_skips_a_page() -> None:
    inputs = build(Case("skipped_page", (3000,), page_size=16))
    expected, expected_lse = dense_attention(inputs)
    keep = np.r_[0:1600, 1616:3000]
    shorter = replace(
        inputs, case=replace(inputs.case, kv_lens=(keep.size,)), k=[inputs.k[0][keep]], v=[inputs.v[0][keep]]
    )
    out, lse = dense_attention(shorter)
    assert np.abs(out - expected).max() < 2e-2  # an absolute tolerance would be none the wiser
    with pytest.raises(AssertionError, match="rows are off"):
        assert_close(out, expected, tolerance=OUT_TOLERANCE["float16"])
    with pytest.raises(AssertionError, match="lse is off"):
        assert_close(expected, expected, lse, expected_lse, tolerance=OUT_TOLERANCE["float16"])


# -- the list itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_the_cases_cover_what_the_design_names(cases: tuple[Case, ...]) -> None:
    assert {case.page_size for case in cases} >= set(PAGE_SIZES)
    assert {case.num_qo_heads // case.num_kv_heads for case in cases} >= set(GROUP_SIZES)
    assert {case.head_dim for case in cases} >= set(HEAD_DIMS)
    assert {(case.layout, case.dtype) for case in cases} >= {
        (layout, dtype) for layout in LAYOUTS for dtype in ("float16", "bfloat16")
    }
    assert {case.dtype for case in cases} == set(DTYPES)
    assert any(case.page_size == case.num_kv_heads > 1 for case in cases)
    assert any(0 < kv_len < n for case in cases for kv_len, n in zip(case.kv_lens, case.queries, strict=True))
    assert any(case.page_stride > 1 and case.page_offsets for case in cases)
    assert {0, 1} <= {kv_len for case in cases for kv_len in case.kv_lens}
    names = [case.name for case in DECODE + PREFILL + BENCH_DECODE + BENCH_PREFILL]
    assert len(names) == len(set(names))
    assert (len(BENCH_DECODE), len(BENCH_PREFILL)) == (12, 6)


def test_inputs_are_poisoned_and_the_same_every_time() -> None:
    case = DECODE[0]
    a, b = build(case), build(case)
    for name in ("q", "k_pages", "v_pages", "indptr", "indices", "last_page_len"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    used = a.indices[: a.indptr[-1]]
    assert np.isnan(np.delete(a.k_pages, used, axis=0)).all()
    assert (a.indices[a.indptr[-1] :] >= a.k_pages.shape[0]).any() and (a.indices[a.indptr[-1] :] < 0).any()
    assert (np.diff(used) != 1).any()
    partly = build(Case("partly", (17,)))
    last_page = partly.k_pages[partly.indices[1]]
    assert np.isfinite(last_page[0].astype(np.float32)).all() and np.isnan(last_page[1:].astype(np.float32)).all()


# -- what the definition says beyond numbers ---------------------------------------------------------------------------


def test_pages_outside_every_window_are_not_read() -> None:
    case = Case("unread", (300, 40), window_left=20)
    inputs = build(case)
    expected = pa.decode(inputs.q, inputs.kv(), inputs.table(), window_left=20)
    for request, kv_len in enumerate(case.kv_lens):
        outside = inputs.indices[inputs.indptr[request] :][: (kv_len - 1 - 20) // case.page_size]
        inputs.k_pages[outside], inputs.v_pages[outside] = np.nan, np.nan
    np.testing.assert_array_equal(pa.decode(inputs.q, inputs.kv(), inputs.table(), window_left=20), expected)


def test_long_prefill_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from paged_attn.backends import reference

    inputs = build(Case("blocks", (90, 33), q_lens=(70, 33), window_left=40, dtype="float32"))
    whole, whole_lse = attend(inputs)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 8 * 90 * 7)
    out, lse = attend(inputs)
    assert_close(out, whole, lse, whole_lse, tolerance=1e-6)


UNSEEN = [
    Case("unseen_prefill", (40, 0, 3), q_lens=(40, 5, 9), dtype="float32"),
    Case("unseen_window", (90,), q_lens=(30,), window_left=7, dtype="float16"),
    Case("unseen_not_causal_window", (40, 20), q_lens=(40, 5), causal=False, window_left=5, dtype="float32"),
    Case("unseen_q_len", (70, 2), q_len=5, num_qo_heads=12, dtype="bfloat16"),
    Case("unseen_q_len_window", (70, 2), q_len=5, window_left=2, dtype="float64"),
    Case("unseen_soft_cap", (33,), q_lens=(20,), logits_soft_cap=2.0, dtype="float32"),
    Case("unseen_positions", (24, 16), q_lens=(30, 9), page_size=8, page_offsets=(1, 0), page_stride=2,
         total_lens=(60, 31), dtype="float32"),
]  # fmt: skip


def token_places(inputs: Inputs, request: int, token: int) -> tuple[int, int]:
    """Page id and slot of a local token."""
    page, slot = divmod(token, inputs.case.page_size)
    return int(inputs.indices[inputs.indptr[request] + page]), slot


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", UNSEEN, ids=str)
def test_what_a_row_does_not_see_does_not_reach_it(case: Case, value: float) -> None:
    """Inf or NaN in K and V of one token after the other: rows that do not see it keep their bits, others get them."""
    inputs = build(case)
    right, right_lse = (array.astype(np.float64) for array in attend(inputs))
    for token in range(0, max(case.kv_lens), 3):
        poisoned = build(case)
        poisoned_k = build(case)
        for request, kv_len in enumerate(case.kv_lens):
            if token < kv_len:
                place = token_places(inputs, request, token)
                poisoned.v_pages[place][:, 5] = value
                poisoned.v[request][token, :, 5] = value
                poisoned_k.k_pages[place] = value
        sees = []
        for request, num_queries in enumerate(case.queries):
            own = case.total_len(request) - num_queries + np.arange(num_queries)
            if token >= case.kv_lens[request]:
                sees.append(np.zeros(num_queries, bool))
                continue
            position = case.positions(request)[token]
            visible = position <= own if case.causal else np.full(num_queries, position < case.total_len(request))
            sees.append(visible & (position >= own - case.window_left) if case.window_left >= 0 else visible)
        seen = np.concatenate(sees)
        out, lse = (array.astype(np.float64) for array in attend(poisoned))
        np.testing.assert_array_equal(out[~seen], right[~seen])
        np.testing.assert_array_equal(lse, right_lse)
        np.testing.assert_array_equal(np.delete(out, 5, axis=-1), np.delete(right, 5, axis=-1))
        np.testing.assert_array_equal(out[seen, :, 5], np.full_like(out[seen, :, 5], value))
        out, lse = (array.astype(np.float64) for array in attend(poisoned_k))
        np.testing.assert_array_equal(out[~seen], right[~seen])
        np.testing.assert_array_equal(lse[~seen], right_lse[~seen])


def test_infinite_values_add_up_as_ieee_has_it() -> None:
    """inf and -inf that one row sees give NaN, and so does inf whose weight has become 0; a score of NaN, NaN."""
    q, k = np.zeros((4, 1, 2), np.float32), np.zeros((4, 1, 2), np.float32)
    v = np.array([[1, 1], [np.inf, 1], [1, np.nan], [-np.inf, -np.inf]], np.float32)[:, None]
    out = pa.single_prefill(q, k, v, layout="NHD")[:, 0]
    np.testing.assert_array_equal(out, [[1, 1], [np.inf, 1], [np.inf, np.nan], [np.nan, np.nan]])
    k[0], q[...] = 200, 1  # beside the first token no other one counts
    np.testing.assert_array_equal(pa.single_decode(q[0], k, v, layout="NHD"), [[np.nan, np.nan]])
    np.testing.assert_array_equal(
        pa.single_decode(q[0], k, np.abs(v[:, :, :1]).repeat(2, -1), layout="NHD"), [[np.nan] * 2]
    )
    np.testing.assert_array_equal(pa.single_decode(q[0], k[:1], v[:1], layout="NHD"), [[1, 1]])
    k[1, 0, 0] = np.nan
    out = pa.single_prefill(q, k, v, layout="NHD")[:, 0]
    np.testing.assert_array_equal(np.isnan(out), [[False] * 2, [True] * 2, [True] * 2, [True] * 2])


def test_what_a_chunk_or_a_state_does_not_see_does_not_reach_the_merge() -> None:
    """Every row of a split table, one of whose chunks some queries do not see."""
    case = Case("unseen_split", (40,), q_lens=(30,), dtype="float32")
    inputs = build(case)
    right, _ = attend(inputs)
    inputs.v_pages[token_places(inputs, 0, 39)], inputs.k_pages[token_places(inputs, 0, 38)] = np.nan, np.nan
    qo_indptr = np.arange(4, dtype=np.int32) * 30
    q = np.concatenate([inputs.q] * 3)
    out, lse = pa.prefill(q, qo_indptr, inputs.kv(), inputs.table().split(3), return_lse=True)
    merged, _ = pa.merge_states(*(array.reshape(3, 30, *array.shape[1:]).swapaxes(0, 1) for array in (out, lse)))
    assert_close(merged[:-2], right[:-2], tolerance=1e-5)
    assert np.isnan(merged[-2:]).all()


def test_a_callers_errstate_and_warnings_do_not_matter() -> None:
    """Weights that underflow, results past float16, the logarithm of an empty row: all of it is as it should be."""
    inputs = [
        build(Case("low", (40, 0, 3), dtype=dtype, q_lens=q_lens, logits_soft_cap=cap), scores="sigma50")
        for dtype in ("float16", "float32", "float64")
        for q_lens in (None, (9, 2, 5))
        for cap in (0.0, 200.0)
    ]
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for case_inputs in inputs:
            attend(case_inputs)
        v = np.full((3, 1, 8), 60000, np.float16)
        v[1] = np.inf
        tiny = np.full((3, 1, 8), 6e-8, np.float16)
        pa.single_decode(tiny[0], tiny, v, layout="NHD")
        pa.single_prefill(tiny, tiny, v, layout="NHD")
        state = np.full((2, 1, 8), 1e-30, np.float32), np.array([[0], [-np.inf]], np.float32)
        nothing = np.full((2, 1, 8), np.nan, np.float32), np.full((2, 1), -1000, np.float32)
        for base in ("e", 2):
            pa.merge_state(*state, *nothing, base=base)
            pa.merge_states(*(np.stack(pair, axis=1) for pair in zip(state, nothing, strict=True)), base=base)
        out = np.empty((2, 1, 8), np.float16)
        pa.merge_state(*state, *state, out=out)
        cache = pa.PagedKVCache(4, 2, 1, 8, layout="NHD", dtype="float16", device="cpu")
        sequence = cache.new_sequence()
        cache.append([sequence], [3], v, tiny)
        cache.append([cache.fork(sequence)], [1], v[:1], tiny[:1])
        table = cache.page_table([sequence])
        pa.decode(tiny[:1], cache.layers[0].to_layout("HND"), table)
        table.validate(4).raise_if_bad()
        table.split(2).to_block_table(2)
        table.slots(np.zeros(1, np.int32), np.zeros(1, np.int32))


def test_a_result_past_the_range_of_float16_is_infinite() -> None:
    kv = pa.PagedKV(np.zeros((1, 1, 1, 4), np.float16), np.full((1, 1, 1, 4), np.inf, np.float16), layout="NHD")
    ones = np.ones(1, np.int32)
    table = pa.PageTable(np.array([0, 1], np.int32), np.zeros(1, np.int32), ones, page_size=1)
    assert np.isposinf(pa.decode(np.zeros((1, 1, 4), np.float16), kv, table)).all()


def test_scores_that_overflow_exp_do_not_overflow() -> None:
    k = np.full((1, 2, 1, 16), 60, np.float16)
    v = np.ones((1, 2, 1, 16), np.float16)
    q = np.full((1, 1, 16), 60, np.float16)
    table = pa.PageTable(np.array([0, 1], np.int32), np.zeros(1, np.int32), np.array([2], np.int32), page_size=2)
    for sign in (1, -1):
        out, lse = pa.decode(sign * q, pa.PagedKV(k, v, layout="NHD"), table, return_lse=True)
        np.testing.assert_array_equal(out, 1)
        np.testing.assert_allclose(lse, sign * 60 * 60 * 4 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_writes_each_token_to_its_slot_and_nothing_else(layout: str) -> None:
    random = np.random.default_rng(1)
    pages = np.zeros((4, 3, 2, 8) if layout == "NHD" else (4, 2, 3, 8), np.float16)
    kv = pa.PagedKV(pages.copy(), pages.copy(), layout=layout)
    k, v = random.standard_normal((2, 5, 2, 8)).astype(np.float16)
    slots = np.array([7, -1, 0, 11, 4])
    pa.append(kv, slots, k, v)
    for pool, tokens in ((kv.k_pages, k), (kv.v_pages, v)):
        by_slot = (pool if layout == "NHD" else pool.swapaxes(1, 2)).reshape(12, 2, 8)
        np.testing.assert_array_equal(by_slot[[7, 0, 11, 4]], tokens[[0, 2, 3, 4]])
        assert not by_slot[[1, 2, 3, 5, 6, 8, 9, 10]].any()
