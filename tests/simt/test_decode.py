"""The decode kernel, run on a CPU by the SIMT shim, against the reference backend."""

from dataclasses import replace

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import recipes
from paged_attn.card import A100
from tests.cases import (
    DTYPES,
    LSE_TOLERANCE,
    LSE_TOLERANCE_SOFT_CAP,
    OUT_TOLERANCE,
    Case,
    Inputs,
    assert_close,
    build,
    with_sinks,
)
from tests.simt.plans import HostPlan
from tests.simt.requests import seen_of
from tests.specs import decode_recipe
from tests.test_reference import dense_attention


def run(
    inputs: Inputs,
    *,
    num_splits: int = 1,
    spare_requests: int = 0,
    float32: bool = False,
    reverse: bool = False,
    num_pairs: int = 1,
    sinks: np.ndarray | None = None,
    first_is_faulty: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, lse, arrivals) of one step. A plan may have room for more requests than the batch has.

    num_splits: of every request. first_is_faulty: the indptr of request 0 is wrong.
    """
    case, rows = inputs.case, inputs.case.batch_size + spare_requests
    query_rows = case.q_len * case.num_qo_heads // case.num_kv_heads
    recipe = decode_recipe(query_rows, case.head_dim, num_pairs, like=case)
    ctas_per_item = case.num_kv_heads * recipe.column_blocks
    # A card of one SM leaves requests whole, so that long ones go round a warp's ring.
    card = replace(A100, num_sms=1 if num_splits == 1 else (rows * num_splits + 2) * ctas_per_item)
    if first_is_faulty:
        inputs = replace(inputs, indptr=np.append(np.int32(-1), inputs.indptr[1:]))
    plan = HostPlan(inputs, spare_requests=spare_requests, card=card, recipe=recipe, reverse=reverse)
    plan.plan()
    if num_splits > 1:
        split_all(plan, rows, num_splits)
    q = inputs.q.reshape(-1, case.num_qo_heads, case.head_dim)
    q = np.pad(q, ((0, spare_requests * case.q_len), (0, 0), (0, 0)), constant_values=np.nan)
    out = np.full((*q.shape[:2], case.v_head_dim), np.nan, np.float32 if float32 else DTYPES[case.dtype])
    lse = np.full(q.shape[:2], np.nan, np.float32)
    plan.run(q, inputs.kv(), out, lse, sinks)
    return out, lse, plan.buffers["arrivals"]


def split_all(plan: HostPlan, rows: int, num_splits: int) -> None:
    """Items that split every request, in place of those of plan_splits, which leaves short ones whole."""
    items, requests = plan.buffers["items"], plan.buffers["requests"][:rows]
    made = np.zeros((rows, num_splits), items.dtype)
    made["request"] = requests[:, None]
    made["batch_index"] = np.arange(rows)[:, None]
    made["split"] = np.arange(num_splits)
    made["num_splits"] = num_splits
    made["first_partial"] = np.arange(rows)[:, None] * num_splits
    made["begin"], made["end"] = (limits[:, None] for limits in seen_of(plan.inputs, requests))
    items["batch_index"] = -1  # the others are idle
    items[: made.size] = made.ravel()
    items[:] = np.random.default_rng(0).permutation(items)


def check(inputs: Inputs, out: np.ndarray, lse: np.ndarray, arrivals: np.ndarray) -> None:
    """Against the reference; rows past the batch are empty, and the counters are ready for the next launch."""
    case, rows = inputs.case, inputs.case.batch_size * inputs.case.q_len
    right = np.empty(inputs.q.shape, np.float32)
    _, right_lse = pa.decode(inputs.q, inputs.kv(), inputs.table(), out=right, return_lse=True, **inputs.options())
    lse_tolerance = LSE_TOLERANCE_SOFT_CAP if case.logits_soft_cap else LSE_TOLERANCE
    assert_close(
        out[:rows].reshape(right.shape), right, lse[:rows].reshape(right_lse.shape), right_lse,
        tolerance=OUT_TOLERANCE[case.dtype], lse_tolerance=lse_tolerance,
    )  # fmt: skip
    assert (out[rows:] == 0).all()
    assert np.isneginf(lse[rows:]).all()
    assert not arrivals.any()


RAGGED = (130, 0, 1, 16, 33, 77)
CASES = [
    Case("pages_of_1", RAGGED, page_size=1, num_qo_heads=4),
    Case("pages_of_3", RAGGED, page_size=3, layout="HND", num_qo_heads=4),
    Case("pages_of_48", RAGGED, page_size=48, dtype="bfloat16", num_qo_heads=4),
    Case("page_is_heads", (70, 3), num_qo_heads=8, num_kv_heads=8, page_size=8, layout="HND"),
    Case("group1", (50, 17), num_qo_heads=2, head_dim=32),
    Case("group5", RAGGED, num_qo_heads=10),
    Case("group7", RAGGED, num_qo_heads=7, num_kv_heads=1, layout="HND", dtype="bfloat16"),
    Case("group12", RAGGED, num_qo_heads=24, head_dim=32),
    Case("group16_dim128", (40, 0, 300), num_qo_heads=16, num_kv_heads=1, head_dim=128),
    Case("group32", RAGGED, num_qo_heads=32, num_kv_heads=1, page_size=3),
    Case("q_in_shared_round_a_ring_of_3", (600,), num_qo_heads=32, num_kv_heads=1, head_dim=128),
    Case("round_a_ring_of_2", (1300, 515), num_qo_heads=2, num_kv_heads=1, head_dim=112),
    Case("round_a_ring_of_3", (1300, 515), num_qo_heads=2, num_kv_heads=1, head_dim=80, page_size=3),
    Case("round_a_ring_of_4", (1300, 515), num_qo_heads=2, num_kv_heads=1, head_dim=32, window_left=1200),
    Case("group40_in_two_blocks", (90, 20), num_qo_heads=40, num_kv_heads=1, head_dim=32),
    *(
        Case(f"dim{dim}", (100, 33, 0), num_qo_heads=4, head_dim=dim, dtype=("float16", "bfloat16")[i % 2])
        for i, dim in enumerate((16, 48, 80, 96, 112, 128, 176, 256))
    ),
    Case("window0", RAGGED, window_left=0, num_qo_heads=4),
    Case("window20", (200, 40, 5), window_left=20, page_size=3, layout="HND", num_qo_heads=4),
    Case("soft_cap", RAGGED, logits_soft_cap=1.5, num_qo_heads=4),
    Case("soft_cap_window", (150,), logits_soft_cap=30, window_left=40, dtype="bfloat16", num_qo_heads=4),
    Case("q_len3", RAGGED, q_len=3, num_qo_heads=4),
    Case("q_len5_window7", RAGGED, q_len=5, window_left=7, num_qo_heads=4),
    Case("q_len4_group3", RAGGED, q_len=4, num_qo_heads=6, dtype="bfloat16", layout="HND"),
    Case("q_len9_group8_in_blocks", (60, 4), q_len=9, num_qo_heads=8, num_kv_heads=1, head_dim=128),
    Case("middle_chunk", (48, 64, 16), page_offsets=(2, 1, 0), total_lens=(130, 65, 16), q_len=2, num_qo_heads=4),
    Case(
        "every_third_page",
        (72, 16, 0, 1),
        page_size=8,
        page_offsets=(1,) * 4,
        page_stride=3,
        total_lens=(200, 45, 3, 9),
        window_left=90,
        layout="HND",
        num_qo_heads=4,
    ),
    Case(  # some of its queries end, and some windows begin, inside a page that the table does not hold
        "every_third_page_q_len9",
        (60, 16),
        q_len=9,
        page_size=8,
        page_offsets=(1,) * 2,
        page_stride=3,
        total_lens=(180, 44),
        window_left=90,
        num_qo_heads=4,
        head_dim=32,
    ),
]


@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, num_splits: int) -> None:
    inputs = build(case)
    check(inputs, *run(inputs, num_splits=num_splits))


FEW_WARPS = ("pages_of_3", "group5", "group16_dim128", "dim128", "window20", "q_len3", "every_third_page")


@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("case", [case for case in CASES if case.name in FEW_WARPS], ids=str)
def test_ctas_for_many_requests(case: Case, num_splits: int) -> None:
    inputs = build(case)
    check(inputs, *run(inputs, num_splits=num_splits, num_pairs=recipes.MANY_PAIRS))


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("pages_of_3", "group5")], ids=str)
def test_ctas_that_share_a_multiprocessor(case: Case) -> None:
    inputs = build(case)
    check(inputs, *run(inputs, num_splits=3, num_pairs=recipes.MANY_PAIRS - 1))


def test_rings_of_all_sizes_are_gone_round() -> None:
    """The cases named so have tiles for more than two rounds of a warp, with as many stages as they say."""
    for case in CASES:
        if "round_a_ring_of" in case.name:
            shape = decode_recipe(case.q_len * case.num_qo_heads // case.num_kv_heads, case.head_dim)
            tiles_a_warp = max(case.kv_lens) / 16 / shape.warps
            assert shape.stages == int(case.name[-1]) and 2 * tiles_a_warp >= 2 * shape.stages


def test_more_splits_than_tiles_spare_requests_float32_and_reversed_threads() -> None:
    inputs = build(Case("spare", (300, 0, 17), num_qo_heads=6, layout="HND"))
    for num_splits in (1, 16):
        for reverse in (False, True):
            check(inputs, *run(inputs, num_splits=num_splits, spare_requests=2, float32=True, reverse=reverse))
    for heads in (1, 16):  # more than are merged at a time
        inputs = build(Case("many_splits", (900,), num_qo_heads=heads, num_kv_heads=1, head_dim=128))
        check(inputs, *run(inputs, num_splits=41))


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_weights_of_few_columns_have_the_bits_of_two_numbers(dtype: str) -> None:
    """Two 16-bit numbers each: one of them alone is off by 1e-3 in bfloat16."""
    for scores in ("sigma1", "sigma5", "jump_by_5.2"):
        inputs = build(Case("weights", (200, 40), num_qo_heads=4, dtype=dtype), scores=scores)
        out, _, _ = run(inputs, float32=True, num_splits=2)
        right = np.empty(inputs.q.shape, np.float32)
        pa.decode(inputs.q, inputs.kv(), inputs.table(), out=right, **inputs.options())
        assert_close(out, right, tolerance=2e-5)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("scores", (None, "jump_by_9", "jump_by_15"))
def test_an_infinite_value_stays_infinite(scores: str | None, dtype: str) -> None:
    """0 * inf is NaN: no part of a weight is 0."""
    inputs = build(Case("infinite", (48,), page_size=16, num_qo_heads=2, head_dim=32, dtype=dtype), scores=scores)
    inputs.v_pages[inputs.indices[0], 0, :, 5] = np.inf
    out, _, _ = run(inputs, num_splits=3)
    assert np.isposinf(out[..., 5].astype(np.float32)).all()
    assert np.isfinite(np.delete(out, 5, axis=-1).astype(np.float32)).all()


@pytest.mark.parametrize("num_splits", (1, 2))
def test_an_infinite_value_reaches_only_those_who_see_it(num_splits: int) -> None:
    """The last token stands in a tile of its own, which leaves the first query a state that is empty, but holds NaN."""
    inputs = build(Case("later", (17,), page_size=16, num_qo_heads=2, head_dim=32, q_len=2))
    inputs.v_pages[inputs.indices[1], 0, :, 5] = np.inf
    out, _, _ = run(inputs, num_splits=num_splits)
    assert np.isfinite(out[0].astype(np.float32)).all() and np.isposinf(out[1, :, 5].astype(np.float32)).all()


@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("shape", ({"head_dim": 32}, {"head_dim": 128, "num_qo_heads": 16}), ids=str)
def test_a_nan_is_seen(num_splits: int, shape: dict[str, int]) -> None:
    """A warp that meets nothing but NaN has no maximum, as one that meets no key has none."""
    case = Case("nan", (200,), page_size=16, **({"num_qo_heads": 2, "num_kv_heads": 1} | shape))
    inputs = build(case)
    inputs.q[0, 0, 3] = np.nan
    out, lse, _ = run(inputs, num_splits=num_splits)
    assert np.isnan(out[0, 0].astype(np.float32)).all() and np.isnan(lse[0, 0])
    assert np.isfinite(out[0, 1:].astype(np.float32)).all() and np.isfinite(lse[0, 1:]).all()

    inputs = build(case)
    inputs.k_pages[inputs.indices[2]] = np.nan
    out, lse, _ = run(inputs, num_splits=num_splits)
    assert np.isnan(out.astype(np.float32)).all() and np.isnan(lse).all()


SINKS = [
    Case("sinks", RAGGED, num_qo_heads=4),
    Case("sinks_group8_dim64", RAGGED, num_qo_heads=16, page_size=3),
    Case("sinks_q_len3_window20", RAGGED, q_len=3, window_left=20, num_qo_heads=4, layout="HND"),
    Case("sinks_q_in_shared", RAGGED, num_qo_heads=16, num_kv_heads=1, head_dim=128, dtype="bfloat16"),
    Case("sinks_in_blocks_of_columns", (60, 4), q_len=9, num_qo_heads=8, num_kv_heads=1, head_dim=128),
    Case("sinks_soft_cap", RAGGED, logits_soft_cap=1.5, num_qo_heads=4),
    Case("sinks_middle_chunk", (48, 64, 16), page_offsets=(2, 1, 0), total_lens=(130, 65, 16), q_len=2, window_left=80),
    Case("sinks_nothing_seen", (20, 4), page_offsets=(9, 9), total_lens=(300, 10), window_left=5, num_qo_heads=4),
]


WIDTHS = [
    (Case("wide_keys", RAGGED, num_qo_heads=4, head_dim=192), 128),
    (Case("wide_keys_round_the_ring", (1300, 515), num_qo_heads=16, num_kv_heads=1, head_dim=192, page_size=3), 128),
    (Case("wide_values", RAGGED, num_qo_heads=4, layout="HND", dtype="bfloat16"), 128),
    (Case("wide_values_q_len3_window20", RAGGED, q_len=3, window_left=20, num_qo_heads=16), 128),
    (Case("wide_values_ring_of_3", (1300, 515), num_qo_heads=2, num_kv_heads=1, head_dim=64), 80),
    (Case("narrow_values_ring_of_3", (1300, 515), num_qo_heads=2, num_kv_heads=1, head_dim=96, page_size=3), 32),
    (Case("narrow_values_ring_of_4", (1300, 515), num_qo_heads=2, num_kv_heads=1, head_dim=64), 16),
    (Case("one_wide_value", RAGGED, num_qo_heads=4, head_dim=16), 256),
]


@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize(("case", "v_head_dim"), WIDTHS, ids=str)
def test_values_of_other_dims_than_keys(case: Case, v_head_dim: int, num_splits: int) -> None:
    inputs, sinks = build(replace(case, v_dim=v_head_dim)), sinks_of(case)
    right, right_lse = with_sinks(*dense_attention(inputs), sinks)
    for spare in (0, 1):
        out, lse, arrivals = run(inputs, num_splits=num_splits, sinks=sinks, spare_requests=spare)
        rows = len(right)
        assert_close(out[:rows], right, lse[:rows], right_lse, tolerance=OUT_TOLERANCE[case.dtype])
        assert (out[rows:] == 0).all() and not arrivals.any()


def sinks_of(case: Case) -> np.ndarray:
    """One a head: of the size of scores, far below, far above, and none."""
    sinks = np.random.default_rng(1).normal(0, 2, case.num_qo_heads).astype(np.float32)
    sinks[:3] = (-np.inf, -200, 4)[: case.num_qo_heads]
    return sinks


@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("case", SINKS, ids=str)
def test_sinks(case: Case, num_splits: int) -> None:
    """Once a row, also where it is split or sees no key; rows without a request have none."""
    inputs, sinks = build(case), sinks_of(case)
    out, lse, _ = run(inputs, num_splits=num_splits, sinks=sinks, spare_requests=2)
    right, right_lse = with_sinks(*dense_attention(inputs), sinks)
    tolerances = {"tolerance": OUT_TOLERANCE[case.dtype], "lse_tolerance": LSE_TOLERANCE_SOFT_CAP}
    rows = len(right)
    assert_close(out[:rows], right, lse[:rows], right_lse, **tolerances)
    assert (out[rows:] == 0).all() and np.isneginf(lse[rows:]).all()

    out, lse, _ = run(inputs, num_splits=num_splits, sinks=sinks, first_is_faulty=True)
    q_len = case.q_len
    assert (out[:q_len] == 0).all() and np.isneginf(lse[:q_len]).all()
    assert_close(out[q_len:], right[q_len:], lse[q_len:], right_lse[q_len:], **tolerances)


@pytest.mark.parametrize("num_splits", (1, 3))
def test_sinks_of_minus_infinity_change_no_bit(num_splits: int) -> None:
    inputs = build(Case("no_sinks", RAGGED, num_qo_heads=4))
    none = np.full(4, -np.inf, np.float32)
    for got, right in zip(
        run(inputs, num_splits=num_splits, sinks=none), run(inputs, num_splits=num_splits), strict=True
    ):
        np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize("num_splits", (1, 3))
def test_huge_sinks_and_huge_scores_are_finite(num_splits: int) -> None:
    inputs = build(Case("huge_sinks", (40, 0), num_qo_heads=4, num_kv_heads=1, dtype="bfloat16"))
    sinks = np.array([2.0**127, -(2.0**127), 2.0**20, np.inf], np.float32)
    out, lse, _ = run(inputs, num_splits=num_splits, sinks=sinks)
    without, lse_without, _ = run(inputs, num_splits=num_splits)
    assert (out[:, [0, 2, 3]] == 0).all()
    np.testing.assert_allclose(lse[:, [0, 2, 3]], [sinks[[0, 2, 3]]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(out[0, 1], without[0, 1])
    np.testing.assert_allclose(lse[:, 1], [lse_without[0, 1], sinks[1]], rtol=1e-6)

    inputs = build(Case("huge_scores", (40,), num_qo_heads=4, num_kv_heads=1, dtype="bfloat16"), scores="huge_border")
    without, lse_without, _ = run(inputs, num_splits=num_splits)
    out, lse, _ = run(inputs, num_splits=num_splits, sinks=np.zeros(4, np.float32))
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()
    seen = lse_without > 0
    np.testing.assert_array_equal(out[seen], without[seen])
    np.testing.assert_array_equal(lse, np.maximum(lse_without, 0))


def test_a_sink_of_nan_is_seen() -> None:
    inputs = build(Case("nan_sink", (40, 0), num_qo_heads=2))
    out, lse, _ = run(inputs, sinks=np.array([np.nan, 0], np.float32))
    assert np.isnan(out[:, 0].astype(np.float32)).all() and np.isnan(lse[:, 0]).all()
    assert np.isfinite(out[:, 1].astype(np.float32)).all() and np.isfinite(lse[:, 1]).all()


def test_needles_at_every_tile_and_split_border() -> None:
    case = Case("needle", (140,), num_qo_heads=4, head_dim=32)
    for needle in sorted({*range(0, 140, 16), *range(15, 140, 16), 139}):
        inputs = build(case, needle=needle)
        check(inputs, *run(inputs, num_splits=3))
