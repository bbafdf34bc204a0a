"""One case on the GPU, and the reference's answer to it."""

from typing import Any

import numpy as np

import paged_attn as pa
from tests import cases


def on_gpu(array: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(array)


def expected(inputs: cases.Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The reference's answer to the same 16-bit inputs, computed and kept in float32."""
    out = np.empty(inputs.q.shape, np.float32)
    if inputs.case.is_decode:
        return pa.decode(inputs.q, inputs.kv(), inputs.table(), out=out, return_lse=True, **inputs.options())
    return pa.prefill(
        inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(), out=out, return_lse=True, **inputs.options()
    )


def answer(inputs: cases.Inputs, **options: Any) -> tuple[Any, Any]:
    options = inputs.options() | {"return_lse": True} | options
    if inputs.case.is_decode:
        return pa.decode(on_gpu(inputs.q), inputs.kv(on_gpu), inputs.table(on_gpu), **options)
    return pa.prefill(on_gpu(inputs.q), on_gpu(inputs.qo_indptr), inputs.kv(on_gpu), inputs.table(on_gpu), **options)


def assert_right(inputs: cases.Inputs, out: Any, lse: Any) -> None:
    soft = inputs.case.logits_soft_cap > 0
    cases.assert_close(
        out.get(), expected(inputs)[0], lse.get(), expected(inputs)[1],
        tolerance=cases.OUT_TOLERANCE[inputs.case.dtype],
        lse_tolerance=cases.LSE_TOLERANCE_SOFT_CAP if soft else cases.LSE_TOLERANCE,
    )  # fmt: skip
