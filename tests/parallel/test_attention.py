"""Attention over ranks of one process against attention on one device, on NumPy and on a card."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import paged_attn as pa
from paged_attn import parallel
from tests.cases import DECODE, NEEDLE_CASES, PREFILL, SINKS, V_DIMS, Case, assert_needle, build
from tests.parallel.spread import Spread, on_host

PLAIN = [case for case in DECODE + PREFILL + SINKS + V_DIMS if not case.page_offsets]
MIXED = Case("mixed", (70, 0, 1, 37, 150), num_qo_heads=8, sinks=True)
FEATURES = (
    MIXED,
    replace(MIXED, name="mixed_window_cap", window_left=40, logits_soft_cap=3.0, layout="HND"),
    replace(MIXED, name="mixed_q_len", q_len=4, page_size=3),
    replace(MIXED, name="mixed_prefill", q_lens=(70, 3, 0, 20, 7)),
    replace(MIXED, name="mixed_prefill_window", q_lens=(20, 3, 1, 37, 50), window_left=33, dtype="bfloat16"),
    replace(MIXED, name="mixed_not_causal", q_lens=(20, 3, 1, 37, 2), causal=False, page_size=8),
    Case("short", (3, 16, 17, 1), num_qo_heads=8),  # most ranks hold nothing of a request
    Case("nothing", (0, 0), num_qo_heads=8, sinks=True),
)


def device_of(xp: Any) -> str:
    return "cpu" if xp is np else "cuda"


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_case_of_the_list(xp: Any, case: Case) -> None:
    if xp is not np and case.dtype in ("float32", "float64"):
        return  # the kernels have none
    num_ranks = 1 + PLAIN.index(case) % 8
    spread = Spread(parallel.LocalRanks(num_ranks, device_of(xp)), case, xp.asarray)
    spread.assert_right(spread.run())


@pytest.mark.parametrize("shard", [None, "heads"])
@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_every_feature_on_one_to_eight_ranks(xp: Any, case: Case, num_ranks: int, shard: str | None) -> None:
    """One-shot and planned, with tables on the host and beside the pool."""
    with parallel.LocalRanks(num_ranks, device_of(xp)) as comm:
        for to in {np.asarray, xp.asarray}:
            spread = Spread(comm, case, xp.asarray)
            spread.table = spread.plain([rank.table(to) for rank in spread.ranks])
            if shard is not None and case.num_qo_heads % num_ranks:
                with pytest.raises(ValueError, match=f"num_qo_heads={case.num_qo_heads} is not a multiple"):
                    spread.run(shard=shard)
                continue
            once = spread.run(shard=shard)
            spread.assert_right(once, shard)
            with spread.plan(shard=shard) as plan:
                for _ in range(2):
                    planned = spread.lists(plan.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True))
                    for array, same in zip((*once[0], *once[1]), (*planned[0], *planned[1]), strict=True):
                        np.testing.assert_array_equal(array, same)
                plan.status()


@pytest.mark.parametrize("case", [case for case in NEEDLE_CASES if "NHD" in case.name], ids=str)
def test_a_needle_on_any_rank_is_seen(case: Case) -> None:
    for place in range(3, 75, 9):
        spread = Spread(parallel.LocalRanks(3, "cpu"), case, inputs=build(case, needle=place))
        for out, lse in zip(*spread.run(), strict=True):
            assert_needle(case, place, out, lse)


# -- the precision of partial results ----------------------------------------------------------------------------------

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("dtype", UNIT)
def test_partial_results_of_the_models_dtype_are_off_by_what_is_stated(xp: Any, dtype: str) -> None:
    case = Case(f"partial_{dtype}", (700, 33, 5), dtype=dtype, head_dim=128)
    spread = Spread(parallel.LocalRanks(4, device_of(xp)), case, xp.asarray)
    results = []
    for partial_dtype in ("float32", dtype):
        out = [xp.empty(spread.inputs.q.shape, np.float32) for _ in spread.ranks]
        results.append(spread.run(partial_dtype=partial_dtype, out=out))
    (exact, lse), (rounded, same_lse) = results
    np.testing.assert_array_equal(lse[0], same_lse[0])
    error = np.abs(exact[0] - rounded[0])
    weighted = np.zeros_like(error)  # the partial results of the ranks by their weights
    for rank in spread.ranks:
        out = xp.empty(error.shape, np.float32)
        kv, table = rank.kv(xp.asarray), rank.table(xp.asarray)
        part, part_lse = pa.decode(spread.q[0], kv, table, out=out, return_lse=True)
        weighted += np.abs(on_host(part)) * np.exp(on_host(part_lse) - lse[0])[..., None]
    assert 0 < error.max() and (error <= 1.001 * UNIT[dtype] * weighted + 1e-6).all()


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_serves_steps_of_many_sizes(xp: Any) -> None:
    """With capacities, rows past the batch are 0 and -inf, and buffers stay; without, they grow."""
    with parallel.LocalRanks(3, device_of(xp)) as comm:
        small, large = (Spread(comm, case, xp.asarray) for case in (Case("s", (20, 0)), Case("l", (70, 5, 33, 2, 40))))
        plan = small.plan(max_batch_size=6, max_pages=99, batch_invariant=True)
        first = plan.bytes_a_step
        q = [xp.asarray(np.concatenate([small.inputs.q] * 3)) for _ in small.ranks]
        out, lse = small.lists(plan.run(q, small.kv, return_lse=True))
        small.assert_right(([x[:2] for x in out], [x[:2] for x in lse]))
        assert not out[0][2:].any() and (lse[0][2:] == -np.inf).all()
        large.replan(plan)
        large.assert_right(large.lists(plan.run(large.q, large.kv, return_lse=True)))
        assert (plan.bytes_a_step, plan.way) == (first, "all-gather")
        plan = small.plan()
        assert plan.bytes_a_step < first
        for spread in (large, small, large):
            spread.replan(plan)
            spread.assert_right(spread.lists(plan.run(spread.q, spread.kv, return_lse=True)))
        assert "num_ranks=3" in repr(plan) and "all-gather" in repr(plan)


@pytest.mark.parametrize("shard", [None, "heads"])
def test_batch_invariant_results_have_the_same_bits_in_any_batch(xp: Any, shard: str | None) -> None:
    """A request alone, in a batch, and in another place."""
    lengths = (300, 0, 33, 1, 77, 700)
    with parallel.LocalRanks(4, device_of(xp)) as comm:
        whole = Spread(comm, Case("whole", lengths, q_lens=(3, 1, 0, 9, 2, 5)), xp.asarray)
        plan = whole.plan(batch_invariant=True, shard=shard)
        out, lse = whole.lists(plan.run(whole.q, whole.kv, return_lse=True))
        first = whole.inputs.qo_indptr
        for requests in ([0], [5], [4, 3], [5, 4, 3, 2, 1, 0]):
            part = whole.of_requests(requests)
            plan.plan(part.kv, part.table, part.qo_indptr, 8)
            part_out, part_lse = part.lists(plan.run(part.q, part.kv, return_lse=True))
            rows = np.concatenate([np.arange(first[i], first[i + 1]) for i in requests])
            for array, same in zip((*out, *lse), (*part_out, *part_lse), strict=True):
                np.testing.assert_array_equal(array[rows], same)


def test_a_rank_without_pages_attends_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of one page each, on ranks 0 and 1 of four."""
    spread = Spread(parallel.LocalRanks(4, "cpu"), Case("pages", (9, 16), sinks=True))
    plan = spread.plan()
    for idle in plan._plans[2:]:
        monkeypatch.setattr(idle, "run", None)
    spread.assert_right(spread.lists(plan.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True)))
    spread.kv[2].k_pages[...] = np.nan
    with pytest.raises(ValueError, match=r"q must have shape \[2, 8, 64\]"):  # its arguments are checked all the same
        plan.run([*spread.q[:3], spread.q[3][:1]], spread.kv)


def test_given_results_are_written_and_returned(xp: Any) -> None:
    spread = Spread(parallel.LocalRanks(2, device_of(xp)), MIXED, xp.asarray)
    shape = spread.inputs.q.shape
    for shard, heads in ((None, 8), ("heads", 4)):
        out = [xp.full((shape[0], heads, shape[2]), np.nan, np.float32) for _ in range(2)]
        lse = [xp.full((shape[0], heads), np.nan, np.float32) for _ in range(2)]
        options = {"shard": shard, "sinks": spread.sinks, "out": out, "lse": lse}
        found = parallel.decode(spread.comm, spread.q, spread.kv, spread.table, **options)
        assert found[0] is out[0] and found[1] is out[1]
        spread.assert_right(([on_host(x) for x in out], [on_host(x) for x in lse]), shard)


def test_jax_arrays_come_and_go() -> None:
    spread = Spread(parallel.LocalRanks(2, "cpu"), MIXED)
    q, sinks = ([jnp.asarray(array)] * 2 for array in (spread.inputs.q, spread.inputs.sinks))
    out, lse = parallel.decode(spread.comm, q, spread.kv, spread.table, sinks=sinks, return_lse=True)
    assert isinstance(out[1], jnp.ndarray) and isinstance(lse[0], jnp.ndarray)
    spread.assert_right(([np.asarray(x) for x in out], [np.asarray(x) for x in lse]))


def test_one_rank_takes_plain_arrays_and_plain_tables() -> None:
    spread = Spread(parallel.LocalRanks(1, "cpu"), MIXED)
    inputs, options = spread.inputs, {"sinks": spread.inputs.sinks, "return_lse": True}
    out, lse = parallel.decode(spread.comm, inputs.q, inputs.kv(), inputs.table(), **options)
    spread.assert_right(([out], [lse]))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    comm = parallel.LocalRanks(2, "cpu")
    spread = Spread(comm, Case("refused", (40, 3)))
    q, kv, table = spread.q, spread.kv, spread.table

    def refused(error: type[Exception], message: str, **given: Any) -> None:
        options = {"q": q, "kv": kv, "table": table} | given
        with pytest.raises(error, match=message):
            parallel.decode(comm, **options)

    refused(TypeError, "q must be a list of 2, one for each rank of this process, got ndarray", q=q[0])
    refused(TypeError, "kv must be a list of 2, one for each rank of this process, got 3 of them", kv=[*kv, kv[0]])
    refused(TypeError, "kv must be a PagedKV, got ndarray", kv=[kv[0], kv[1].k_pages])
    refused(ValueError, "page_stride=1, and the pages of a sequence go to 2 ranks", table=[spread.inputs.table()] * 2)
    refused(ValueError, "shard is 'tokens'", shard="tokens")
    refused(TypeError, "partial_dtype is bfloat16", partial_dtype="bfloat16")
    refused(ValueError, "q must be .*got q.shape", q=[x[0] for x in q])
    refused(ValueError, "q and out must be alike on all ranks", out=[np.empty_like(q[0]), q[0].astype(np.float32)])
    refused(ValueError, r"out must have shape \[2, 4, 64\].*shard", out=[np.empty_like(x) for x in q], shard="heads")
    refused(ValueError, "out overlaps q", out=q)
    refused(ValueError, "lse must have shape", lse=[np.empty((2, 3), np.float32)] * 2)
    for call in (lambda: parallel.decode(q, kv, table, None), lambda: parallel.BatchPrefillWithPagedKVCache(q)):
        with pytest.raises(TypeError, match=r"comm must be a communicator .*, got list"):
            call()
    plan = parallel.BatchDecodeWithPagedKVCache(comm)
    with pytest.raises(RuntimeError, match="before plan"):
        plan.run(q, kv)
    plan.plan(kv, table, 8)
    with pytest.raises(ValueError, match="window_left"):
        plan.plan(kv, table, 8, window_left=-2)
    with pytest.raises(RuntimeError, match="behind one that raised"):
        plan.run(q, kv)
    comm.close()
    comm.close()
    with pytest.raises(RuntimeError, match="the communicator is closed"):
        plan.plan(kv, table, 8)
