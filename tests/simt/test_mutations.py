"""Tests that must notice what is easily missed: guards, empty states, waits for copies, ends of windows and rows.

A mutation changes the text of a kernel in memory. One case of the other tests passes with the text of the file, and
fails with the changed one. Mutations stay inside the arrays: what leaves them would end the process.
test_prefill_hopper.py has those of the Hopper kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from tests.simt import test_append as append
from tests.simt import test_check as check
from tests.simt import test_decode as decode
from tests.simt import test_exchange as exchange
from tests.simt import test_lengths as lengths
from tests.simt import test_merge as merge
from tests.simt import test_prefill as prefill
from tests.simt import test_schedule as schedule
from tests.simt import test_splits as split_tests
from tests.simt import test_table as table
from tests.simt import test_tiles as tile_tests
from tests.simt.driver import SimtError


def decodes(name: str, num_splits: int = 1) -> Callable[[], None]:
    (found,) = [case for case in decode.CASES if case.name == name]
    return partial(decode.test_cases, found, num_splits)


def prefills(name: str) -> Callable[[], None]:
    (found,) = [case for case in prefill.CASES if case.name == name]
    return partial(prefill.test_matches_the_float64_loop, found)


def appends(**fields: Any) -> Callable[[], None]:
    (found,) = [case for case in append.CASES if case == append.Case(**fields)]
    return partial(append.test_tokens_reach_their_slots, found)


def splits(batch: int, num_chunks: int, stride: int) -> Callable[[], None]:
    (found,) = [row for row in table.SPLITS if row[1:] == (batch, num_chunks, stride)]
    return partial(table.test_split, *found)


def merges(test: Callable[..., None], **fields: Any) -> Callable[[], None]:
    cases = merge.PAIRS if test is merge.test_merge_state else merge.CASES
    (found,) = [case for case in cases if case == merge.Case(**fields)]
    return partial(test, found)


def exchanges(**fields: Any) -> Callable[[], None]:
    (found,) = [case for case in exchange.CASES if case == exchange.Case(**fields)]
    return partial(exchange.test_steps_of_all_ranks, found)


def tiles(requests: int, **fields: Any) -> Callable[[], None]:
    (found,) = [case for case in tile_tests.CASES if case == tile_tests.Case(requests, **fields)]
    return partial(tile_tests.test_the_longest_come_first, found)


def cuts(number: int, num_kv_heads: int) -> Callable[[], None]:
    return partial(split_tests.test_ragged_requests_are_cut_into_pieces, split_tests.RAGGED[number], num_kv_heads)


def wrong_value(field: str, at: int, value: int) -> Callable[[], None]:
    return partial(check.test_one_wrong_value, field, at, value, 1)


@dataclass(frozen=True)
class Mutation:
    """`right` is in the file once; with `wrong` instead, `red` fails."""

    file: str
    what: str
    right: str
    wrong: str
    red: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


MUTATIONS = [
    # -- decode --
    Mutation(
        "scores.cuh", "a mask off by one",
        "if (x < begin || x >= end) score", "if (x < begin || x > end) score",
        decodes("group1"),
    ),
    Mutation(
        "scores.cuh", "a sink for rows without a request",
        "has_request ? __ldg(scoring.sinks + head) : -INF", "__ldg(scoring.sinks + head)",
        partial(decode.test_sinks, decode.SINKS[0], 1),
    ),
    Mutation(
        "decode.cu", "a partial state left out of the merge",
        "shares >= assignment.num_splits) continue;", "shares >= assignment.num_splits - 1) continue;",
        decodes("group1", 3),
    ),
    Mutation(
        "decode.cu", "pages counted from the first token instead of the first visible one",
        "kv_head, item.end, pool_policy(p)", "kv_head, visible, pool_policy(p)",
        decodes("window20"),
    ),
    Mutation(
        "decode.cu", "a page number too far on",
        "after_k_page = ring::MIXES ? after_v_page : next_page;", "after_k_page = next_page;",
        decodes("round_a_ring_of_3"),
    ),
    Mutation(
        "decode.cu", "K read before it is there",
        "wait_copies<STAGES - 1>();\n        __syncwarp();\n        multiply_k_q",
        "wait_copies<STAGES>();\n        __syncwarp();\n        multiply_k_q",
        decodes("group1"),
    ),
    Mutation(
        "decode.cu", "V read before it is there",
        "wait_copies<STAGES - 1>();\n        __syncwarp();\n        state.multiply_v_p",
        "wait_copies<STAGES>();\n        __syncwarp();\n        state.multiply_v_p",
        decodes("round_a_ring_of_3"),
    ),
    # -- prefill --
    Mutation(
        "prefill.cu", "a mask off by one",
        "seen.begin, seen.end, block", "seen.begin, seen.end + 1, block",
        prefills("group1"),
    ),
    Mutation(
        "prefill.cu", "a query sees its neighbour's tokens",
        "kv_limits(packed.token < last ? packed.token :", "kv_limits(packed.token < last ? packed.token + 1 :",
        prefills("group1"),
    ),
    # -- merge --
    Mutation(
        "state_lists.cuh", "the v of an empty state counts",
        "if (s == -INF) continue;", "",
        partial(merges(merge.test_empty_states_change_nothing), mark=-np.inf),
    ),
    Mutation(
        "state_lists.cuh", "+inf is a score like any other",
        "if (lane_s == INF) lane_s = -INF;", "",
        partial(merges(merge.test_empty_states_change_nothing), mark=np.inf),
    ),
    Mutation(
        "merge.cu", "the layers of a grid fall together",
        "blockIdx.z * gridDim.y + blockIdx.y", "blockIdx.y",
        merges(merge.test_merge_states, heads=9, warps=5),
    ),
    # -- exchange --
    Mutation(
        "exchange.cu", "a half that is used twice",
        "{int(epoch & 1),", "{int(epoch & 0),",
        exchange.test_a_rank_may_be_an_epoch_ahead,
    ),
    Mutation(
        "exchange.cu", "what was read does not wait again",
        "if (has_state && !is_own) store_system(s, NOT_YET);", "",
        exchanges(),
    ),
    Mutation(
        "exchange.cu", "a wait for v left out",
        "if (!is_here(reinterpret_cast<const uint4&>(loaded[turn][i]))) missing = from;", ";",
        exchanges(),
    ),
    Mutation(
        "exchange.cu", "a part for another rank",
        "warp < items ? warp : 0, next_rank(1)", "warp < items ? warp : 0, p.rank",
        exchanges(by_heads=True),
    ),
    Mutation(
        "exchange.cu", "a NaN means not yet",
        "return word == NOT_YET ? OTHER_NAN : word;", "return word;",
        partial(exchange.test_a_nan_goes_through_whatever_its_bits, exchange.F16),
    ),
    Mutation(
        "exchange.cu", "a lost rank is sent the next step",
        "item < items && !was_lost;", "item < items;",
        partial(exchange.test_a_rank_that_does_not_come, exchange.LOSSES[0]),
    ),
    Mutation(
        "state_lists.cuh", "what came of a row counts, though a rank is lost",
        "if (states.is_lost()) sum = 0.f;", "",
        partial(exchange.test_a_rank_that_does_not_come, exchange.LOSSES[1]),
    ),
    # -- append --
    Mutation(
        "append.cu", "the last piece forgotten",
        "piece < p.heads * CHUNKS;", "piece < p.heads * CHUNKS - 1;",
        appends(layout="HND"),
    ),
    Mutation(
        "append.cu", "-1 is a fault",
        "if (slot != -1 && threadIdx.x == 0)", "if (threadIdx.x == 0)",
        appends(page_size=3),
    ),
    # -- schedule --
    Mutation(
        "schedule.cu", "a page id past the pool",
        "page >= p.num_pages", "page > p.num_pages",
        partial(schedule.test_a_wrong_page_id_becomes_page_zero, 40),
    ),
    Mutation(
        "schedule.cu", "capacity counted from 0",
        "begin >= 0 && end <= p.max_pages) return", "begin >= 0 && pages.end <= p.max_pages) return",
        schedule.test_some_rows_of_a_larger_table,
    ),
    # -- splits --
    Mutation(
        "splits.cu", "a window forgotten",
        "kv_limits(0, request, p.positions).begin", "0",
        partial(split_tests.test_items_say_what_their_requests_see, split_tests.SEEN[1]),
    ),
    Mutation(
        "splits.cu", "partial states on one another",
        "split, splits, first_partial,", "split, splits, 0,",
        cuts(1, 8),
    ),
    # -- tiles --
    Mutation(
        "tiles.cu", "no window is a narrow one",
        "p.window_left < 0 ? INT_LARGEST", "p.window_left < 0 ? 1",
        tiles(31),
    ),
    # -- table --
    Mutation(
        "table.cu", "every chunk ends like the request",
        "whole && chunk.used.end == chunk.all.end ? last_page_len", "whole ? last_page_len",
        splits(3, 2, 1),
    ),
    Mutation(
        "table.cu", "slots of pages that others hold",
        "if (behind < 0 || behind % table.page_stride) return;", "if (behind < 0) return;",
        partial(table.test_slots, 5),
    ),
    Mutation(
        "table.cu", "rows past the batch have pages",
        "row < p.batch ? int(row) : p.batch", "row < p.batch ? int(row) : 0",
        partial(table.test_update_table, 1, 1),
    ),
    Mutation(
        "table.cu", "pages of other ranks",
        "(entry - out.begin) * p.page_stride]", "(entry - out.begin)]",
        partial(table.test_update_table, 1, 3),
    ),
    Mutation(
        "table.cu", "only the first layer copied",
        "blockIdx.y * p.layer_units", "0 * p.layer_units",
        partial(table.test_copy_pages, 3, 16, [(0, 4)], 1),
    ),
    # -- check --
    Mutation(
        "check.cu", "a page id past the pool",
        "page >= p.num_pages", "page > p.num_pages",
        wrong_value("indices", 8, 30),
    ),
    Mutation(
        "check.cu", "a position past an int",
        "if (end > INT_LARGEST)", "if (end > INT_LARGEST + 1)",
        partial(check.test_positions_past_an_int, [2**27 - 11], 1, 16, "page_offset"),
    ),
    # -- the headers --
    Mutation(
        "page_table.cuh", "a window off by one",
        "tokens_before(position - positions.window_left,", "tokens_before(position + 1 - positions.window_left,",
        decodes("window20"),
    ),
    Mutation(
        "page_table.cuh", "tokens of pages that others hold",
        "(whole * i64(stride) == behind ? slot : 0)", "slot",
        decodes("every_third_page_q_len9"),
    ),
    Mutation(
        "page_table.cuh", "a quotient too large",
        "by.multiplier) >> 32) >> by.shift)", "by.multiplier) >> 31) >> by.shift)",
        partial(table.test_slots, 5),
    ),
    Mutation(
        "page_table.cuh", "the last fault stays",
        "int(field)) == FAULT_NONE)", "int(field)) >= FAULT_NONE)",
        check.test_the_first_fault_stays,
    ),
    Mutation(
        "attention_state.cuh", "a sum that does not shrink",
        "state.sum *= keep;", "",
        decodes("group7", 3),
    ),
    Mutation(
        "attention_state.cuh", "what stands in an empty state counts",
        "if (others[i].max == -INF) continue;", "",
        partial(decode.test_an_infinite_value_reaches_only_those_who_see_it, 1),
    ),
    Mutation(
        "table_rows.cuh", "a row that ends before it begins",
        "if (begins && end >= begin && end <= limit)", "if (begins && end <= limit)",
        wrong_value("indptr", 5, 8),
    ),
    Mutation(
        "table_rows.cuh", "the warps before do not count",
        "if (warp > 0) before = combine(before, warps_before);", "",
        partial(schedule.test_right_tables, "several chunks of rows"),
    ),
    Mutation(
        "lengths.cu", "an empty sequence has an owner",
        "total_len == 0 ? 0 : behind", "behind",
        partial(lengths.test_it_is_the_same_on_all_ranks_and_no_other_lengths_have_it, 33, 3),
    ),
    Mutation(
        "lengths.cu", "the last one that differs",
        "theirs < found ? theirs", "theirs != ~0u && theirs > found % ~0u ? theirs",
        partial(lengths.test_each_rank_finds_the_first_that_says_something_else, [7, 7, 8], [3, 3, 1]),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_turns_its_test_red(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (kernels.kernel_dir() / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.right) == 1, f"{mutation.file} no longer has {mutation.right!r} once: renew it"
    mutation.red()

    load_source = kernels.load_source
    changed = []

    def load_mutated(name: str) -> str:
        source = load_source(name)
        changed.append(source.count(mutation.right))
        return source.replace(mutation.right, mutation.wrong)

    monkeypatch.setattr(kernels, "load_source", load_mutated)
    with pytest.raises((AssertionError, SimtError)) as raised:
        mutation.red()
    assert "g++" not in str(raised.value), raised.value
    assert 1 in changed and max(changed) == 1, "the case runs another kernel, or the text stands in another file too"
