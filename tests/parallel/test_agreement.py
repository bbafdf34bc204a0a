"""What ranks say of a step, compared. tests/parallel/mpi_ranks.py has every fault, said by processes."""

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import parallel
from paged_attn.parallel.agreement import SEPARATOR, check_agreement, failure, lengths_statement, static_statement
from paged_attn.parallel.ranks import Ranks
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


def test_empty_batches_are_compared() -> None:
    comm = parallel.LocalRanks(2, "cpu")
    plan, one = parallel.BatchDecodeWithPagedKVCache(comm), Spread(comm, CASE)
    empty = Spread(comm, Case("empty", (), num_qo_heads=8))
    plan.plan(empty.kv, empty.table, 8)
    with pytest.raises(ValueError, match="batch_size differs between ranks: rank 0 said 0; rank 1 said 4"):
        plan.plan(one.kv, [empty.table[0], one.table[1]], 8)


def test_a_qo_indptr_of_another_library_is_compared() -> None:
    jax = pytest.importorskip("jax")
    comm, case = parallel.LocalRanks(2, "cpu"), Case("prefill", (20, 9), q_lens=(2, 1), num_qo_heads=8)
    one = Spread(comm, case)
    like = [jax.numpy.asarray(one.qo_indptr[0]), one.qo_indptr[1]]
    parallel.prefill(comm, one.q, like, one.kv, one.table)
    other = [jax.numpy.asarray(int32((0, 1, 3))), one.qo_indptr[1]]
    with pytest.raises(ValueError, match=r"qo_indptr differs between ranks: rank 0 said \[0 1 3\], rank 1 \[0 2 3\]"):
        parallel.prefill(comm, one.q, other, one.kv, one.table)


def test_numbers_of_numpy_are_capacities() -> None:
    comm = parallel.LocalRanks(2, "cpu")
    one = Spread(comm, CASE)
    plan = parallel.BatchDecodeWithPagedKVCache(comm, max_batch_size=np.int64(4), max_pages=np.int32(40))  # type: ignore[arg-type]
    plan.plan(one.kv, one.table, 8)


@pytest.mark.parametrize(("timeout", "error"), [("x", TypeError), (float("nan"), ValueError), (0, ValueError)])
def test_a_timeout_is_a_time(timeout: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout"):
        Ranks(1, (0,), ("cpu",), timeout)  # type: ignore[arg-type]


def test_ranks_of_one_process_are_compared_too() -> None:
    comm = parallel.LocalRanks(2, "cpu")
    one = Spread(comm, CASE)
    other = one.kv[1].to_layout("HND")
    with pytest.raises(pa.LayoutMismatchError, match="layout differs between ranks: rank 0 said NHD; rank 1 said HND"):
        parallel.decode(comm, one.q, [one.kv[0], other], one.table)
    with pytest.raises(pa.LayoutMismatchError, match="page_size=16"):  # by itself
        parallel.decode(comm, one.q, one.kv, Spread(comm, Case("agreement", (9,), page_size=8)).table)
    np.testing.assert_array_equal(*parallel.decode(comm, one.q, one.kv, one.table))
