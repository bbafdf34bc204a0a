"""The checksum of a step's lengths and its comparison, run on a CPU by the SIMT shim."""

from collections.abc import Sequence

import numpy as np
import pytest

from tests.simt.driver import launch
from tests.simt.guarded import Guarded

U64 = np.uint64


def checksum(total_len: Sequence[int], page_offset: Sequence[int], rank: int, num_ranks: int) -> int:
    guarded = Guarded()
    given = {"total_len": total_len, "page_offset": page_offset}
    arrays = {name: guarded.input(np.array(array, np.int32)) for name, array in given.items()}
    found = guarded.output(np.zeros(1, U64))
    launch("table_checksum", 1, 32, arrays | {
        "checksum": found, "batch": len(total_len), "rank": rank, "num_ranks": num_ranks,
    })  # fmt: skip
    guarded.check()
    return int(found[0])


def twin(total_len: Sequence[int], first: Sequence[int]) -> int:
    """The formula of kernels/lengths.cu."""

    def mixed(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ x >> shift) * factor % 2**64
        return x ^ x >> 31

    rows = enumerate(zip(total_len, first, strict=True))
    hashes = [mixed((mixed(i << 32 | length % 2**32) + (own if length else 0)) % 2**64) for i, (length, own) in rows]
    return sum(hashes) % 2**64


@pytest.mark.parametrize("batch", [0, 1, 31, 33, 200])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_it_is_the_same_on_all_ranks_and_no_other_lengths_have_it(batch: int, num_ranks: int) -> None:
    random = np.random.default_rng(batch)
    total_len, first = random.integers(0, 3000, batch), random.integers(0, num_ranks, batch)
    total_len[::5] = 0

    def of_rank(rank: int, total_len: np.ndarray = total_len, first: np.ndarray = first) -> int:
        offset = (rank - first) % num_ranks
        offset[total_len == 0] = 7  # what an empty sequence says does not count
        return checksum(total_len.tolist(), offset.tolist(), rank, num_ranks)

    right = twin(total_len.tolist(), first.tolist())
    assert {of_rank(rank) for rank in range(num_ranks)} == {right}
    for row in random.choice(batch, min(batch, 9), replace=False):
        longer, moved = total_len.copy(), first.copy()
        longer[row] += 1
        moved[row] = (moved[row] + 1) % num_ranks
        assert of_rank(0, longer) != right
        assert (of_rank(0, total_len, moved) == right) == (num_ranks == 1 or total_len[row] == 0)
    if batch > 1 and total_len[0] != total_len[-1]:
        swapped = total_len.copy()
        swapped[[0, -1]] = swapped[[-1, 0]]
        assert of_rank(0, swapped) != right


@pytest.mark.parametrize("value", [-(2**31), -1, 2**31 - 1])
def test_any_values_give_a_checksum(value: int) -> None:
    assert checksum([value, 5], [value, value], 2, 3) == twin([value, 5], [(2 - value) % 3] * 2)


@pytest.mark.parametrize(
    ("checksums", "expected"),
    [
        ([7], [0]),
        ([7, 7, 7], [0, 0, 0]),
        ([7, 7, 8], [3, 3, 1]),
        ([2**63, 0, 2**63], [2, 1, 2]),
        ([5] * 40 + [6], [41] * 40 + [1]),
        ([5, 6] + [5] * 68, [2, 1] + [2] * 68),
    ],
)
def test_each_rank_finds_the_first_that_says_something_else(checksums: list[int], expected: list[int]) -> None:
    guarded = Guarded()
    array = guarded.input(np.array([[value, 99 + i] for i, value in enumerate(checksums)], U64))
    for rank, first in enumerate(expected):
        status = guarded.output(np.full(1, 12345, np.uint32))
        launch("compare_checksums", 1, 32, {
            "checksums": array, "status": status, "stride": 2, "rank": rank, "num_ranks": len(checksums),
        })  # fmt: skip
        assert status[0] == first
    guarded.check()
