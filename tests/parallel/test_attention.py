"""Attention over ranks of one process against attention on one device, on NumPy and on a card."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from paged_attn import parallel
from tests.cases import DECODE, NEEDLE_CASES, OUT_TOLERANCE, PREFILL, SINKS, V_DIMS, Case, assert_close, assert_needle
from tests.cases import build as build_inputs
from tests.parallel.spread import Spread, int32, on_host, one_device

PLAIN = [case for case in DECODE + PREFILL + SINKS + V_DIMS if not case.page_offsets]
MIXED = Case("mixed", (130, 0, 1, 77, 200), num_qo_heads=16, num_kv_heads=4, sinks=True)
FEATURES = (
    MIXED,
    replace(MIXED, name="mixed_window_cap", window_left=40, logits_soft_cap=3.0, layout="HND"),
    replace(MIXED, name="mixed_q_len", q_len=4, page_size=3),
    replace(MIXED, name="mixed_prefill", q_lens=(130, 3, 0, 50, 7)),
    replace(MIXED, name="mixed_prefill_window", q_lens=(20, 3, 1, 77, 200), window_left=33, dtype="bfloat16"),
    replace(MIXED, name="mixed_not_causal", q_lens=(20, 3, 1, 77, 2), causal=False, page_size=8),
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
    for place in range(0, 75, 4):
        spread = Spread(parallel.LocalRanks(3, "cpu"), case)
        inputs = build_inputs(case, needle=place)
        spread.inputs = inputs
        for rank, mine in zip(spread.ranks, spread.kv, strict=True):
            held = ~np.isnan(rank.k_pages.astype(np.float32)).all(axis=(1, 2, 3))
            mine.k_pages[held], mine.v_pages[held] = inputs.k_pages[held], inputs.v_pages[held]
        spread.q = spread.each(inputs.q)
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
    bound = UNIT[dtype] * np.abs(spread.inputs.v_pages.astype(np.float32)[np.isfinite(spread.inputs.v_pages)]).max()
    error = np.abs(exact[0] - rounded[0])
    assert 0 < error.max() <= bound
    # The bound of each number: the partial results of the ranks by their weights.
    parts = [Spread(parallel.LocalRanks(1, device_of(xp)), case, xp.asarray) for _ in spread.ranks]
    weighted = np.zeros_like(error)
    for part, rank in zip(parts, spread.ranks, strict=True):
        out, part_lse = partial(part, rank, xp)
        weighted += np.abs(out) * np.exp(part_lse - lse[0])[..., None]
    assert (error <= 1.01 * UNIT[dtype] * weighted + 1e-6).all()


def partial(spread: Spread, rank: Any, xp: Any) -> tuple[np.ndarray, np.ndarray]:
    """What one rank alone gives, float32."""
    import paged_attn as pa

    out = xp.empty(spread.inputs.q.shape, np.float32)
    out, lse = pa.decode(spread.q, rank.kv(xp.asarray), rank.table(xp.asarray), out=out, return_lse=True)
    return on_host(out), on_host(lse)
