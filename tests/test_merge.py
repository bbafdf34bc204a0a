"""Merging of partial attention: identity, associativity, bases, and the whole from the parts of a split sequence."""

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import paged_attn as pa
from tests.cases import (
    DECODE,
    LSE_TOLERANCE,
    NEEDLE_CASES,
    OUT_TOLERANCE,
    PREFILL,
    Case,
    Inputs,
    assert_close,
    assert_needle,
    build,
)

EMPTY = -np.inf


def states(*shape: int, dtype: type = np.float32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """v [*shape] and s [*shape[:-1]], with some empty states among them."""
    random = np.random.default_rng(seed)
    v = random.standard_normal(shape).astype(dtype)
    s = (3 * random.standard_normal(shape[:-1])).astype(np.float32)
    empty = random.random(shape[:-1]) < 0.2
    v[empty], s[empty] = 0, EMPTY
    return v, s


def naive_merge(v: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over axis 1, in float64, without any care for overflow."""
    weights = np.exp(s.astype(np.float64))
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore"):
        out = (weights[..., None] * v.astype(np.float64)).sum(axis=1) / np.where(total == 0, 1, total)[..., None]
        return out, np.log(total)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("num_states", [1, 2, 5, 16])
def test_merge_states_is_the_weighted_mean(num_states: int, dtype: type) -> None:
    v, s = states(7, num_states, 3, 32, dtype=dtype)
    out, lse = pa.merge_states(v, s)
    assert (out.dtype, lse.dtype) == (v.dtype, np.float32)
    expected, expected_lse = naive_merge(v, s)
    assert_close(out, expected, lse, expected_lse, tolerance=OUT_TOLERANCE[np.dtype(dtype).name])


def test_merge_state_is_merge_states_of_two() -> None:
    v, s = states(9, 2, 4, 16)
    for one, other in zip(pa.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1]), pa.merge_states(v, s), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_empty_state_changes_nothing() -> None:
    v, s = states(6, 4, 16)
    nothing, nowhere = np.zeros_like(v), np.full_like(s, EMPTY)
    for out, lse in (pa.merge_state(v, s, nothing, nowhere), pa.merge_state(nothing, nowhere, v, s)):
        np.testing.assert_array_equal(out, v)
        np.testing.assert_array_equal(lse, s)
    nothing[...] = np.nan  # what stands in an empty state is not looked at
    np.testing.assert_array_equal(pa.merge_state(v, s, nothing, nowhere)[0], v)
    np.testing.assert_array_equal(pa.merge_state(nothing, nowhere, v, s)[0], v)
    out, lse = pa.merge_states(np.stack([nothing] * 3, axis=1), np.stack([nowhere] * 3, axis=1))
    assert not out.any() and np.isneginf(lse).all()
    out, lse = pa.merge_states(np.zeros((6, 0, 4, 16), np.float32), np.zeros((6, 0, 4), np.float32))
    assert not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("base", ["e", 2])
def test_a_state_of_plus_infinity_is_empty_too(base: str | int) -> None:
    """As FlashAttention-2 and FlashMLA give it for a row that sees no key."""
    v, s = states(6, 3, 4, 16)
    marked = np.where(np.isneginf(s), np.inf, s)
    marked[0, 0, 0], s[0, 0, 0] = np.inf, -np.inf
    marked[1], s[1] = np.inf, -np.inf
    right, right_lse = pa.merge_states(np.where(np.isneginf(s)[..., None], 0, v), s, base=base)
    v[np.isneginf(s)] = np.nan
    for found in (
        pa.merge_states(v, marked, base=base),
        pa.merge_states(v, np.where(np.arange(3)[:, None] == 1, marked, s), base=base),
    ):
        np.testing.assert_array_equal(found[0], right)
        np.testing.assert_array_equal(found[1], right_lse)
    assert not right[1].any() and np.isneginf(right_lse[1]).all()
    pair = pa.merge_state(v[:, 0], marked[:, 0], v[:, 1], marked[:, 1], base=base)
    for one, other in zip(pair, pa.merge_states(v[:, :2], s[:, :2], base=base), strict=True):
        np.testing.assert_array_equal(one, other)


def test_merging_is_associative_and_commutative() -> None:
    (v_a, s_a), (v_b, s_b), (v_c, s_c) = (states(20, 4, 16, seed=seed) for seed in range(3))
    left = pa.merge_state(*pa.merge_state(v_a, s_a, v_b, s_b), v_c, s_c)
    right = pa.merge_state(v_a, s_a, *pa.merge_state(v_b, s_b, v_c, s_c))
    turned = pa.merge_state(v_c, s_c, *pa.merge_state(v_b, s_b, v_a, s_a))
    at_once = pa.merge_states(np.stack([v_a, v_b, v_c], axis=1), np.stack([s_a, s_b, s_c], axis=1))
    for out, lse in (right, turned, at_once):
        assert_close(out, left[0], lse, left[1], tolerance=2e-6, lse_tolerance=2e-6)


def test_base_2_states_merge_to_a_base_2_state() -> None:
    v, s = states(8, 3, 4, 16)
    out, lse = pa.merge_states(v, s, base="e")
    out_2, lse_2 = pa.merge_states(v, (s / math.log(2)).astype(np.float32), base=2)
    assert_close(out_2, out, lse_2 * math.log(2), lse, tolerance=1e-5)


def test_states_far_apart_neither_overflow_nor_underflow() -> None:
    v, s = np.ones((1, 2, 1, 8), np.float32), np.array([[[-3e4], [-3e4]]], np.float32)
    for shift in (0, 6e4):
        out, lse = pa.merge_states(v, s + np.float32(shift))
        np.testing.assert_array_equal(out, 1)
        np.testing.assert_allclose(lse, shift - 3e4 + math.log(2), rtol=1e-6)


def test_out_and_lse_are_written_and_returned_also_in_place_and_in_another_dtype() -> None:
    v, s = states(5, 2, 16, dtype=np.float16)
    v_b, s_b = states(5, 2, 16, dtype=np.float16, seed=1)
    expected, expected_lse = pa.merge_state(v, s, v_b, s_b)
    out, lse = np.empty(v.shape, np.float32), np.empty_like(s)
    results = pa.merge_state(v, s, v_b, s_b, out=out, lse=lse)
    assert results[0] is out and results[1] is lse
    assert_close(out, expected, lse, expected_lse, tolerance=OUT_TOLERANCE["float16"])
    pa.merge_state(v, s, v_b, s_b, out=v, lse=s)
    np.testing.assert_array_equal(v, expected)
    np.testing.assert_array_equal(s, expected_lse)


def test_strided_states_are_merged_as_they_lie() -> None:
    v, s = states(3, 4, 5, 16)
    swapped = (
        np.ascontiguousarray(v.swapaxes(0, 1)).swapaxes(0, 1),
        np.ascontiguousarray(s.swapaxes(0, 1)).swapaxes(0, 1),
    )
    assert not swapped[0].flags.c_contiguous
    for one, other in zip(pa.merge_states(*swapped), pa.merge_states(v, s), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_to_merge_gives_nothing() -> None:
    out, lse = pa.merge_states(np.zeros((0, 3, 4, 16), np.float32), np.zeros((0, 3, 4), np.float32))
    assert (out.shape, lse.shape) == ((0, 4, 16), (0, 4))


@pytest.mark.parametrize(
    ("v", "s", "options", "error", "message"),
    [
        (np.zeros((2, 3, 4, 8), np.int32), np.zeros((2, 3, 4), np.float32), {}, TypeError, "v must be one of float16"),
        (np.zeros((2, 3, 8), np.float32), np.zeros((2, 3), np.float32), {}, ValueError, r"v must have 4 axes"),
        (np.zeros((2, 3, 4, 8)), np.zeros((2, 3, 4)), {}, TypeError, "s must be float32.*s.astype"),
        (np.zeros((2, 3, 4, 8)), np.zeros((2, 3), np.float32), {}, ValueError, r"s must have 3 axes.*\(2, 3\)"),
        (np.zeros((2, 3, 4, 8)), np.zeros((2, 3, 4), np.float32), {"base": 10}, ValueError, "base is 10.*base=2"),
        (
            np.zeros((2, 3, 4, 8)),
            np.zeros((2, 3, 4), np.float32),
            {"out": np.zeros((2, 3, 8))},
            ValueError,
            r"out must have shape \[2, 4, 8\]",
        ),
    ],
)
def test_merge_states_refuses(v: np.ndarray, s: np.ndarray, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pa.merge_states(v, s, **options)


# -- a whole by its parts ----------------------------------------------------------------------------------------------


def attend(inputs: Inputs, table: pa.PageTable, copies: int, xp: Any = np) -> tuple[Any, Any]:
    """Rows of out (float32, as partial results are kept) and lse for `copies` of the queries over a table."""
    case, to = inputs.case, xp.asarray
    q = np.concatenate([inputs.q] * copies)
    out = xp.empty(q.shape, np.float64 if case.dtype == "float64" else np.float32)
    options = {"out": out, "return_lse": True, **inputs.options()}
    if case.is_decode:
        _, lse = pa.decode(to(q), inputs.kv(to), table, **options)
    else:
        starts = np.arange(copies, dtype=np.int32)[:, None] * inputs.qo_indptr[-1] + inputs.qo_indptr[:-1]
        qo_indptr = np.append(starts.ravel(), np.int32(len(q)))
        _, lse = pa.prefill(to(q), to(qo_indptr), inputs.kv(to), table, **options)
    return out.reshape(-1, *out.shape[-2:]), lse.reshape(-1, lse.shape[-1])


def chunks(inputs: Inputs, num_chunks: int, xp: Any = np) -> tuple[Any, Any]:
    """Partial results out [num_chunks, rows, heads, dim] and lse [num_chunks, rows, heads] of a split table."""
    out, lse = attend(inputs, inputs.table(xp.asarray).split(num_chunks), num_chunks, xp)
    return out.reshape(num_chunks, -1, *out.shape[1:]), lse.reshape(num_chunks, -1, lse.shape[1])


def merge(out: Any, lse: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows of partial results, merged where they are, in NumPy."""
    return tuple(map(on_host, pa.merge_states(out.swapaxes(0, 1), lse.swapaxes(0, 1))))


def on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def assert_chunks_merge_to_the_whole(inputs: Inputs, *counts: int, xp: Any = np) -> None:
    """To what NumPy answers of the unsplit table, for each number of chunks."""
    whole, whole_lse = attend(inputs, inputs.table(), 1)
    tolerance, lse_tolerance = (1e-5, 1e-5) if xp is np else (OUT_TOLERANCE[inputs.case.dtype], LSE_TOLERANCE)
    for num_chunks in counts:
        merged, merged_lse = merge(*chunks(inputs, num_chunks, xp))
        assert_close(merged, whole, merged_lse, whole_lse, tolerance=tolerance, lse_tolerance=lse_tolerance)


SPLIT_CASES = [case for case in DECODE + PREFILL if any(case.kv_lens) and "long" not in case.name]


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_the_chunks_of_a_split_table_merge_to_the_whole(case: Case) -> None:
    assert_chunks_merge_to_the_whole(build(case), 2, 7)


RAGGED = Case("ragged", (100, 3, 0, 64, 1, 16, 17))  # of 7 pages at most: the last chunks of many are empty
KINDS = (
    RAGGED,
    replace(RAGGED, name="q_len", q_len=3, layout="HND"),
    replace(RAGGED, name="prefill", q_lens=(100, 5, 2, 0, 1, 9, 30)),
    replace(RAGGED, name="not_causal", q_lens=(20, 5, 2, 1, 0, 9, 1), causal=False, layout="HND"),
)


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("group_size", range(1, 9))
def test_any_number_of_chunks_merges_to_the_whole(xp: Any, group_size: int, case: Case) -> None:
    assert_chunks_merge_to_the_whole(build(replace(case, num_qo_heads=2 * group_size)), *range(1, 10), xp=xp)


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("window_left", [0, 1, 14, 15, 16, 17, 40, 99])
def test_windows_across_borders_merge_to_the_whole(xp: Any, window_left: int, case: Case) -> None:
    assert_chunks_merge_to_the_whole(build(replace(case, window_left=window_left)), 2, 3, 7, xp=xp)


@pytest.mark.parametrize("window_left", [-1, 0, 15, 16, 40])
@pytest.mark.parametrize("total_len", [96, 50])
@pytest.mark.parametrize("q_len", [1, 16, 40, 120])
def test_a_row_sees_of_each_chunk_what_the_masks_leave(xp: Any, q_len: int, total_len: int, window_left: int) -> None:
    """96 keys in chunks of a page, before, across and behind the diagonal; with total_len=50 two behind all rows."""
    case = Case("diagonal", (96,), q_lens=(q_len,), total_lens=(total_len,), window_left=window_left)
    inputs = build(case)
    key, row = np.arange(96), total_len - q_len + np.arange(q_len)[:, None]  # positions
    is_seen = (key <= row) & ((key >= row - window_left) | (window_left < 0))  # [q_len, 96]
    count = is_seen.reshape(q_len, 6, 16).sum(axis=-1).T  # [6, q_len]
    out, lse = chunks(inputs, 6, xp)
    for found in (on_host(out).any(axis=(-2, -1)), np.isfinite(on_host(lse)).any(axis=-1)):
        np.testing.assert_array_equal(found, count > 0)

    unmasked = replace(inputs, case=replace(case, causal=False, window_left=-1), total_len=None)
    full, full_lse = chunks(unmasked, 6)
    all_seen = count == 16
    tolerance = 1e-5 if xp is np else OUT_TOLERANCE[case.dtype]
    out, lse = on_host(out), on_host(lse)
    assert_close(out[all_seen], full[all_seen], lse[all_seen], full_lse[all_seen], tolerance=tolerance)
    assert (lse[~all_seen] < full_lse[~all_seen]).all()
    assert_chunks_merge_to_the_whole(inputs, 6, xp=xp)


@pytest.mark.parametrize("num_chunks", [2, 3, 7])
@pytest.mark.parametrize("case", NEEDLE_CASES, ids=str)
def test_a_needle_at_either_side_of_a_border_is_seen(xp: Any, case: Case, num_chunks: int) -> None:
    borders = build(case).table().split(num_chunks).page_offset * case.page_size  # some of empty chunks
    places = {border + side for border in borders.tolist() for side in (-1, 0)} & {*range(max(case.kv_lens))}
    assert len(places) > num_chunks
    for place in sorted(places):
        assert_needle(case, place, *merge(*chunks(build(case, needle=place), num_chunks, xp)))


@pytest.mark.parametrize("page_size", [1, 8, 16])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("window_left", [-1, 30])
def test_every_nth_page_a_rank_merges_to_the_whole(num_ranks: int, page_size: int, window_left: int) -> None:
    kv_lens, q_lens = (100, 3, 0, 64), (20, 5, 1, 64)
    case = Case("by_rank", kv_lens, q_lens=q_lens, page_size=page_size, window_left=window_left, dtype="float32")
    inputs = build(case)
    whole, whole_lse = attend(inputs, inputs.table(), 1)
    parts = [attend(inputs, rank_table(inputs, rank, num_ranks), 1) for rank in range(num_ranks)]
    out, lse = (np.stack(arrays, axis=1) for arrays in zip(*parts, strict=True))
    merged, merged_lse = pa.merge_states(out, lse)
    assert_close(merged, whole, merged_lse, whole_lse, tolerance=1e-5)


def rank_table(inputs: Inputs, rank: int, num_ranks: int) -> pa.PageTable:
    """The table of the pages rank, rank + num_ranks, ... of every request."""
    pages = [inputs.indices[i:j][rank::num_ranks] for i, j in zip(inputs.indptr, inputs.indptr[1:], strict=False)]
    counts = np.diff(inputs.indptr)
    holds_last = (counts - 1) % num_ranks == rank
    page_size, batch_size = inputs.case.page_size, inputs.case.batch_size
    return pa.PageTable(
        np.cumsum([0, *map(len, pages)], dtype=np.int32),
        np.concatenate(pages),
        np.where(holds_last, inputs.last_page_len, page_size).astype(np.int32),
        page_size=page_size,
        page_offset=np.full(batch_size, rank, np.int32),
        page_stride=num_ranks,
        total_len=np.array(inputs.case.kv_lens, np.int32),
    )


def test_split_writes_the_rows_that_it_says() -> None:
    inputs = build(Case("rows", (70, 0, 16, 33)))
    ids = [inputs.indices[i:j].tolist() for i, j in zip(inputs.indptr, inputs.indptr[1:], strict=False)]
    table = inputs.table().split(2)
    rows = [table.indices[i:j].tolist() for i, j in zip(table.indptr, table.indptr[1:], strict=False)]
    assert rows == [ids[0][:2], [], [], ids[3][:1], ids[0][2:], [], ids[2], ids[3][1:]]
    assert table.last_page_len.tolist() == [16, 0, 0, 16, 6, 0, 16, 1]
    assert table.seq_lens.tolist() == [32, 0, 0, 16, 38, 0, 16, 17]
    assert table.total_len.tolist() == [70, 0, 16, 33] * 2
    assert [o for o, row in zip(table.page_offset, rows, strict=True) if row] == [0, 0, 2, 0, 1]
    twice = table.split(2)  # chunks of chunks
    assert twice.page_offset[8 + 4] == 3 and twice.total_len.tolist() == [70, 0, 16, 33] * 4
    again = inputs.table().split(2, out=table)
    assert again is table and table.seq_lens.tolist() == [32, 0, 0, 16, 38, 0, 16, 17]
