"""single_decode and single_prefill: contiguous K and V by tag, the same results as a cache of pages, no copy."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_attn as pa
from tests.cases import LAYOUTS, OUT_TOLERANCE, Case, assert_close, build


def contiguous(tokens: np.ndarray, layout: str) -> np.ndarray:
    return tokens if layout == "NHD" else np.ascontiguousarray(tokens.swapaxes(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_len", [0, 1, 7, 64, 777])
@pytest.mark.parametrize(
    "options", [{}, {"window_left": 20, "logits_soft_cap": 3.0, "sm_scale": 0.2}], ids=["plain", "all"]
)
def test_single_is_a_batch_of_one(kv_len: int, layout: str, options: dict[str, Any]) -> None:
    for case in (Case("one_decode", (kv_len,)), Case("one_prefill", (kv_len,), q_lens=(9,))):
        inputs = build(case)
        k, v = contiguous(inputs.k[0], layout), contiguous(inputs.v[0], layout)
        if case.is_decode:
            expected, expected_lse = pa.decode(inputs.q, inputs.kv(), inputs.table(), return_lse=True, **options)
            out, lse = pa.single_decode(inputs.q[0], k, v, layout=layout, return_lse=True, **options)
            assert (out.shape, lse.shape) == ((8, 64), (8,))
            out, lse = out[None], lse[None]
        else:
            args = inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table()
            expected, expected_lse = pa.prefill(*args, return_lse=True, **options)
            out, lse = pa.single_prefill(inputs.q, k, v, layout=layout, return_lse=True, **options)
        assert_close(out, expected, lse, expected_lse, tolerance=OUT_TOLERANCE["float16"])


def test_single_prefill_need_not_be_causal() -> None:
    inputs = build(Case("one_not_causal", (30,), q_lens=(30,), causal=False))
    expected = pa.prefill(inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(), causal=False)
    out = pa.single_prefill(inputs.q, inputs.k[0], inputs.v[0], layout="NHD", causal=False)
    assert_close(out, expected, tolerance=1e-3)
    with pytest.raises(AssertionError):
        assert_close(pa.single_prefill(inputs.q, inputs.k[0], inputs.v[0], layout="NHD"), expected, tolerance=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_k_and_v_are_taken_as_they_lie(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []
    init = pa.PagedKV.__init__

    def remember(self: pa.PagedKV, k_pages: Any, v_pages: Any, **tag: Any) -> None:
        pools.extend((k_pages, v_pages))
        init(self, k_pages, v_pages, **tag)

    monkeypatch.setattr(pa.PagedKV, "__init__", remember)
    inputs = build(Case("as_they_lie", (33,)))
    wide = np.zeros((2, 50, 4, 64) if layout == "NHD" else (2, 4, 50, 64), np.float16)
    views = [plane[:33, 1:3] if layout == "NHD" else plane[1:3, :33] for plane in wide]  # strided in both axes
    for view, tokens in zip(views, (inputs.k[0], inputs.v[0]), strict=True):
        view[...] = contiguous(tokens, layout)
    out = pa.single_decode(inputs.q[0], *views, layout=layout)
    assert all(np.shares_memory(pool, wide) for pool in pools) and len(pools) == 2
    assert_close(out, pa.decode(inputs.q, inputs.kv(), inputs.table())[0], tolerance=1e-3)


def test_out_and_lse_are_written_and_returned() -> None:
    inputs = build(Case("one_out", (33,), q_lens=(4,)))
    k, v = inputs.k[0], inputs.v[0]
    for single, q in ((pa.single_prefill, inputs.q), (pa.single_decode, inputs.q[0])):
        expected, expected_lse = single(q, k, v, layout="NHD", return_lse=True)
        out, lse = np.empty(q.shape, np.float32), np.empty(q.shape[:-1], np.float32)
        results = single(q, k, v, layout="NHD", out=out, lse=lse, return_lse=True)
        assert results[0] is out and results[1] is lse
        np.testing.assert_array_equal(out.astype(np.float16), expected)
        np.testing.assert_array_equal(lse, expected_lse)
        lse[...] = 7
        assert single(q, k, v, layout="NHD", out=out, lse=lse) is out
        np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_in_jax_out(dtype: str) -> None:
    inputs = build(replace(Case("one_jax", (33,), q_lens=(4,)), dtype=dtype))
    arrays = inputs.q, inputs.k[0], inputs.v[0]
    expected = pa.single_prefill(*arrays, layout="NHD", return_lse=True)
    results = pa.single_prefill(*map(jnp.asarray, arrays), layout="NHD", return_lse=True)
    one = pa.single_decode(jnp.asarray(inputs.q[3]), *arrays[1:], layout="NHD", return_lse=True)
    for result, wanted, last in zip(results, expected, one, strict=True):
        assert isinstance(result, jax.Array) and isinstance(last, jax.Array)
        np.testing.assert_array_equal(result, wanted)
        assert_close(np.atleast_2d(last), np.atleast_2d(wanted[3]), tolerance=1e-2 if dtype == "bfloat16" else 2e-3)


Q, K = np.zeros((8, 64), np.float16), np.zeros((5, 2, 64), np.float16)


@pytest.mark.parametrize(
    ("q", "k", "v", "layout", "error", "message"),
    [
        (Q[None], K, K, "NHD", ValueError, r"q must be \[num_qo_heads, head_dim\], got q\.shape=\(1, 8, 64\)"),
        (Q, K[None], K[None], "NHD", ValueError, r"k must have 3 axes, .*k\.shape=\(1, 5, 2, 64\)"),
        (Q, K, K[:4], "NHD", ValueError, r"v must have shape \[5, 2, v_head_dim\].*v\.shape=\(4, 2, 64\)"),
        (Q, K, K, "HND", ValueError, r"q has 8 heads, which is not a multiple of num_kv_heads=5"),
        (Q, K, K, "NDH", ValueError, "layout must be 'NHD'.*'NDH'"),
        (Q, K.astype(np.int32), K, "NHD", TypeError, "k must be one of float16.*int32"),
        (Q, K, K.astype(np.float32), "NHD", TypeError, r"v must be float16.*got float32; pass v\.astype"),
        (Q.astype(np.float32), K, K, "NHD", TypeError, "q must be float16.*got float32"),
        (Q[:, :32], K, K, "NHD", ValueError, r"q must have shape .*64\].*\(8, 32\)"),
        (Q, K.tolist(), K, "NHD", TypeError, "k must be an array.*list"),
    ],
)
def test_single_decode_refuses(q: Any, k: Any, v: Any, layout: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pa.single_decode(q, k, v, layout=layout)


def test_single_prefill_wants_a_row_axis() -> None:
    with pytest.raises(ValueError, match=r"q must be \[rows, num_qo_heads, head_dim\], got q\.shape=\(8, 64\)"):
        pa.single_prefill(Q, K, K, layout="NHD")
    assert pa.single_prefill(np.zeros((0, 8, 64), np.float16), K, K, layout="NHD").shape == (0, 8, 64)


def test_one_shot_calls_do_not_speak_of_plans() -> None:
    """What is wrong with a call of decode, prefill and single_* is said without a plan, which the caller has not."""
    decode, prefill = build(Case("words_decode", (9, 3))), build(Case("words_prefill", (9, 3), q_lens=(2, 3)))
    k, v = decode.k[0], decode.v[0]
    wide = np.zeros((2, 8, 32), np.float16)
    calls = [
        lambda: pa.decode(np.concatenate([decode.q] * 2), decode.kv(), decode.table()),
        lambda: pa.decode(wide, decode.kv(), decode.table()),
        lambda: pa.decode(decode.q.astype(np.float32), decode.kv(), decode.table()),
        lambda: pa.prefill(prefill.q[:, :, :32], prefill.qo_indptr, prefill.kv(), prefill.table()),
        lambda: pa.prefill(prefill.q[:4], prefill.qo_indptr, prefill.kv(), prefill.table()),
        lambda: pa.single_decode(wide[0], k, v, layout="NHD"),
        lambda: pa.single_prefill(wide, k, v, layout="NHD"),
        lambda: pa.single_prefill(decode.q.astype(np.float32), k, v, layout="NHD"),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        assert "plan" not in str(raised.value)
    for call in calls[1], calls[5]:
        with pytest.raises(ValueError, match=r"q\.shape=.*; reshape( or slice)? q$"):  # another table does not help
            call()


@pytest.mark.parametrize("given", ["q", "out", "lse"])
def test_a_shape_of_single_decode_is_the_one_that_it_takes(given: str) -> None:
    """Not that with the axis that the call adds."""
    k = np.ones((4, 1, 16), np.float32)
    arguments = {
        "q": np.ones((2, 16), np.float32),
        "out": np.empty((2, 16), np.float32),
        "lse": np.empty(2, np.float32),
    }
    pa.single_decode(k=k, v=k, layout="NHD", **arguments)
    wrong = {"q": np.ones((2, 8), np.float32), "out": np.empty((3, 16), np.float32), "lse": np.empty(3, np.float32)}
    right = {"q": r"\[num_qo_heads, 16\]", "out": r"\[2, 16\]", "lse": r"\[2\]"}
    with pytest.raises(ValueError, match=rf"{given} must have shape {right[given]}, "):
        pa.single_decode(k=k, v=k, layout="NHD", **{**arguments, given: wrong[given]})
