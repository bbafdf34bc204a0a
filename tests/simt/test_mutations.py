"""Breaking a kernel in one place turns a test red: here is the proof, for three places of every file and more.

A mutation changes the text of kernels/ in memory. One case of the other tests passes with the text as it stands, and
fails with the changed one. Mutations stay inside the arrays: what leaves them would end the process.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from tests import test_simt_shim as shim
from tests.simt import test_append as append
from tests.simt import test_check as check
from tests.simt import test_decode as decode
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


def tiles(requests: int, **fields: Any) -> Callable[[], None]:
    (found,) = [case for case in tile_tests.CASES if case == tile_tests.Case(requests, **fields)]
    return partial(tile_tests.test_the_longest_come_first, found)


def evens(number: int) -> Callable[[], None]:
    return partial(split_tests.test_requests_of_about_equal_length, *split_tests.EVEN[number])


def cuts(number: int, num_kv_heads: int) -> Callable[[], None]:
    return partial(split_tests.test_ragged_requests_are_cut_into_pieces, split_tests.RAGGED[number], num_kv_heads)


def wrong_value(field: str, at: int, value: int) -> Callable[[], None]:
    return partial(check.test_one_wrong_value, field, at, value, 1)


@dataclass(frozen=True)
class Mutation:
    """`right` stands once in the file; with `wrong` in its place `red` fails."""

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
        "decode.cu", "a mask off by one",
        "if (x < seen.begin || x >= seen.end) score", "if (x < seen.begin || x > seen.end) score",
        decodes("group1"),
    ),
    Mutation(
        "decode.cu", "wrong rows of V",
        "v_matrix = Rows::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1)",
        "v_matrix = Rows::at((lane & 7) + ((lane >> 3) & 1) * 8, lane >> 4)",
        decodes("group1"),
    ),
    Mutation(
        "decode.cu", "wrong rows of a Q in shared memory",
        "q_rows + Rows::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1)",
        "q_rows + Rows::at((lane & 7) + ((lane >> 3) & 1) * 8, lane >> 4)",
        decodes("group16_dim128"),
    ),
    Mutation(
        "decode.cu", "a partial state left out of the merge",
        "if (s + i * shares >= num_splits) continue;", "if (s + i * shares >= num_splits - 1) continue;",
        decodes("group1", 3),
    ),
    Mutation(
        "decode.cu", "pages counted from the first token instead of the first visible one",
        "divide(end - left + (lane & 15), p.positions.page_size);\n        return",
        "divide(visible - left + (lane & 15), p.positions.page_size);\n        return",
        decodes("window20"),
    ),
    Mutation(
        "decode.cu", "a page number too far on",
        "page = ODD ? next_page : page_after_next;", "page = page_after_next;",
        decodes("round_a_ring_of_3"),
    ),
    Mutation(
        "decode.cu", "the ring turned by one place",
        "turn(k_tile);", "k_tile += TILE_BYTES;",
        decodes("round_a_ring_of_4"),
    ),
    Mutation(
        "decode.cu", "K read before it is there",
        "wait_copies<STAGES - 1>();\n        __syncwarp();\n        float sums",
        "wait_copies<STAGES>();\n        __syncwarp();\n        float sums",
        decodes("group1"),
    ),
    Mutation(
        "decode.cu", "V read before it is there",
        "wait_copies<STAGES - 1>();\n        __syncwarp();\n        constexpr",
        "wait_copies<STAGES>();\n        __syncwarp();\n        constexpr",
        decodes("round_a_ring_of_3"),
    ),
    # -- prefill --
    Mutation(
        "prefill.cu", "a mask off by one",
        "if (u32(first + n * 8 + i) >= length)", "if (u32(first + n * 8 + i) > length)",
        prefills("group1"),
    ),
    Mutation(
        "prefill.cu", "wrong rows of V",
        "offsets.v[thread] = page * p.v_strides.page + slot * p.v_strides.slot",
        "offsets.v[thread] = page * p.v_strides.page + (slot ^ 1) * p.v_strides.slot",
        prefills("group1"),
    ),
    Mutation(
        "prefill.cu", "a query sees its neighbour's tokens",
        "kv_limits(token < last ? token : last,", "kv_limits(token < last ? token + 1 : last,",
        prefills("group1"),
    ),
    Mutation(
        "prefill.cu", "two lanes left out of a row's sum",
        "total += __shfl_xor_sync(~0u, total, 2);", "",
        prefills("group1"),
    ),
    # -- merge --
    Mutation(
        "merge.cu", "the last state left out",
        "first + lane < num_states;", "first + lane < num_states - 1;",
        merges(merge.test_merge_states),
    ),
    Mutation(
        "merge.cu", "the v of an empty state counts",
        "if (s == -INF) continue;", "",
        partial(merges(merge.test_empty_states_change_nothing), mark=-np.inf),
    ),
    Mutation(
        "merge.cu", "+inf is a score like any other",
        "if (own_s == INF) own_s = -INF;", "",
        partial(merges(merge.test_empty_states_change_nothing), mark=np.inf),
    ),
    Mutation(
        "merge.cu", "what was added up does not shrink",
        "sum *= keep;", "",
        merges(merge.test_merge_states, head_dim=16, num_states=70),
    ),
    Mutation(
        "merge.cu", "lse in the wrong base",
        "max + __fdividef(log2_fast(sum), log2_of_base)", "max + log2_fast(sum)",
        merges(merge.test_merge_states),
    ),
    Mutation(
        "merge.cu", "the layers of a grid fall together",
        "blockIdx.z * gridDim.y + blockIdx.y", "blockIdx.y",
        merges(merge.test_merge_states, heads=9, warps=5),
    ),
    Mutation(
        "merge.cu", "groups of heads from the axis of the rows",
        "p.row_major ? blockIdx.x : blockIdx.y", "blockIdx.x",
        merges(merge.test_merge_states, heads=9, warps=5),
    ),
    Mutation(
        "merge.cu", "the first score taken twice",
        "distance(s_a, s_b)", "distance(s_a, s_a)",
        merges(merge.test_merge_state, num_states=2),
    ),
    # -- append --
    Mutation("append.cu", "K into the pool of V", "+ chunk] = v;", "+ chunk] = k;", appends()),
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
    Mutation(
        "append.cu", "64-bit slots read as 32-bit ones",
        "p.slots_are_int ?", "true ?",
        appends(),
    ),
    # -- schedule --
    Mutation(
        "schedule.cu", "a last page may be empty",
        "clamp(last_page_len, 1, p.page_size)", "clamp(last_page_len, 0, p.page_size)",
        partial(schedule.test_a_wrong_value_is_made_right_and_recorded, "last_page_len", 0, 1),
    ),
    Mutation(
        "schedule.cu", "a page id past the pool",
        "page >= p.num_pages", "page > p.num_pages",
        partial(schedule.test_a_wrong_page_id_becomes_page_zero, 40),
    ),
    Mutation(
        "schedule.cu", "page ids from the beginning of indices on",
        "p.indices[first + entry]", "p.indices[entry]",
        schedule.test_some_rows_of_a_larger_table,
    ),
    Mutation(
        "schedule.cu", "capacity counted from 0",
        "begin >= 0 && end <= p.max_pages) return", "begin >= 0 && pages.end <= p.max_pages) return",
        schedule.test_some_rows_of_a_larger_table,
    ),
    Mutation(
        "schedule.cu", "a tile too many",
        "(num_queries * p.group_size + p.tile_rows - 1) / p.tile_rows",
        "(num_queries * p.group_size + p.tile_rows) / p.tile_rows",
        partial(schedule.test_right_tables, "prefill"),
    ),
    # -- splits --
    Mutation("splits.cu", "the shortest first", "LENGTH_CLASSES - 1 - length_class", "length_class", cuts(1, 8)),
    Mutation("splits.cu", "rows behind the batch among the others",  ": CLASSES - 1;", ": 0;", evens(4)),
    Mutation(
        "splits.cu", "what the first query sees",
        "kv_limits(request.num_queries - 1, request", "kv_limits(0, request",
        partial(split_tests.test_items_say_what_their_requests_see, split_tests.SEEN[0]),
    ),
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
    Mutation("tiles.cu", "the shortest first", "CLASSES - 1 - length_class", "length_class", tiles(31)),
    Mutation(
        "tiles.cu", "a started tile does not count",
        "(rows + p.tile_rows - 1) / p.tile_rows", "rows / p.tile_rows",
        tiles(31),
    ),
    Mutation(
        "tiles.cu", "no window is a narrow one",
        "p.window_left < 0 ? INT_LARGEST", "p.window_left < 0 ? 1",
        tiles(31),
    ),
    # -- table: one for each kernel --
    Mutation(
        "table.cu", "chunks of unequal beginnings",
        "int(index * num_pages / p.num_chunks)", "int(index * (num_pages / p.num_chunks))",
        splits(40, 5, 1),
    ),
    Mutation(
        "table.cu", "every chunk ends like the request",
        "whole && chunk.used.end == chunk.all.end ? last_page_len", "whole ? last_page_len",
        splits(3, 2, 1),
    ),
    Mutation(
        "table.cu", "split_pages copies from the wrong place",
        "p.indices[from + entry]", "p.indices[entry]",
        splits(3, 2, 4),
    ),
    Mutation(
        "table.cu", "seq_lens of every second row",
        "p.seq_lens[row] = ", "p.seq_lens[row / 2 * 2] = ",
        partial(table.test_seq_lens, 2),
    ),
    Mutation(
        "table.cu", "a started page does not count",
        "(seq_len + p.page_size - 1) / p.page_size", "seq_len / p.page_size",
        partial(table.test_from_block_table, 2, "plain"),
    ),
    Mutation(
        "table.cu", "a block table read by the wrong stride",
        "column * p.column_stride", "column",
        partial(table.test_from_block_table, 2, "columns"),
    ),
    Mutation(
        "table.cu", "a page too many in a block table",
        "column < num_pages ? p.indices", "column <= num_pages ? p.indices",
        partial(table.test_to_block_table, 2),
    ),
    Mutation(
        "table.cu", "slots of pages that others hold",
        "if (behind < 0 || behind % p.page_stride) return;", "if (behind < 0) return;",
        partial(table.test_slots, 5),
    ),
    Mutation(
        "table.cu", "one update for all",
        "p.update_value[update]", "p.update_value[0]",
        partial(table.test_update_table, 1),
    ),
    Mutation(
        "table.cu", "rows past the batch have pages",
        "row < p.batch ? int(row) : p.batch", "row < p.batch ? int(row) : 0",
        partial(table.test_update_table, 1),
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
        "check.cu", "a last page may be empty",
        "last_page_len < 1", "last_page_len < 0",
        wrong_value("last_page_len", 0, 0),
    ),
    Mutation(
        "check.cu", "a position past an int",
        "if (end > INT_LARGEST)", "if (end > INT_LARGEST + 1)",
        partial(check.test_positions_past_an_int, [2**27 - 11], 1, 16, "page_offset"),
    ),
    # -- the headers --
    Mutation(
        "page_table.cuh", "a query does not see itself",
        "positions.causal ? own + 1", "positions.causal ? own",
        decodes("group1"),
    ),
    Mutation(
        "page_table.cuh", "a window off by one",
        "tokens_before(own - positions.window_left,", "tokens_before(own + 1 - positions.window_left,",
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
        "attention_state.cuh", "an empty state counts",
        "common == -INF ? 0.f : common", "common",
        decodes("group12"),
    ),
    Mutation(
        "attention_state.cuh", "a sum that does not shrink",
        "state.sum *= keep;", "",
        decodes("group7", 3),
    ),
    Mutation(
        "attention_state.cuh", "a state that does not weigh its sum",
        "state.sum += others[i].sum * weights[i];", "state.sum += others[i].sum;",
        decodes("group1"),
    ),
    Mutation(
        "attention_state.cuh", "what stands in an empty state counts",
        "if (others[i].max == -INF) continue;", "",
        partial(decode.test_an_infinite_value_reaches_only_those_who_see_it, 1),
    ),
    Mutation(
        "attention_state.cuh", "lse to base 2",
        "(max + log2_fast(sum)) * LN_2", "(max + log2_fast(sum))",
        decodes("group1"),
    ),
    Mutation(
        "shared_rows.cuh", "a chunk reached without its swizzle",
        "(address ^ (within * 16))", "(address + within * 16)",
        decodes("group1"),
    ),
    Mutation(
        "shared_rows.cuh", "half the way along a row",
        "const int within = 2 * step % GROUP;", "const int within = step % GROUP;",
        decodes("group1"),
    ),
    Mutation(
        "shared_rows.cuh", "rows that overlap",
        "return row * BYTES + ", "return row * (BYTES - 16) + ",
        decodes("group1"),
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
        "table_rows.cuh", "every block of a row does the first part",
        "return {block / parts, block % parts, parts};", "return {block / parts, 0, parts};",
        partial(table.test_update_table, 1),
    ),
    Mutation(
        "convert.cuh", "tanh without its sign",
        "copysignf(__fdividef(1.0f - e, 1.0f + e), x)", "__fdividef(1.0f - e, 1.0f + e)",
        shim.test_functions_of_softmax,
    ),
    Mutation(
        "convert.cuh", "the polynomial too far from 0",
        "magnitude < 0.28f", "magnitude < 0.5f",
        shim.test_functions_of_softmax,
    ),
    Mutation(
        "convert.cuh", "tanh of half its argument",
        "magnitude * -2.885390082f", "magnitude * -1.442695041f",
        shim.test_functions_of_softmax,
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


def test_every_file_of_a_portable_kernel_has_three_mutations() -> None:
    """test_prefill_hopper.py has those of the kernel named *_hopper and of the headers that it alone includes; of two
    headers a portable kernel takes nothing but PTX."""
    sources = [kernels.load_source(name) for name in kernels.kernel_files() if not name.endswith("_hopper")]
    files = {file for source in sources for file in re.findall(r'^#line 1 "(.*)"', source, re.MULTILINE)}
    assert {"decode.cu", "mma.cuh"} < files
    counts = Counter(mutation.file for mutation in MUTATIONS)
    assert not [file for file in files - {"load_global.cuh", "mma.cuh"} if counts[file] < 3]


def test_a_missing_compiler_is_a_failure(tmp_path: Path) -> None:
    """Not a skip, whatever has been compiled before: CI without g++ would see no kernel at all."""
    test = check.test_no_page_is_in_an_empty_pool.__name__
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{check.__file__}::{test}")
    run = partial(subprocess.run, command, cwd=Path(__file__).parents[2], text=True, capture_output=True)
    assert run().returncode == 0
    without = run(env=os.environ | {"PATH": str(tmp_path)})
    assert without.returncode == 1, without.stdout
    assert "1 failed" in without.stdout
    assert "g++ is not on the PATH" in without.stdout
