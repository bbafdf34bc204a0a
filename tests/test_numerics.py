"""The study of errors (bench/numerics.py) without a GPU: its inputs, figures and verdicts, and exact.cu on the shim."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import numerics
from bench.numerics import HEAD_DIM, NUM_KV_HEADS, NUM_QO_HEADS, OURS, PAGE_SIZE, Inputs, Point, points
from tests.cases import OUT_TOLERANCE
from tests.simt.driver import launch

SMALL = 64
# exact.cu takes plain arguments, as CuPy passes them; the shim launches kernels that take a struct.
WRAPPER = """
struct ExactParams {
    const u16* q;
    const u16* k;
    const u16* v;
    const int* page_ids;
    double* out;
    double* lse;
    int rows;
    int kv_len;
    float sm_scale;
    float soft_cap;
};
extern "C" __global__ void exact(const __grid_constant__ ExactParams p) {
    exact_attention(p.q, p.k, p.v, p.page_ids, p.out, p.lse, p.rows, QO_HEADS, KV_HEADS, PAGE_SIZE, p.kv_len,
                    p.sm_scale, p.soft_cap);
}
"""


@pytest.fixture(scope="module")
def inputs() -> dict[str, Inputs]:
    return {dtype: Inputs(np, dtype, SMALL) for dtype in numerics.DTYPES_16}


def line(**changes: Any) -> dict[str, Any]:
    point = {"kind": "decode", "dtype": "float16", "scores": "unit", "logits_soft_cap": 0.0, "kv_len": 16}
    figures = {"library": OURS, "finite": True, "out_error": 4e-4, "worst_row_error": 5e-4, "lse_error": 1e-6}
    return point | figures | changes


def test_the_reference_is_right_at_every_small_point(inputs: dict[str, Inputs]) -> None:
    lines = numerics.study(points(SMALL), lambda point: inputs[point.dtype].problem(point), numerics.exact_on_cpu)
    assert len(lines) == len(points(SMALL))
    for found in lines:
        assert found["finite"] and found["lse_error"] < 2e-5, found
        assert 0 <= found["out_error"] <= found["worst_row_error"] < OUT_TOLERANCE[found["dtype"]], found
    assert max(found["out_error"] for found in lines) > 1e-4, "results of 16 bits cannot be exact"
    assert numerics.complaints(lines) == []


@pytest.mark.parametrize(
    ("scores", "lse"),
    [
        ("all -64", -64 + np.log(SMALL)),
        ("one +20", np.log(np.exp(20.0) + SMALL - 1)),
        ("all equal", np.log(SMALL)),
    ],
)
def test_chosen_scores_are_exact(inputs: dict[str, Inputs], scores: str, lse: float) -> None:
    for dtype, of_dtype in inputs.items():
        problem = of_dtype.problem(Point("decode", dtype, scores, 0.0, SMALL))
        _, found = numerics.exact_on_cpu(problem)
        np.testing.assert_allclose(found, lse, rtol=1e-7)  # it comes as a float32


@pytest.mark.parametrize(("scores", "deviation"), numerics.RANDOM_SCORES.items())
def test_random_scores_have_their_size(inputs: dict[str, Inputs], scores: str, deviation: float) -> None:
    problem = inputs["float16"].problem(Point("prefill", "float16", scores, 0.0, SMALL))
    q, k = problem.q.astype(np.float64), problem.k_pages.astype(np.float64)[..., 0, :].reshape(-1, HEAD_DIM)
    found = np.std(q[:, 0] @ k.T * problem.point.sm_scale)
    assert 0.7 * deviation < found < 1.4 * deviation


@pytest.mark.shim
@pytest.mark.parametrize("point", [point for point in points(SMALL) if point.kv_len == SMALL], ids=str)
def test_the_exact_kernel_is_exact(inputs: dict[str, Inputs], point: Point) -> None:
    text = Path(numerics.__file__).with_name("exact.cu").read_text()
    problem = inputs[point.dtype].problem(point)
    rows = len(problem.q)
    out, lse = np.full(problem.q.shape, np.nan), np.full(problem.q.shape[:2], np.nan)
    launch(
        "exact",
        (rows, NUM_QO_HEADS),
        512,
        {
            "q": problem.q, "k": problem.k_pages, "v": problem.v_pages, "page_ids": problem.page_ids,
            "out": out, "lse": lse, "rows": rows, "kv_len": point.kv_len,
            "sm_scale": point.sm_scale, "soft_cap": point.logits_soft_cap,
        },
        shared_bytes=16 * (HEAD_DIM + 2) * 8,
        source=text + WRAPPER,
        HEAD_DIM=HEAD_DIM, BFLOAT16=int(point.dtype == "bfloat16"), QO_HEADS=NUM_QO_HEADS, KV_HEADS=NUM_KV_HEADS,
        PAGE_SIZE=PAGE_SIZE,
    )  # fmt: skip
    right_out, right_lse = numerics.exact_on_cpu(problem)
    # sm_scale goes through a float in the wrapper.
    np.testing.assert_allclose(out, right_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, right_lse, rtol=1e-6)


def test_complaints() -> None:
    peer = {"library": "peer"}
    assert numerics.complaints([line(), line(**peer)]) == []
    assert numerics.complaints([line(), line(**peer, out_error=3.8e-4, lse_error=0.9e-6)]) == []
    (worse,) = numerics.complaints([line(), line(**peer, out_error=3e-4)])
    assert "out_error is 0.0004, peer's 0.0003" in worse and "decode, float16, unit" in worse
    (worse,) = numerics.complaints([line(lse_error=3e-5), line(**peer)])
    assert "lse_error" in worse
    # An error far below what the format can show is none.
    assert numerics.complaints([line(out_error=1e-6), line(**peer, out_error=0.0)]) == []
    (infinite,) = numerics.complaints([line(finite=False)])
    assert "not finite" in infinite


def test_infinite_results_are_found() -> None:
    right = (np.ones((1, 2, 4)), np.zeros((1, 2)))
    assert numerics.errors(right, right) == {"finite": True, "out_error": 0, "worst_row_error": 0, "lse_error": 0}
    for bad in (np.nan, np.inf, -np.inf):
        assert not numerics.errors((right[0], np.full((1, 2), bad)), right)["finite"]


def test_table_and_plot(inputs: dict[str, Inputs], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        line(**{"kind": p.kind, "dtype": p.dtype, "scores": p.scores, "logits_soft_cap": p.logits_soft_cap},
             kv_len=p.kv_len, library=library)
        for p in points(SMALL)
        for library in (OURS, "flashinfer", "flashinfer tensor cores")
    ]  # fmt: skip
    table = numerics.table_of(lines, "errors")
    assert len(table.rows) == len(points(SMALL)) // 2
    assert next(iter(table.columns[-1].cells)) == "4.0e-04 / 4.0e-04"
    numerics.plot(lines, tmp_path / "numerics.png", "errors")
    assert (tmp_path / "numerics.png").stat().st_size > 10_000
