"""plan_splits, run on a CPU by the SIMT shim: every split of every request once, the longest first, by the rule."""

from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from paged_attn.card import H100
from paged_attn.splits import DecodeSplits, decode_splits
from tests.cases import Case, build
from tests.simt.driver import launch
from tests.simt.requests import requests_of, seen_of
from tests.specs import decode_recipe

TILE = 16
NUM_SMS = H100.num_sms


def plan(
    kv_lens: list[int], num_kv_heads: int, *, spare: int = 0, window_left: int = -1, batch_invariant: bool = False,
    extra_items: int | None = None, columns: int = 8,
) -> tuple[np.ndarray, DecodeSplits]:  # fmt: skip
    """The items, idle ones included, of requests of these lengths in a plan with `spare` more rows."""
    rows = len(kv_lens) + spare
    recipe = decode_recipe(columns, 64, batch_invariant=batch_invariant)
    splits = decode_splits(len(kv_lens), num_kv_heads, recipe, batch_invariant, sum(kv_lens), H100)
    extra = splits.extra_items if extra_items is None else extra_items
    requests = np.zeros(rows + 1, kernels.params_dtype(kernels.load_source("plan_splits"), "Request"))
    requests["kv_len"][: len(kv_lens)] = requests["total_len"][: len(kv_lens)] = kv_lens
    requests["num_queries"] = 1
    requests["first_page"] = np.arange(rows + 1)
    return run(requests, len(kv_lens), extra, splits, window_left=window_left), splits


def run(
    requests: np.ndarray, batch: int, extra_items: int, splits: DecodeSplits, *, page_size: int = 16,
    page_stride: int = 1, window_left: int = -1,
) -> np.ndarray:  # fmt: skip
    """One launch for the first `batch` of these requests, behind which a sentinel stands; its items."""
    rows = len(requests) - 1
    dtype = kernels.params_dtype(kernels.load_source("plan_splits"), "DecodeItem")
    items = np.full(rows + extra_items, -7, "i4").repeat(16).view(dtype)
    params: dict[str, Any] = {
        "requests": requests,
        "items": items,
        "batch": batch,
        "max_batch_size": rows,
        "max_items": items.size,
        "extra_items": extra_items,
        "positions": {
            "page_size": kernels.fast_divide(page_size),
            "page_stride": page_stride,
            "causal": True,
            "window_left": window_left,
        },
        "ctas_an_item": splits.ctas_per_item,
        "num_sms": NUM_SMS,
        "ctas_at_a_time": splits.ctas_at_a_time,
        "ragged_ctas": splits.ragged_ctas,
        "fixed_splits": splits.fixed_splits,
    }
    launch("plan_splits", 1, 64, params, 258 * 4 + 256 + 4)
    return items


SEEN = [
    Case("queries", (300, 2, 0, 17), q_len=5, num_kv_heads=2),
    Case("window", (300, 20, 1, 0), q_len=3, num_kv_heads=2, window_left=40),
    Case("every_third_page", (72, 16, 0, 1), q_len=9, num_kv_heads=2, page_size=8, page_offsets=(1, 1, 1, 1),
         page_stride=3, total_lens=(200, 45, 3, 9), window_left=90),
    Case("middle_chunk", (48, 64, 16), q_len=2, num_kv_heads=2, page_offsets=(2, 1, 0), total_lens=(130, 65, 16)),
]  # fmt: skip


@pytest.mark.parametrize("case", SEEN, ids=str)
def test_items_say_what_their_requests_see(case: Case) -> None:
    requests = requests_of(build(case), case.batch_size + 1)
    splits = DecodeSplits(case.num_kv_heads, 0, NUM_SMS, NUM_SMS, 49)
    items = run(
        requests, case.batch_size, splits.extra_items, splits, page_size=case.page_size, page_stride=case.page_stride,
        window_left=case.window_left,
    )  # fmt: skip
    used = items[items["batch_index"] >= 0]
    assert set(used["batch_index"]) == set(range(case.batch_size))
    begin, end = seen_of(build(case), requests[:-1])
    assert (used["begin"] == begin[used["batch_index"]]).all() and (used["end"] == end[used["batch_index"]]).all()
    tiles = -(-(used["end"] - used["begin"]) // TILE)
    assert (used["num_splits"] <= np.maximum(tiles, 1)).all()


def check(items: np.ndarray, kv_lens: list[int], spare: int, most_partials: int) -> np.ndarray:
    """Every split once, partial states apart, the order; returns the number of splits of each row."""
    used = items[items["batch_index"] >= 0]
    assert (items[len(used) :]["batch_index"] == -1).all()
    rows = np.arange(len(kv_lens) + spare)
    num_splits = np.array([(used["batch_index"] == row).sum() for row in rows])
    places: set[int] = set()
    for row in rows:
        own = used[used["batch_index"] == row]
        assert sorted(own["split"]) == list(range(num_splits[row])) and num_splits[row] >= 1
        assert (own["num_splits"] == num_splits[row]).all() and (own["request"]["first_page"] == row).all()
        if num_splits[row] > 1:
            first = int(own["first_partial"][0])
            assert (own["first_partial"] == first).all() and first + num_splits[row] <= most_partials
            taken = set(range(first, first + num_splits[row]))
            assert not places & taken
            places |= taken
    lengths = np.array([*kv_lens, *[0] * spare])[used["batch_index"]] // used["num_splits"]
    assert (lengths[1:] <= lengths[:-1] * 1.125 + 1).all(), "the longest come first"
    assert (used["batch_index"][len(used) - spare :] >= len(kv_lens)).all(), "rows behind the batch come last"
    return num_splits


EVEN = [
    ([4096], 8, 16),
    ([4096], 1, 32),
    ([32768], 1, 64),
    ([4096], 2, 32),
    ([2**20], 1, 132),
    ([32768], 32, 4),
    ([4096] * 4, 8, 4),
    ([4096] * 16, 8, 1),
    ([4096] * 64, 1, 2),
    ([4096] * 66, 1, 2),
    ([4096] * 67, 1, 1),
    ([4096, 4000, 4090, 0, 0], 8, 5),
    ([100], 8, 7),
    ([1], 8, 1),
    ([0, 0], 8, 1),
]


@pytest.mark.parametrize(("kv_lens", "num_kv_heads", "expected"), EVEN)
def test_requests_of_about_equal_length(kv_lens: list[int], num_kv_heads: int, expected: int) -> None:
    items, splits = plan(kv_lens, num_kv_heads, spare=2)
    num_splits = check(items, kv_lens, 2, splits.most_partials)
    assert (num_splits[: len(kv_lens)][np.array(kv_lens) > 0] == expected).all()
    assert (num_splits[: len(kv_lens)][np.array(kv_lens) == 0] == 1).all()


def test_requests_that_give_all_sms_the_same_stay_whole() -> None:
    for busy, num_kv_heads, num_whole, splits_of_others in (
        (16, 8, 16, 1), (20, 8, 16, 4), (24, 8, 16, 2), (33, 8, 33, 1), (35, 8, 33, 8), (40, 8, 33, 4),
        (140, 1, 132, 8), (5, 32, 4, 4), (3, 200, 3, 1),
    ):  # fmt: skip
        kv_lens = [4096, 0] * busy
        items, splits = plan(kv_lens, num_kv_heads, spare=1)
        num_splits = check(items, kv_lens, 1, splits.most_partials)
        assert list(num_splits[: 2 * busy : 2]) == [1] * num_whole + [splits_of_others] * (busy - num_whole)
        assert (num_splits[1::2] == 1).all()
    items, splits = plan([600] * 35, 8)  # short ones are not worth a split
    assert (check(items, [600] * 35, 0, splits.most_partials) == 1).all()


RAGGED = [
    [262144] + [500] * 255,
    [128 + 997 * i % 16000 for i in range(64)],
    [int(2 ** (10 + i / 10.7)) for i in range(64)],
    [32768, 1000, 1000, 1000],
    [4096, 100],
    [2**30] * 3 + [1],
]


@pytest.mark.parametrize("kv_lens", RAGGED)
@pytest.mark.parametrize("num_kv_heads", (1, 8, 32))
def test_ragged_requests_are_cut_into_pieces(kv_lens: list[int], num_kv_heads: int) -> None:
    items, splits = plan(kv_lens, num_kv_heads)
    num_splits = check(items, kv_lens, 0, splits.most_partials)
    total = sum(kv_lens)
    pieces = np.array(kv_lens) / num_splits
    # No piece is long beside what each of the CTAs should have, to within a step of 128 tokens and the least piece:
    # 2048 tokens or, if that is less, an SM's share.
    least = min(max(total * num_kv_heads / NUM_SMS, 256), 2048)
    assert pieces.max() <= max(total * num_kv_heads / splits.ragged_ctas, least) + 128


def test_a_least_piece_keeps_short_requests_whole() -> None:
    items, splits = plan([100 + 14 * i for i in range(64)], 8)
    assert (check(items, [100 + 14 * i for i in range(64)], 0, splits.most_partials) == 1).all()
    one_long = [8000] + [100] * 16  # an SM's share is 582 tokens
    items, splits = plan(one_long, 8)
    assert list(check(items, one_long, 0, splits.most_partials)) == [13] + [1] * 16  # pieces of 640


def test_a_batch_invariant_plan_looks_at_nobody_else() -> None:
    together = [5000, 17, 0, 90000, 512, 1008, 1009]
    expected = [9, 1, 1, 32, 1, 1, 2]  # one for each 512 tokens, rounded to the next 16
    items, splits = plan(together, 8, batch_invariant=True)
    assert list(check(items, together, 0, splits.most_partials)) == expected
    for kv_len, num_splits in zip(together, expected, strict=True):
        items, splits = plan([kv_len], 8, batch_invariant=True)
        assert list(check(items, [kv_len], 0, splits.most_partials)) == [num_splits]


def test_a_window_counts_and_too_many_items_leave_requests_whole() -> None:
    items, splits = plan([100000, 2000, 3000], 8, window_left=500)
    assert len(set(check(items, [501] * 3, 0, splits.most_partials))) == 1  # within the window all are alike
    items, _ = plan([4096] * 4, 8, extra_items=7)
    assert sorted(check(items, [4096] * 4, 0, 14)) == [1, 1, 4, 4]
