"""What a sink does, on every case that has sinks: it is one more state of the row, whose values are zero."""

import numpy as np
import pytest

import paged_attn as pa
from tests.cases import LSE_TOLERANCE, LSE_TOLERANCE_SOFT_CAP, SINKS, Case, assert_close, build, with_sinks


@pytest.mark.parametrize("case", SINKS, ids=str)
def test_a_sink_is_a_state_without_values(case: Case) -> None:
    inputs = build(case)
    arguments = (inputs.q, inputs.kv(), inputs.table())
    if case.is_decode:
        out, lse = pa.decode(*arguments, return_lse=True, **inputs.options())
    else:
        q, kv, table = arguments
        out, lse = pa.prefill(q, inputs.qo_indptr, kv, table, return_lse=True, **inputs.options())
    out = out.astype(np.float32).reshape(-1, case.num_qo_heads, case.head_dim)
    lse = lse.reshape(out.shape[:2])
    sinks = inputs.layer_options()["sinks"]
    merged = pa.merge_state(out, lse, np.zeros_like(out), np.broadcast_to(sinks, lse.shape))
    lse_tolerance = LSE_TOLERANCE_SOFT_CAP if case.logits_soft_cap else LSE_TOLERANCE
    expected = with_sinks(out, lse, sinks)
    assert_close(merged[0], expected[0], merged[1], expected[1], tolerance=1e-5, lse_tolerance=lse_tolerance)
    sees_none = np.repeat(np.array(case.kv_lens) == 0, case.queries)
    assert not expected[0][sees_none].any()
    np.testing.assert_array_equal(expected[1][sees_none], np.broadcast_to(sinks, lse.shape)[sees_none])
