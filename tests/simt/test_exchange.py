"""The exchange of several ranks, each in a thread of its own, on a CPU by the SIMT shim, against merge_states."""

import threading
import time
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest

import paged_attn as pa
from paged_attn import compile as kernels
from paged_attn.recipes import exchange_recipe
from tests.simt.driver import build, launch
from tests.simt.guarded import Guarded
from tests.simt.test_merge import bits

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
LONG, SHORT = 60.0, 3.0  # seconds of a wait that ends, and of one that does not: threads share a few cores
SAFE = 4.0  # and of one that does not where a kernel is wrong (test_mutations.py)


@dataclass(frozen=True)
class Case:
    num_ranks: int = 2
    rows: int = 3
    heads: int = 4
    dim: int = 128
    v: np.dtype = F32
    out: np.dtype = F16
    by_heads: bool = False
    blocks: int = 2  # with items
    spare_rows: int = 0  # of the memory that waits

    def __str__(self) -> str:
        shape = f"{self.num_ranks}ranks-{self.rows}x{self.heads}x{self.dim}"
        return f"{shape}-{self.v.name}-{self.out.name}-{self.blocks}blocks" + "-by_heads" * self.by_heads

    @property
    def part(self) -> int:
        return self.heads // self.num_ranks if self.by_heads else self.heads

    @property
    def capacity(self) -> int:
        return (self.rows + self.spare_rows) * self.part


CASES = [
    Case(),
    Case(by_heads=True),
    Case(num_ranks=1),
    Case(num_ranks=3, heads=6, by_heads=True, v=BF16, out=BF16, spare_rows=2),
    Case(num_ranks=3, heads=5, dim=80, v=F32, out=BF16),
    Case(num_ranks=4, rows=7, heads=1, v=F16, out=F16, blocks=1),
    Case(num_ranks=8, heads=8, by_heads=True),
    Case(num_ranks=8, rows=1, heads=2, dim=256, out=F32, blocks=1),
    Case(num_ranks=8, rows=1, heads=2, dim=16, v=F16, out=F32, blocks=1),
    Case(num_ranks=4, rows=2, heads=4, dim=512, out=BF16, by_heads=True),
    Case(num_ranks=3, rows=7, heads=9, dim=64, by_heads=True, blocks=1),  # more items than warps
]


@dataclass
class Rank:
    """What a rank has: memory that waits for the others' states, and what outlives a step."""

    v: np.ndarray
    s: np.ndarray
    lengths: np.ndarray
    epochs: np.ndarray
    status: np.ndarray = field(default_factory=lambda: np.zeros(2, np.uint32))


class Ranks:
    """Memory of all ranks of a case, and steps of those that come."""

    def __init__(self, case: Case, timeout: float = LONG) -> None:
        self.case, self.timeout, self.guarded = case, timeout, Guarded()
        recipe = exchange_recipe(case.dim, case.v, case.out)
        self.threads, self.constants = recipe.num_threads, dict(recipe.constants)
        n, capacity = case.num_ranks, case.capacity
        shapes = ((2, n, capacity, case.dim), case.v), ((2, n, capacity), np.uint32), ((2, n), np.uint64)
        self.ranks = []
        for _ in range(n):
            empty = (np.full(np.empty(shape, dtype).nbytes, 0xFF, np.uint8).view(dtype) for shape, dtype in shapes)
            memory = [
                self.guarded.output(bits(x).reshape(shape), 16) for x, (shape, _) in zip(empty, shapes, strict=True)
            ]
            self.ranks.append(
                Rank(*memory, self.guarded.output(np.zeros((case.blocks + 1) * self.threads // 32, np.uint32)))
            )
        source = kernels.load_source("exchange")  # compiled here, not in each thread
        for rank in range(n):
            build(source, "exchange", tuple(sorted(self.constants.items())), rank)

    def step(
        self,
        v: np.ndarray,
        s: np.ndarray,
        sinks: np.ndarray | None = None,
        *,
        lengths: list[int] | None = None,
        absent: tuple[int, ...] = (),
        late: dict[int, float] | None = None,
        reverse: tuple[int, ...] = (),
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """v [num_ranks, rows, heads, dim], s [num_ranks, rows, heads] -> (out, lse) of each rank, NaN of absent ones.

        late: by rank, seconds until it comes. reverse: ranks whose threads take turns in the opposite order.
        """
        case = self.case
        rows, failures = v.shape[1], []
        results = [
            (self.guarded.output(bits(np.full((rows, case.part, case.dim), np.nan, case.out)), 16),
             self.guarded.output(np.full((rows, case.part), np.nan, np.float32)))
            for _ in range(case.num_ranks)
        ]  # fmt: skip
        address = {name: [getattr(rank, name).ctypes.data for rank in self.ranks] for name in ("v", "s", "lengths")}
        padded = {f"{name}_of": tuple(found + [0] * (8 - len(found))) for name, found in address.items()}

        def run(rank: int) -> None:
            time.sleep((late or {}).get(rank, 0))
            out, lse = results[rank]
            mine = self.ranks[rank]
            fields = {
                "v": self.guarded.input(bits(v[rank]), 16), "s": self.guarded.input(s[rank]), "out": out, "lse": lse,
                "sinks": sinks, "rows": rows, "heads": case.heads, "part": case.part, "rank": rank,
                "num_ranks": case.num_ranks, "capacity": case.capacity, "timeout": int(self.timeout * 1e9),
                "lengths": np.array([lengths[rank] if lengths else 7], np.uint64), "epochs": mine.epochs,
                "status": mine.status, **padded,
            }  # fmt: skip
            try:
                launch(
                    "exchange", case.blocks + 1, self.threads, fields, reverse=rank in reverse, instance=rank,
                    **self.constants,
                )  # fmt: skip
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(case.num_ranks) if rank not in absent]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        self.guarded.check()
        return [(out.view(case.out), lse) for out, lse in results]

    def status(self) -> list[list[int]]:
        return [rank.status.tolist() for rank in self.ranks]


def states(case: Case, seed: int = 0, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((case.num_ranks, rows or case.rows, case.heads, case.dim)).astype(case.v)
    return v, (rng.standard_normal(v.shape[:-1]) * 3).astype(np.float32)


def assert_merged(
    case: Case, results: list[tuple[np.ndarray, np.ndarray]], v: np.ndarray, s: np.ndarray,
    sinks: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Each rank has the reference's result, and all have the same bits."""
    want, want_lse = pa.merge_states(
        v.swapaxes(0, 1).astype(np.float32), s.swapaxes(0, 1), sinks=sinks, out=np.empty(v.shape[1:], np.float32)
    )
    for rank, (out, lse) in enumerate(results):
        heads = slice(rank * case.part, (rank + 1) * case.part) if case.by_heads else slice(None)
        error = np.linalg.norm(out.astype(np.float64) - want[:, heads], axis=-1)
        limit = {F32: 2e-6, F16: 1e-3, BF16: 6e-3}[case.out] * np.linalg.norm(want[:, heads], axis=-1)
        assert (error <= limit).all(), (rank, error.max())
        np.testing.assert_allclose(lse, want_lse[:, heads], rtol=1e-6, atol=2e-6)
        if not case.by_heads:
            np.testing.assert_array_equal(bits(out), bits(results[0][0]))
            np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_of_all_ranks(case: Case) -> None:
    """Four epochs use each half of the memory twice. Any rank may be late, and threads run in any order."""
    ranks = Ranks(case)
    for epoch in range(4):
        v, s = states(case, epoch)
        sinks = np.linspace(-3, 4, case.heads).astype(np.float32) if epoch % 2 else None
        results = ranks.step(v, s, sinks, late={epoch % case.num_ranks: 0.02}, reverse=(epoch % 3,))
        assert_merged(case, results, v, s, sinks)
        for rank in ranks.ranks:  # all that was read waits again
            assert all((array.view(np.uint8) == 0xFF).all() for array in (rank.v, rank.s, rank.lengths))
            assert (rank.epochs == epoch + 1).all()
    assert ranks.status() == [[0, 0]] * case.num_ranks


@pytest.mark.parametrize(
    "case", [Case(out=F32), Case(v=BF16, out=BF16, num_ranks=4), Case(dim=80, num_ranks=3)], ids=str
)
def test_the_bits_are_those_of_merge_states(case: Case) -> None:
    v, s = states(case)
    out, lse = np.zeros(v.shape[1:], case.out), np.zeros(s.shape[1:], np.float32)
    strides = {"v_state_stride": v[0].size, "v_row_stride": v[0, 0].size, "v_head_stride": case.dim}
    strides |= {"s_state_stride": s[0].size, "s_row_stride": case.heads, "s_head_stride": 1}
    fields = {
        "v": bits(v), "s": s, "out": bits(out), "lse": lse, "rows": case.rows, "num_states": case.num_ranks,
        "heads": case.heads, "row_major": 1, "log2_of_base": np.log2(np.e), **strides,
    }  # fmt: skip
    ranks = Ranks(case)
    launch("merge_states", (-(-case.heads // 4), case.rows), 128, fields, **ranks.constants | {"SINKS": 0})
    for found, found_lse in ranks.step(v, s):
        np.testing.assert_array_equal(bits(found), bits(out))
        np.testing.assert_array_equal(found_lse, lse)


@pytest.mark.parametrize(
    "case", [Case(), Case(num_ranks=3, heads=3, by_heads=True, v=F16), Case(num_ranks=4, dim=256)], ids=str
)
@pytest.mark.parametrize("mark", [-np.inf, np.inf])
def test_empty_states_change_nothing(case: Case, mark: float) -> None:
    """Whatever is in their v, NOT_YET, too; and a row that no rank saw is 0 / -inf."""
    v, s = states(case, 1)
    empty = np.random.default_rng(2).random(s.shape) < 0.5
    empty[:, 0] = True
    s[empty] = mark
    poisoned = v.copy()
    poisoned.view(f"u{case.v.itemsize}")[empty] = -1 & (2 ** (8 * case.v.itemsize) - 1)
    v[empty] = 0
    for sinks in (None, np.linspace(-3, 4, case.heads).astype(np.float32)):
        results = Ranks(case).step(poisoned, s, sinks)
        assert_merged(case, results, v, s, sinks)
        if sinks is None:
            assert not any(out[0].any() or (lse[0] != -np.inf).any() for out, lse in results)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_nan_goes_through_whatever_its_bits(dtype: np.dtype) -> None:
    """The one that means "not yet", too."""
    case = Case(v=dtype, out=F32)
    v, s = states(case)
    v.view(f"u{dtype.itemsize}")[0, 1, 2, 4:6] = 2 ** (8 * dtype.itemsize) - 1
    s.view(np.uint32)[1, 2, 3] = 2**32 - 1
    for out, lse in Ranks(case, SAFE).step(v, s):
        assert np.isnan(out[1, 2, 4:6]).all() and np.isnan(out[2, 3]).all() and np.isnan(lse[2, 3])
        assert np.isnan(out).sum() == 2 + case.dim and np.isnan(lse).sum() == 1


def test_steps_of_fewer_rows_and_of_none() -> None:
    case = Case(num_ranks=3, spare_rows=6, heads=3, by_heads=True)
    ranks = Ranks(case)
    for epoch, rows in enumerate((9, 1, 0, 9, 4)):
        v, s = (array[:, :rows] for array in states(case, epoch, 9))
        results = ranks.step(v, s)
        assert_merged(case, results, v, s)
    assert all((rank.epochs == 4).all() for rank in ranks.ranks)  # nobody waits for no rows


def test_a_rank_may_be_an_epoch_ahead() -> None:
    """Rank 0 is through with two steps, for which rank 1 has sent its states, before rank 1 looks at the first."""
    case = Case()
    ranks, given = Ranks(case, SAFE), [states(case, epoch) for epoch in range(2)]
    for epoch, (v, s) in enumerate(given):
        ranks.ranks[0].v[epoch, 1] = v[1].reshape(-1, case.dim)
        ranks.ranks[0].s[epoch, 1] = s[1].reshape(-1).view(np.uint32)
        ranks.ranks[0].lengths[epoch, 1] = 7
    ahead = [ranks.step(v, s, absent=(1,))[0] for v, s in given]
    behind = [ranks.step(v, s, absent=(0,))[1] for v, s in given]
    for (v, s), *results in zip(given, ahead, behind, strict=True):
        assert_merged(case, results, v, s)


LOSSES = [Case(num_ranks=3, heads=6, by_heads=True), Case(num_ranks=8, rows=1, dim=256, out=F32)]


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_a_rank_that_does_not_come(case: Case) -> None:
    """The others stop waiting, say who it was, and give 0 / -inf; behind that no launch sends or waits."""
    ranks, absent = Ranks(case, SHORT), case.num_ranks - 2
    sinks = np.ones(case.heads, np.float32)
    for epoch in range(2):
        v, s = states(case, epoch)
        begin = time.monotonic()
        results = ranks.step(v, s, sinks, absent=(absent,))
        assert epoch or time.monotonic() - begin >= SHORT
        for rank, (out, lse) in enumerate(results):
            if rank != absent:
                assert not out.any() and (lse == -np.inf).all()
        assert ranks.status() == [[0 if rank == absent else absent + 1, 0] for rank in range(case.num_ranks)]
    ranks.timeout = LONG
    begin = time.monotonic()
    ranks.step(v, s, absent=(absent,))
    assert time.monotonic() - begin < LONG / 2
    halves = ranks.ranks[absent].s.reshape(2, case.num_ranks, -1)
    assert (halves[1] == 2**32 - 1).all(), "a lost rank was sent more than the first step"


def test_a_rank_that_comes_too_late_finds_out() -> None:
    case = Case(blocks=1)  # which run one after the other here: a second one finds the rank lost
    ranks = Ranks(case, SHORT)
    v, s = states(case)
    ranks.step(v, s, absent=(1,))
    (_, first), (out, lse) = ranks.step(v, s, late={1: 0.1})
    assert (first == -np.inf).all()
    assert_merged(case, [(out, lse)], v, s)  # it has what the first step sent
    ranks.step(v, s, absent=(0,))
    assert ranks.status() == [[2, 0], [1, 0]]


@pytest.mark.parametrize("lengths", [[5, 5, 6], [2**64 - 1, 2**64 - 1, 2**63]])
def test_lengths_that_differ(lengths: list[int]) -> None:
    case = Case(num_ranks=3, heads=3)
    ranks = Ranks(case)
    v, s = states(case)
    assert_merged(case, ranks.step(v, s, lengths=[lengths[0]] * 3), v, s)
    assert ranks.status() == [[0, 0]] * 3
    assert_merged(case, ranks.step(v, s, lengths=lengths), v, s)
    assert ranks.status() == [[0, 3], [0, 3], [0, 1]]
