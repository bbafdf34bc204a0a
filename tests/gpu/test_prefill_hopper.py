"""The Hopper prefill on a card: scores that are hard on its lazy softmax, and needles at all of its borders."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import compile as kernels
from tests import cases
from tests.gpu.answers import answer, assert_right, expected, on_gpu

cupy = pytest.importorskip("cupy")

DTYPES = ("float16", "bfloat16")


def case(name: str, kv_lens: tuple[int, ...], q_lens: tuple[int, ...], **fields: Any) -> cases.Case:
    options = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128} | fields
    return cases.Case(name, kv_lens, q_lens=q_lens, **options)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts, behind its claims, how often a warp scaled a block down and how often it repeated one."""
    plain = kernels.kernel

    def kernel(recipe: kernels.Recipe, device: str) -> kernels.Kernel:
        counts = (("COUNT_FALLBACKS", 1),) if recipe.kernel == "prefill_hopper" else ()
        return plain(replace(recipe, constants=recipe.constants + counts), device)

    monkeypatch.setattr(kernels, "kernel", kernel)


def run(inputs: cases.Inputs, *, equal_scores: bool = False) -> tuple[int, int]:
    """Plan and run; the answer is checked. The two counts; 0 on other cards.

    Tensor cores truncate the sums of a score: large ones are off by some millionths of their size, weights by as much
    (but not those of equal scores, which are off alike).
    """
    attention = pa.BatchPrefillWithPagedKVCache()
    kv = inputs.kv(on_gpu)
    attention.plan(kv, inputs.table(on_gpu), on_gpu(inputs.qo_indptr), inputs.case.num_qo_heads, **inputs.options())
    out, lse = attention.run(on_gpu(inputs.q), kv, return_lse=True)
    right_out, right_lse = expected(inputs)
    large = 4e-6 * np.abs(np.nan_to_num(right_lse, neginf=0))  # [rows, heads]
    spread = 0 if equal_scores else large
    cases.assert_close(
        out.get(), right_out, lse.get(), right_lse,
        tolerance=cases.OUT_TOLERANCE[inputs.case.dtype] + spread, lse_tolerance=cases.LSE_TOLERANCE + large,
    )  # fmt: skip
    claims = attention._plan.backend_plan._buffers.get("claims")
    if claims is None:
        return 0, 0
    begun, scaled, repeated = claims[:12].view(np.uint32).get().tolist()
    assert begun == 0, "not ready for the next launch"
    return scaled, repeated


@pytest.mark.parametrize("page_size", [16, 1])
@pytest.mark.parametrize("num_qo_heads", [2, 4, 6, 8, 16, 32, 64])
def test_results_stay_in_their_rows(num_qo_heads: int, page_size: int) -> None:
    """Rows of tiles that stand nowhere, rows of other requests, and what lies around out."""
    inputs = cases.build(
        case("rows", (700, 1500, 0, 1040), (33, 150, 3, 77), num_qo_heads=num_qo_heads, page_size=page_size)
    )
    attention = pa.BatchPrefillWithPagedKVCache()
    kv = inputs.kv(on_gpu)
    attention.plan(kv, inputs.table(on_gpu), on_gpu(inputs.qo_indptr), num_qo_heads, **inputs.options())
    around = cupy.full((len(inputs.q) + 64, num_qo_heads, 128), 7, cupy.float16)
    out, lse = attention.run(on_gpu(inputs.q), kv, out=around[32:-32], return_lse=True)
    assert_right(inputs, out, lse)
    recipe = attention._plan.backend_plan._steps.recipe
    assert recipe.kernel == "prefill" or recipe.sends == (num_qo_heads != 6)  # groups of 3 do not fit a box
    assert (around[:32] == 7).all() and (around[-32:] == 7).all()


def is_hopper() -> bool:
    return bool(cupy.cuda.Device().compute_capability == "90")


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scores", cases.SCORES)
def test_scores_of_every_kind(scores: str, dtype: str, head_dim: int, counting: None) -> None:
    shape = case("scores", (1950, 700), (260, 300), dtype=dtype, head_dim=head_dim)
    scaled, repeated = run(cases.build(shape, scores=scores), equal_scores=scores in ("equal", "all_low"))
    if scores in ("equal", "all_low", "growing"):
        assert (scaled, repeated) == (0, 0)
    if is_hopper():
        assert scores not in ("falling", "jump_by_9") or scaled > 0
        # A wide head_dim has blocks of half as many tokens, and what falls from one to the next is less.
        assert scores != "falling_fast" or (repeated if head_dim <= 128 else scaled) > 0


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("group_size", [4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_makes_up_a_row_comes_out_as_it_is(dtype: str, group_size: int, kind: str) -> None:
    """Bit for bit: its weight is 1, which no rounding changes, and the others are too small to see."""
    queries = 1 if kind == "decode" else 150
    shape = case("jump", (4000,), (queries,), num_qo_heads=16, num_kv_heads=16 // group_size, dtype=dtype)
    inputs = cases.build(shape, scores="jump_by_23.3")
    q, kv, table = on_gpu(inputs.q), inputs.kv(on_gpu), inputs.table(on_gpu)
    if kind == "decode":
        out = pa.decode(q, kv, table)
    else:
        out = pa.prefill(q, on_gpu(inputs.qo_indptr), kv, table)
    token = np.repeat(inputs.v[0][4000 // 3], group_size, axis=0)  # [16, 128]
    assert (out.get().view(np.uint16) == token.view(np.uint16)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_small_weights_count_beside_a_large_one(dtype: str, counting: None) -> None:
    """One token outweighs each other one by 2^17, but not all of them together."""
    shape = case("background", (8192,), (100,), num_kv_heads=1, num_qo_heads=4, dtype=dtype, causal=False)
    run(cases.build(shape, scores="background"))


@pytest.mark.parametrize("scores", ["sigma5", "falling", "falling_fast"])
def test_the_first_block_of_a_window(scores: str, counting: None) -> None:
    """Blocks at both edges of a window are masked, and those between them are not."""
    for dtype in DTYPES:
        for page_size in (8, 48):
            shape = case("window", (1500,), (300,), window_left=500, dtype=dtype, page_size=page_size)
            run(cases.build(shape, scores=scores))


# K and V of three heads are about a section (6 MB): the eight heads fall into three.
SECTIONS = case("sections", (3300, 129), (70, 129), num_qo_heads=16, num_kv_heads=8, page_size=16, dtype="bfloat16")


@pytest.mark.parametrize("page_size", [3, 8, 16, 64])
def test_a_needle_at_any_border_is_seen(page_size: int) -> None:
    """Both sides of every page, box, block of 128 and tile."""
    shape = case("needles", (650, 131), (150, 131), page_size=page_size, layout="HND")
    step = max(page_size, 32)
    for needle in sorted({*range(0, 650, step), *range(step - 1, 650, step), *range(499, 650, 32), 649}):
        inputs = cases.build(shape, needle=needle)
        assert_right(inputs, *answer(inputs))


@pytest.mark.parametrize("needle", [0, 127, 128, 1535, 1536, 3229, 3230, 3299])
def test_a_needle_is_seen_in_every_section(needle: int) -> None:
    inputs = cases.build(SECTIONS, needle=needle)
    assert_right(inputs, *answer(inputs))
