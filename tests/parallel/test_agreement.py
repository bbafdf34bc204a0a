"""What ranks say of a step, compared. tests/parallel/mpi_ranks.py has every fault, said by processes."""

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import parallel
from paged_attn.parallel.agreement import SEPARATOR, check_agreement, failure, lengths_statement, static_statement
from tests.cases import Case, build
from tests.parallel.spread import Spread, int32, spread
from tests.specs import spec_of

CASE = Case("agreement", (100, 0, 33, 7), num_qo_heads=8)


def statements(
    offsets: list[list[int]], total_lens: list[tuple[int, ...]] | None = None, **options: str
) -> list[bytes]:
    """Of ranks with these page_offset."""
    made = []
    for rank, (offset, mine) in enumerate(zip(offsets, spread(build(CASE), len(offsets)), strict=True)):
        table = mine.table()
        total_len = table.total_len if total_lens is None else int32(total_lens[rank])
        table._set(page_offset=int32(offset), total_len=total_len)
        lengths = lengths_statement(table, None, rank, len(offsets))
        made.append(static_statement(spec_of(CASE), table) + SEPARATOR + lengths)
    return made


def test_ranks_that_own_pages_in_any_order_agree() -> None:
    """In turn, as a cache has it; in another order of ranks; and an empty sequence may say what it likes."""
    in_turn = statements([[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]])
    assert len(set(in_turn)) == 1
    check_agreement(in_turn)
    check_agreement(statements([[3, 0, 2, 0], [2, 0, 1, 1], [1, 0, 0, 2]]))


def test_a_page_that_belongs_to_two_ranks_is_named() -> None:
    with pytest.raises(ValueError, match=r"a page of request 2 .*ranks 0, 2 said 2; rank 1 said 0; each rank has"):
        check_agreement(statements([[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 5, 2]]))


def test_lengths_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"total_len\[3\] differs between ranks: ranks 0, 1 said 7; rank 2 said 9; "):
        check_agreement(statements([[0] * 4, [1] * 4, [2] * 4], [CASE.kv_lens, CASE.kv_lens, (100, 0, 33, 9)]))


def test_a_rank_that_cannot_plan_is_named_whatever_the_others_say() -> None:
    failed = failure(ValueError("no pages\nat all")) + SEPARATOR
    for every in ([failed, failed], [*statements([[0] * 4]), failed], [failed, b"{}" + SEPARATOR]):
        with pytest.raises(ValueError, match=r"rank [01] cannot plan this step, .*ValueError: no pages\nat all"):
            check_agreement(every)


def test_ranks_of_one_process_are_compared_too() -> None:
    comm = parallel.LocalRanks(2, "cpu")
    one = Spread(comm, CASE)
    other = one.kv[1].to_layout("HND")
    with pytest.raises(pa.LayoutMismatchError, match="layout differs between ranks: rank 0 said NHD; rank 1 said HND"):
        parallel.decode(comm, one.q, [one.kv[0], other], one.table)
    with pytest.raises(pa.LayoutMismatchError, match="page_size=16"):  # by itself
        parallel.decode(comm, one.q, one.kv, Spread(comm, Case("agreement", (9,), page_size=8)).table)
    np.testing.assert_array_equal(*parallel.decode(comm, one.q, one.kv, one.table))
