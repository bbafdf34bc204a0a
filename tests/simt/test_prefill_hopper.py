"""The Hopper prefill, run on a CPU by the twins of its PTX, against a float64 loop over dense keys and values."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from paged_attn.card import H100
from paged_attn.recipes import TMA_OUT_TOKENS
from tests.cases import DTYPES, LARGE_SCORES, OUT_TOLERANCE, SCORES, Case, Inputs, assert_close, build
from tests.simt.driver import SimtError
from tests.simt.plans import HostPlan
from tests.simt.test_prefill import SINK_CASES, expected, some_sinks


def run(
    inputs: Inputs,
    *,
    ctas: int = 2,
    reverse: bool = False,
    spare_rows: int = 0,
    spare_requests: int = 0,
    float32: bool = False,
    tolerance: float | None = None,
    source: str | None = None,
    sinks: np.ndarray | None = None,
    faulty: int | None = None,
    **defines: int,
) -> tuple[int, int]:
    """One step, checked; how many blocks warps have scaled down, and how many they have repeated.

    faulty: a request that plan_requests has found to be wrong.
    """
    case = inputs.case
    card = replace(H100, num_sms=ctas)
    plan = HostPlan(
        inputs,
        spare_requests=spare_requests,
        pages=-(-TMA_OUT_TOKENS * (case.batch_size + spare_requests) // case.page_size),  # results leave by TMA
        card=card,
        reverse=reverse,
        source=source,
        COUNT_FALLBACKS=1,
        **defines,
    )
    plan.plan()
    rows = len(inputs.q)
    q = np.pad(inputs.q, ((0, spare_rows), (0, 0), (0, 0)))
    out = np.full(q.shape, np.nan, np.float32 if float32 else DTYPES[case.dtype])
    lse = np.full(q.shape[:2], np.nan, np.float32)
    if faulty is not None:
        record = plan.buffers["sorted"]["first_query"] == inputs.qo_indptr[faulty]
        for name, value in (("num_pages", 0), ("kv_len", 0), ("total_len", -1)):
            plan.buffers["sorted"][name][record] = value
    plan.run(q, inputs.kv(), out, lse, sinks)
    right_out, right_lse = expected(inputs, sinks)
    if faulty is not None:
        rows_of_it = slice(inputs.qo_indptr[faulty], inputs.qo_indptr[faulty + 1])
        right_out[rows_of_it], right_lse[rows_of_it] = 0, -np.inf
    large = 2e-6 * np.abs(np.nan_to_num(right_lse, neginf=0))  # [rows, heads]
    tolerance = tolerance or OUT_TOLERANCE[case.dtype]
    assert_close(
        out[:rows], right_out, lse[:rows], right_lse,
        tolerance=tolerance, lse_tolerance=(1e-3 if case.logits_soft_cap else 1e-4) + large,
    )  # fmt: skip
    assert (out[rows:] == 0).all()
    assert np.isneginf(lse[rows:]).all()
    begun, scaled, repeated, _ = plan.buffers["claims"].tolist()
    assert begun == 0, "not ready for the next launch"
    return scaled, repeated


def case(name: str, kv_lens: tuple[int, ...], q_lens: tuple[int, ...], heads: tuple[int, int], **fields: Any) -> Case:
    options = {"head_dim": 128, "num_qo_heads": heads[0], "num_kv_heads": heads[1]} | fields
    return Case(name, kv_lens, q_lens=q_lens, **options)


CASES = [
    case("one_tile", (128,), (128,), (1, 1)),
    case("a_part_of_a_tile", (40,), (40,), (2, 1), dtype="bfloat16"),
    case("many_tiles", (300, 77), (150, 77), (4, 1)),
    case("a_longer_one_behind", (77, 300), (77, 150), (4, 1)),
    case("group32", (300,), (40,), (32, 1)),
    case("page8", (300,), (100,), (3, 1), page_size=8, head_dim=64, dtype="bfloat16"),
    case("page24_window", (900,), (200,), (2, 1), page_size=24, window_left=300),
    case("page48_window", (300, 129), (100, 40), (3, 1), page_size=48, window_left=60),
    case("page256", (300, 20), (30, 20), (2, 1), page_size=256, layout="HND"),
    case("soft_cap", (150,), (60,), (2, 2), page_size=64, layout="HND", logits_soft_cap=2.0),
    case("not_causal", (140, 0, 3, 100), (40, 5, 9, 17), (8, 2), head_dim=64, causal=False),
    case("ends_at_a_block", (256, 128), (40, 128), (1, 1), dtype="bfloat16", causal=False),
    case("group7_long", (800,), (20,), (7, 1)),
    case("window0", (300,), (140,), (1, 1), window_left=0),
    case("no_keys", (0, 0), (3, 200), (1, 1)),
    case("more_queries_than_keys", (20, 3, 0), (70, 9, 5), (4, 2), dtype="bfloat16"),
    case("every_third_page", (72, 16, 0, 1), (100, 33, 1, 9), (4, 2), page_size=8, page_offsets=(1, 1, 1, 1),
         page_stride=3, total_lens=(200, 45, 3, 9), window_left=90, layout="HND"),
    case("head_dim80", (300, 77), (100, 50), (4, 2), head_dim=80),
    case("head_dim96", (333, 20), (130, 20), (3, 1), head_dim=96, page_size=8, layout="HND", dtype="bfloat16"),
    case("head_dim112", (270,), (70,), (2, 2), head_dim=112, page_size=48, window_left=100),
    case("head_dim256", (300, 77), (100, 40), (4, 2), head_dim=256),
    case("head_dim256_page8_window", (270, 0, 64), (90, 3, 64), (3, 1), head_dim=256, page_size=8, window_left=70),
    case("head_dim256_page128_cap", (140, 64), (70, 1), (2, 2), head_dim=256, page_size=128, layout="HND",
         dtype="bfloat16", logits_soft_cap=3.0),
    case("head_dim256_page5", (133, 0, 1), (60, 2, 9), (2, 1), head_dim=256, page_size=5, dtype="bfloat16"),
    case("page1", (300, 33), (90, 33), (4, 1), page_size=1),
    case("page3", (200, 0, 130), (60, 5, 3), (10, 2), page_size=3, layout="HND", dtype="bfloat16", head_dim=64),
    case("page5_window", (500,), (140,), (2, 1), page_size=5, window_left=130, head_dim=96),
    case("page12", (260,), (80,), (2, 2), page_size=12, head_dim=80, causal=False, dtype="bfloat16"),
    case("page7_positions", (72, 16, 0, 1), (100, 33, 1, 9), (4, 2), page_size=7, page_offsets=(1, 1, 1, 1),
         page_stride=3, total_lens=(200, 45, 3, 9), window_left=90, head_dim=112),
    case("middle_chunk", (48, 64, 16), (60, 30, 20), (4, 2), page_offsets=(2, 1, 0), total_lens=(130, 65, 16)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_loop(case: Case) -> None:
    inputs = build(case)
    run(inputs)
    run(inputs, ctas=3, reverse=True)


RAGGED = case("ragged", (130, 0, 1, 16, 33, 77), (33, 1, 0, 5, 70, 18), (10, 2), layout="HND")


def test_rows_behind_the_plan_are_empty() -> None:
    run(build(RAGGED), ctas=3, spare_rows=70, spare_requests=2)


def test_float32_out() -> None:
    run(build(RAGGED), float32=True)


@pytest.mark.parametrize("case", SINK_CASES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_sink_joins_the_denominator_of_its_head(case: Case, head_dim: int) -> None:
    """For head_dim 128 results leave by TMA, or, of a float32 out, from registers."""
    inputs, sinks = build(replace(case, head_dim=head_dim)), some_sinks(case)
    run(inputs, sinks=sinks, spare_rows=20, spare_requests=3)
    if head_dim == 128:
        run(inputs, sinks=sinks, float32=True, reverse=True)


def test_rows_of_a_faulty_request_have_no_sink() -> None:
    inputs = build(case("faulty", (90, 70, 33), (20, 15, 9), (8, 2)))
    run(inputs, sinks=some_sinks(inputs.case), faulty=1)


@pytest.mark.parametrize("scores", ["falling", "falling_fast", "large_border"])
def test_sinks_beside_scores_of_every_kind(scores: str) -> None:
    inputs = build(case("scores", (650, 300), (60, 150), (2, 1)), scores=scores)
    run(inputs, sinks=np.array([3, 150], np.float32), float32=True)


@pytest.mark.parametrize("needle", [0, 7, 8, 127, 128, 255, 256, 399])
def test_no_token_is_skipped(needle: int) -> None:
    run(build(case("needle", (400, 70), (40, 5), (4, 2), page_size=8, dtype="bfloat16"), needle=needle))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scores", SCORES)
def test_scores_of_every_kind(scores: str, dtype: str) -> None:
    """What the old maximum is good for, and what it is not: each way out is taken, and the answer is right."""
    inputs = build(case("scores", (650, 300), (60, 150), (2, 1), dtype=dtype), scores=scores)
    scaled, repeated = run(inputs)
    if scores in ("sigma1", "equal", "all_low", "growing"):
        assert (scaled, repeated) == (0, 0)
    assert scores not in ("falling", "jump_by_9") or scaled > 0
    assert scores != "falling_fast" or repeated > 0
    run(build(replace(inputs.case, head_dim=64), scores=scores), reverse=True)
    if dtype == "bfloat16":
        run(build(replace(inputs.case, kv_lens=(300, 150), head_dim=256), scores=scores))


LARGE_SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 200},
    "not_causal_dim64": {"causal": False, "head_dim": 64},
    "dim256": {"head_dim": 256, "kv_lens": (300, 150)},
    "gathered": {"page_size": 3, "head_dim": 80},
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scores", LARGE_SCORES)
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_large_scores(shape: str, scores: str, dtype: str) -> None:
    """As in test_huge_scores.py, up to the largest scores that are right on every path."""
    base = case("large", (500, 140), (60, 140), (2, 1), dtype=dtype)
    run(build(replace(base, **LARGE_SHAPES[shape]), scores=scores))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_token_above_others_far_above_zero(dtype: str) -> None:
    """No block looks for its maximum: sums are scaled down, by as much as a large maximum really moves."""
    scaled, _ = run(build(case("bump", (1300,), (20,), (2, 1), dtype=dtype), scores="large_bump"))
    assert scaled > 0


@pytest.mark.parametrize("scores", ["jump_by_9", "jump_by_23.3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_token_that_makes_up_a_row_has_a_weight_of_1(dtype: str, scores: str) -> None:
    """Which no rounding changes: any other one would be off by up to 2^-9 in bfloat16, 2^-12 in float16."""
    inputs = build(case("jump", (700,), (100,), (2, 1), dtype=dtype, causal=False), scores=scores)
    run(inputs, float32=True, tolerance=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_small_weights_count_beside_a_large_one(dtype: str) -> None:
    """One token outweighs each other one by 2^17, but not all of them together; fp16 has to hold both."""
    inputs = build(case("background", (4096,), (8,), (1, 1), dtype=dtype, causal=False), scores="background")
    run(inputs)


def test_a_nan_of_q_stays_in_its_row() -> None:
    """The warp that has to work around it has 15 rows more."""
    for scores in ("sigma5", "falling", "falling_fast"):
        inputs = build(case("nan", (300,), (150,), (2, 1), head_dim=64), scores=scores)
        inputs.q[10::16, 1, 5] = np.nan
        run(inputs)


@pytest.mark.parametrize("page_size", [12, 16])
@pytest.mark.parametrize("total_len", [100, 130])
def test_what_stands_behind_total_len_does_not_matter(page_size: int, total_len: int) -> None:
    """Slots that are reserved and not written yet, say."""
    inputs = build(case("reserved", (144,), (20,), (1, 1), head_dim=64, page_size=page_size, total_lens=(total_len,)))
    for token in range(total_len, 144):
        place = inputs.indices[token // page_size], token % page_size
        inputs.k_pages[place] = inputs.v_pages[place] = np.nan
        inputs.k[0][token] = inputs.v[0][token] = 0
    run(inputs)


@pytest.mark.parametrize("name", ["many_tiles", "page24_window", "every_third_page"])
def test_boxes_may_arrive_late_and_in_any_order(name: str) -> None:
    (found,) = [case for case in CASES if case.name == name]
    run(build(found), LATE_BOXES=1)
    run(build(found), reverse=True, LATE_BOXES=1)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("!GATHER && used > 0", "false && used > 0"),
        ("(chunk % 8 ^ row % 8) * 16;\n                });", "chunk % 8 * 16;\n                });"),
        ("begin, i * 8 + first_row)", "begin, i * 8 + (first_row ^ 1))"),
        ("barrier_arrive_after_copies(ready);", "if (number % 2 == 0) barrier_arrive_after_copies(ready);"),
        ("o[i] *= keep[i / 2 % 2]", "o[i] *= 1.f"),
        ("block < last_begin", "false"),
        ("block + BLOCK >= first_end", "block + BLOCK > first_end + 1"),
        ("barrier_wait(shared + Q_EMPTY, number - 1)", "barrier_wait(shared + Q_EMPTY, number)"),
        ("release(TILE_EMPTY, number % TILE_SLOTS);", ""),
        ("left == claims_with(tile) + 1", "left == claims_with(tile) + 2"),
        ("softmax.max[row] = raised", "softmax.max[row] += 0.f"),
        ("exp2_fast(softmax.max[row] - raised)", "exp2_fast(-log2_fast(top))"),
        ("repeat_scores<K_STEPS", "if (false) repeat_scores<K_STEPS"),
        ("line * 128 + (chunk ^ line) * 16", "line * 128 + chunk * 16"),
        ("keep[1] = 1.f;\n            raise_max(s, softmax, keep, scale);", "keep[1] = 1.f;"),
        ("if (ROUNDS_FIRST) round_weights(weights, s);", ""),
        ("step > 0 || adds", "true"),
        ("k_ready = !GATHER && barrier_test(shared + K_FULL + next.slot * 8, next.turn)", "k_ready = true"),
        ("next.advance();", ""),
        ("release(K_EMPTY, v_ring.slot)", "release(K_EMPTY, k_ring.slot)"),
        ("results.leave();\n            release(Q_EMPTY, 0);", "release(Q_EMPTY, 0);"),
        ("rows_left >= 16", "rows_left > 0"),
        ("((lane >> 4) ^ (lane & 7)) * 16", "(lane >> 4) * 16"),
        ("send_box_4d(map, source, head,", "send_box_4d(map, source, head / 2,"),
    ],
)  # fmt: skip
def test_what_breaks_the_kernel_is_seen(right: str, wrong: str) -> None:
    source = kernels.load_source("prefill_hopper")
    assert source.count(right) == 1, source.count(right)
    source = source.replace(right, wrong)
    with pytest.raises((AssertionError, SimtError)):
        for name in (
            "many_tiles",
            "a_longer_one_behind",
            "group7_long",
            "page24_window",
            "page5_window",
            "more_queries_than_keys",
        ):
            run(build(next(case for case in CASES if case.name == name)), source=source)
        for scores in ("falling", "falling_fast", "large_bump"):
            run(build(case("scores", (650, 300), (60, 150), (2, 1)), scores=scores), source=source)
