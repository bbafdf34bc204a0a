"""The ways in which states travel: all of them give the same bits, and send as many bytes as they say."""

from typing import Any

import numpy as np
import pytest

from paged_attn import parallel
from paged_attn.parallel import messages
from paged_attn.parallel.messages import ALL_GATHER, BY_HEADS, BY_HEADS_AND_BACK, MessageRanks
from paged_attn.parallel.ranks import MergeShape
from tests.cases import Case
from tests.parallel.spread import Spread


class Copying(parallel.LocalRanks):
    """Ranks with memory of their own, whose messages are copied and counted. forced: the way, whatever the size."""

    def __init__(self, num_ranks: int, forced: str | None = None) -> None:
        super().__init__(num_ranks, "cpu")
        self.forced, self.sent = forced, 0

    def buffers(self, num_messages: int, num_bytes: int) -> list[Any]:
        return [np.full(num_messages * num_bytes, 0xFF, np.uint8) for _ in self.ranks]  # NaN

    def all_gather(self, buffers: list[np.ndarray]) -> None:
        for rank, source in enumerate(buffers):
            for peer, target in enumerate(buffers):
                if peer != rank:
                    target[rank] = source[rank]
                    self.sent += source[rank].nbytes

    def all_to_all(self, sent: list[np.ndarray], received: list[np.ndarray]) -> None:
        for rank, source in enumerate(sent):
            for peer, target in enumerate(received):
                target[rank] = source[peer]
                self.sent += source[peer].nbytes * (peer != rank)

    def way(self, shape: MergeShape) -> str:
        return self.forced or MessageRanks.way(self, shape)


def stated_bytes(way: str, num_ranks: int, rows: int, heads: int, dim: int, partial: int, out: int) -> int:
    """The formulas of paged_attn.parallel.attention; partial, out: bytes of a number."""

    def state(heads: int, itemsize: int) -> int:
        return sum(-(-rows * heads * number // 16) * 16 for number in (dim * itemsize, 4))

    if way == ALL_GATHER:
        return (num_ranks - 1) * state(heads, partial)
    back = state(heads // num_ranks, out) if way == BY_HEADS_AND_BACK else 0
    return (num_ranks - 1) * (state(heads // num_ranks, partial) + back)


CASES = (
    Case("messages", (130, 0, 77), num_qo_heads=8, sinks=True),
    Case("messages_odd", (13, 70), num_qo_heads=4, head_dim=6, page_size=3, dtype="bfloat16", q_len=3, sinks=True),
    Case("messages_prefill", (50, 20), num_qo_heads=8, q_lens=(50, 3), dtype="float64"),
)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("partial_dtype", ["float32", "the model's"])
def test_all_ways_give_the_same_bits_and_send_what_they_say(case: Case, num_ranks: int, partial_dtype: str) -> None:
    partial = case.dtype if partial_dtype == "the model's" else "float32"
    itemsizes = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
    for shard, ways in ((None, (ALL_GATHER, BY_HEADS_AND_BACK)), ("heads", (ALL_GATHER, BY_HEADS))):
        expected = Spread(parallel.LocalRanks(num_ranks, "cpu"), case).run(shard=shard, partial_dtype=partial)
        for way in ways:
            comm = Copying(num_ranks, way)
            spread = Spread(comm, case)
            plan = spread.plan(shard=shard, partial_dtype=partial)
            found = spread.lists(plan.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True))
            for array, same in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
                np.testing.assert_array_equal(array, same)
            rows, (heads, dim) = sum(case.queries), (case.num_qo_heads, case.head_dim)
            stated = stated_bytes(way, num_ranks, rows, heads, dim, itemsizes[partial], itemsizes[case.dtype])
            assert (plan.way, plan.bytes_a_step) == (way, stated)
            assert comm.sent == num_ranks * stated


@pytest.mark.parametrize(
    ("num_ranks", "rows", "heads", "shard", "way"),
    [
        (2, 32, 32, None, ALL_GATHER),
        (2, 2048, 32, None, BY_HEADS_AND_BACK),  # 34 MB, of which a quarter is saved
        (8, 4, 32, None, ALL_GATHER),
        (8, 64, 32, None, BY_HEADS_AND_BACK),
        (8, 512, 30, None, ALL_GATHER),  # heads that cannot be divided
        (8, 4, 32, "heads", BY_HEADS),
    ],
)
def test_the_way_is_chosen_by_size(num_ranks: int, rows: int, heads: int, shard: str | None, way: str) -> None:
    comm = Copying(num_ranks)
    shape = MergeShape(rows, heads, 128, np.dtype(np.float32), np.dtype(np.float16), shard)
    merge = comm.prepare(shape)
    assert (merge.way, merge.bytes_a_step) == (way, stated_bytes(way, num_ranks, rows, heads, 128, 4, 2))


def test_a_way_is_chosen_by_the_size_of_a_plan() -> None:
    comm = Copying(4)
    spread = Spread(comm, Case("size", (40, 7), num_qo_heads=32, head_dim=64))
    few, many = spread.plan(max_batch_size=2, max_pages=99), spread.plan(max_batch_size=4096, max_pages=99)
    assert (few.way, many.way) == (ALL_GATHER, BY_HEADS_AND_BACK)
    for plan in (few, many):
        spread.assert_right(spread.lists(plan.run(spread.q, spread.kv, return_lse=True)))


def test_states_are_copied_on_their_device() -> None:
    """CuPy would copy on the stream of the current device, before the states of another one are written."""
    done: list[str] = []

    class Device:
        def __enter__(self) -> None:
            done.append("enter")

        def __exit__(self, *_: object) -> None:
            done.append("leave")

    class OnCard:
        dtype, device = np.dtype(np.float32), Device()

        def view(self, dtype: str) -> "OnCard":
            return self

        def __setitem__(self, index: object, value: object) -> None:
            done.append("copy")

    messages._copy(OnCard(), OnCard())
    assert done == ["enter", "copy", "leave"]
