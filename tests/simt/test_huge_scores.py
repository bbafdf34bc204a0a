"""Finite scores up to the largest that README states, through every kernel on a CPU and the reference, against float64.

A product score * scale is then rounded by more than 1. Prefill is right up to "large" ones (test_prefill_hopper.py has
the other kernel), decode and the reference also far beyond them.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.cases import HUGE_SCORES, LARGE_SCORES, OUT_TOLERANCE, Case, Inputs, assert_close, build
from tests.simt import test_decode as decode
from tests.simt import test_prefill as prefill

DTYPES = ("float16", "bfloat16")


def exact(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) as rows, in float64."""
    return prefill.expected(replace(inputs, q=inputs.q.reshape(-1, *inputs.q.shape[-2:])))


def check(inputs: Inputs, out: np.ndarray, lse: np.ndarray) -> None:
    right, right_lse = exact(inputs)
    out, lse = out.reshape(right.shape), lse.reshape(right_lse.shape)
    tolerance = 1e-3 if inputs.case.logits_soft_cap else 1e-4
    large = 2e-6 * np.abs(np.nan_to_num(right_lse, neginf=0))
    assert_close(
        out, right, lse, right_lse, tolerance=OUT_TOLERANCE[inputs.case.dtype], lse_tolerance=tolerance + large
    )


def huge(scores: str, kv_lens: tuple[int, ...], dtype: str, **fields: Any) -> Inputs:
    return build(Case(scores, kv_lens, dtype=dtype, **fields), scores=scores)


DECODES: dict[str, dict[str, Any]] = {
    "group4": {"num_qo_heads": 4, "num_kv_heads": 1},
    "group16_dim128": {"num_qo_heads": 16, "num_kv_heads": 1, "head_dim": 128},
    "q_len4_window": {"num_qo_heads": 4, "num_kv_heads": 1, "q_len": 4, "window_left": 60, "head_dim": 32},
    "soft_cap": {"num_qo_heads": 4, "num_kv_heads": 1, "logits_soft_cap": 1e13},
}


def kinds(shapes: dict[str, dict[str, Any]], scores: tuple[str, ...]) -> list[tuple[str, str]]:
    """All pairs but one: a float32 tanh tells no scores apart that are as near to each other as those of the bump."""
    return [(shape, kind) for shape in shapes for kind in scores if (shape, kind) != ("soft_cap", "large_bump")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "scores"), kinds(DECODES, LARGE_SCORES + HUGE_SCORES))
def test_decode(shape: str, scores: str, dtype: str) -> None:
    inputs = huge(scores, (130, 33, 0), dtype, **DECODES[shape])
    for num_splits in (1, 3):
        out, lse, _ = decode.run(inputs, num_splits=num_splits)
        check(inputs, out, lse)


PREFILLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 90},
    "not_causal": {"causal": False, "head_dim": 128},
    "dim256": {"head_dim": 256},
    "soft_cap": {"logits_soft_cap": 1e13},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "scores"), kinds(PREFILLS, LARGE_SCORES))
def test_prefill(shape: str, scores: str, dtype: str) -> None:
    inputs = huge(scores, (200, 40), dtype, q_lens=(70, 40), num_qo_heads=2, num_kv_heads=1, **PREFILLS[shape])
    check(inputs, *prefill.prepare(inputs).go())


BORDERS = [None, 1.0, 2.0**40, 2.0**-126]  # sm_scale


@pytest.mark.parametrize("scale", BORDERS)
def test_the_largest_scores(scale: float | None) -> None:
    """Where q . k or the score is just below 2^127, with both signs."""
    fields: dict[str, Any] = {"num_qo_heads": 4, "num_kv_heads": 1, "given_scale": scale}
    inputs = huge("huge_border", (130, 33), "bfloat16", **fields)
    dot = inputs.q[0, 0].astype(np.float64) @ inputs.k[0][:, 0].astype(np.float64).T
    assert 0.9 < np.abs(dot).max() * max(inputs.case.sm_scale, 1) / cases.LARGEST_OF_DECODE < 1
    for num_splits in (1, 2):
        out, lse, _ = decode.run(inputs, num_splits=num_splits)
        check(inputs, out, lse)
    check(inputs, *pa.decode(inputs.q, inputs.kv(), inputs.table(), return_lse=True, **inputs.options()))
    inputs = huge("huge_border", (200, 40), "bfloat16", q_lens=(70, 40), **fields)
    arguments = (inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table())
    check(inputs, *pa.prefill(*arguments, return_lse=True, **inputs.options()))


@pytest.mark.parametrize("scale", [None, 1.0, 2.0**-20])
def test_the_largest_scores_of_all_kernels(scale: float | None) -> None:
    """Just below 2^23, with both signs."""
    inputs = huge("large_border", (200, 40), "bfloat16", q_lens=(70, 40), given_scale=scale)
    dot = inputs.q[0, 0].astype(np.float64) @ inputs.k[0][:, 0].astype(np.float64).T
    assert 0.9 < np.abs(dot).max() * inputs.case.sm_scale / cases.LARGEST_OF_ALL < 1
    check(inputs, *prefill.prepare(inputs).go())


@pytest.mark.parametrize("scores", [*LARGE_SCORES, *HUGE_SCORES])
def test_the_reference(scores: str) -> None:
    inputs = huge(scores, (130, 33, 0), "bfloat16", num_qo_heads=4, q_len=3)
    check(inputs, *pa.decode(inputs.q, inputs.kv(), inputs.table(), return_lse=True, **inputs.options()))
