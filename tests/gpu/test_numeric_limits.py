"""Numbers at their limits on a card: huge finite scores, empty states of both signs, large positions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.cases import HUGE_SCORES, LARGE_SCORES, LSE_TOLERANCE, OUT_TOLERANCE, Case, Inputs, assert_close, build
from tests.gpu.answers import answer, on_gpu
from tests.simt.test_prefill import expected

cupy = pytest.importorskip("cupy")

DTYPES = ("float16", "bfloat16")
LARGEST = 2**31 - 1


def assert_exact(inputs: Inputs, out: Any, lse: Any) -> None:
    """Against float64, by rows."""
    right, right_lse = expected(replace(inputs, q=inputs.q.reshape(-1, *inputs.q.shape[-2:])))
    out, lse = out.get().reshape(right.shape), lse.get().reshape(right_lse.shape)
    tolerance = cases.LSE_TOLERANCE_SOFT_CAP if inputs.case.logits_soft_cap else LSE_TOLERANCE
    large = 4e-6 * np.abs(np.nan_to_num(right_lse, neginf=0))
    assert_close(
        out, right, lse, right_lse, tolerance=OUT_TOLERANCE[inputs.case.dtype], lse_tolerance=tolerance + large
    )


SHAPES: dict[str, dict[str, Any]] = {
    "decode_group4": {},
    "decode_group4_dim128": {"head_dim": 128},
    "decode_group4_dim256": {"head_dim": 256},
    "decode_group16_dim128": {"num_qo_heads": 16, "num_kv_heads": 1, "head_dim": 128},
    "decode_q_len4": {"q_len": 4, "head_dim": 128},
    "decode_q_len4_window": {"q_len": 4, "window_left": 700},
    "decode_soft_cap": {"logits_soft_cap": 1e13},
    "prefill": {"q_lens": (300, 200)},
    "prefill_dim128": {"q_lens": (300, 200), "head_dim": 128},
    "prefill_dim128_group16": {"q_lens": (90, 200), "num_qo_heads": 16, "num_kv_heads": 1, "head_dim": 128},
    "prefill_dim128_page1": {"q_lens": (300, 200), "head_dim": 128, "page_size": 1},
    "prefill_dim256": {"q_lens": (300, 200), "head_dim": 256},
    "prefill_dim32": {"q_lens": (300, 200), "head_dim": 32},
    "prefill_window": {"q_lens": (300, 200), "window_left": 400, "head_dim": 128},
    "prefill_not_causal": {"q_lens": (300, 200), "causal": False, "head_dim": 128},
    "prefill_soft_cap": {"q_lens": (300, 200), "logits_soft_cap": 1e13, "head_dim": 128},
}


# A float32 tanh tells no scores apart that are as near to each other as those of the bump.
LARGE = [
    (shape, scores)
    for shape in SHAPES
    for scores in LARGE_SCORES
    if (scores, SHAPES[shape].get("logits_soft_cap")) != ("large_bump", 1e13)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "scores"), LARGE)
def test_large_scores(shape: str, scores: str, dtype: str) -> None:
    """Up to 2^23, on every path."""
    inputs = build(Case("large", (1900, 200), dtype=dtype, **SHAPES[shape]), scores=scores)
    assert_exact(inputs, *answer(inputs))


DECODES = [shape for shape in SHAPES if shape.startswith("decode")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scores", HUGE_SCORES)
@pytest.mark.parametrize("shape", DECODES)
def test_huge_scores(shape: str, scores: str, dtype: str) -> None:
    inputs = build(Case("huge", (1900, 200), dtype=dtype, **SHAPES[shape]), scores=scores)
    assert_exact(inputs, *answer(inputs))


@pytest.mark.parametrize("scale", [None, 1.0, 2.0**40, 2.0**-126])
@pytest.mark.parametrize("shape", [shape for shape in DECODES if "soft_cap" not in shape])
def test_the_largest_scores(shape: str, scale: float | None) -> None:
    """q . k or the score just below 2^127, as README states."""
    inputs = build(
        Case("border", (1900, 200), dtype="bfloat16", given_scale=scale, **SHAPES[shape]), scores="huge_border"
    )
    assert_exact(inputs, *answer(inputs))


@pytest.mark.parametrize("group_size", [4, 16])
@pytest.mark.parametrize(("dtype", "huge"), [("bfloat16", 133120.0), ("float16", 65504.0)])
def test_equal_keys_and_values_come_out_as_they_are(dtype: str, huge: float, group_size: int) -> None:
    """q, k and v all of one number: so is out, bit for bit, in splits of one request too."""
    shape = Case("equal", (9000,), num_qo_heads=group_size, num_kv_heads=1, head_dim=128, dtype=dtype)
    inputs = build(shape, scores="huge_equal")
    v_pages = inputs.v_pages.copy()
    v_pages[np.isfinite(v_pages.astype(np.float32))] = huge
    q, k_pages = np.full_like(inputs.q, huge), np.where(np.isfinite(v_pages.astype(np.float32)), v_pages, np.nan)
    out, lse = answer(replace(inputs, q=q, k_pages=k_pages.astype(v_pages.dtype), v_pages=v_pages))
    out = out.get().astype(np.float64)
    assert (out == huge).all() if dtype == "bfloat16" else np.allclose(out, huge, rtol=1e-3)
    np.testing.assert_allclose(lse.get(), 128 * huge**2 * 128**-0.5, rtol=4e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, "float32"])
@pytest.mark.parametrize("num_states", [1, 2, 5, 40])
@pytest.mark.parametrize("base", ["e", 2])
def test_states_of_plus_infinity_are_empty(base: Any, num_states: int, dtype: str) -> None:
    random = np.random.default_rng(num_states)
    v = random.standard_normal((20, num_states, 3, 64), np.float32).astype(cases.DTYPES[dtype])
    s = random.standard_normal(v.shape[:3], np.float32)
    empty = random.random(s.shape) < 0.4
    empty[0] = True
    s[empty] = np.where(random.random(np.count_nonzero(empty)) < 0.7, np.inf, -np.inf)
    v[empty] = np.nan
    right = pa.merge_states(v, s, base=base)
    found = [pa.merge_states(on_gpu(v), on_gpu(s), base=base)]
    if num_states == 2:
        found.append(pa.merge_state(on_gpu(v[:, 0]), on_gpu(s[:, 0]), on_gpu(v[:, 1]), on_gpu(s[:, 1]), base=base))
    for out, lse in found:
        assert_close(out.get(), right[0], lse.get(), right[1], tolerance=OUT_TOLERANCE[dtype])
        assert not out.get()[0].astype(np.float32).any() and np.isneginf(lse.get()[0]).all()


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("stride", [2, 2**20, 2**30, LARGEST - 1, LARGEST])
@pytest.mark.parametrize("window_left", [-1, 0, 5, LARGEST])
def test_large_positions(window_left: int, stride: int, page_size: int) -> None:
    """A rank's pages far from one another, and one page as far on as positions go."""
    random = np.random.default_rng(stride % 1000)
    pages = 3 if 3 * stride * page_size < LARGEST else 1
    most_offset = LARGEST // page_size - 1 - (pages - 1) * stride
    k, v = random.standard_normal((2, pages, page_size, 2, 64), np.float32).astype(np.float16)
    q = random.standard_normal((4, 8, 64), np.float32).astype(np.float16)
    for offset in {0, 1, most_offset}:
        last = (offset + (pages - 1) * stride) * page_size
        for total_len in (last + page_size, LARGEST):
            answers = []
            for to in (on_gpu, np.asarray):
                table = pa.PageTable(
                    *(to(np.array(array, np.int32)) for array in ([0, pages], range(pages), [page_size])),
                    page_size=page_size,
                    page_stride=stride,
                    page_offset=to(np.array([offset], np.int32)),
                    total_len=to(np.array([total_len], np.int32)),
                )
                kv, indptr = pa.PagedKV(to(k), to(v), layout="NHD"), to(np.array([0, 4], np.int32))
                options: dict[str, Any] = {"window_left": window_left, "return_lse": True}
                answers.append(
                    [
                        pa.decode(to(q[None]), kv, table, **options),
                        pa.prefill(to(q), indptr, kv, table, **options),
                        pa.prefill(to(q), indptr, kv, table, causal=False, **options),
                    ]
                )
            for (out, lse), (right, right_lse) in zip(*answers, strict=True):
                assert_close(out.get(), right, lse.get(), right_lse, tolerance=OUT_TOLERANCE["float16"])
    pa.status()


def test_a_callers_errstate_does_not_matter() -> None:
    inputs = build(Case("strict", (300, 0), num_qo_heads=8), scores="sigma50")
    with np.errstate(all="raise"):
        answer(inputs)
        pa.merge_state(*(on_gpu(np.full(shape, 1e-30, np.float32)) for shape in ((2, 1, 8), (2, 1)) * 2))
