"""A wrong kernel has no time: sampled queries of every timed call are compared with the NumPy backend first."""

from __future__ import annotations

from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import LSE_TOLERANCE, OUT_TOLERANCE, assert_close

from .workload import Workload, sampled_queries, to_host


def check(workload: Workload, out: Any, lse: Any) -> int:
    """Compare sampled queries of a causal `out` [queries, heads, dim], `lse` [queries, heads]; how many were compared.

    Raises AssertionError with the place and size of what is wrong.
    """
    case, starts, lse = workload.case, to_host(workload.qo_indptr), to_host(lse)
    unseen = np.argwhere(~np.isfinite(lse))
    assert not len(unseen), f"lse{unseen[0].tolist()} = {lse[tuple(unseen[0])]}, but every query of {case} sees a key"
    queries = list(sampled_queries(case))
    for request, query in queries:
        row = starts[request] + query
        k, v = workload.tokens(request, case.kv_lens[request] - case.queries[request] + query + 1)
        expected = pa.single_decode(to_host(workload.q[row]), k, v, layout="NHD", return_lse=True)
        try:
            assert_close(
                to_host(out[row]), expected[0], lse[row], expected[1],
                tolerance=OUT_TOLERANCE[case.dtype], lse_tolerance=LSE_TOLERANCE,
            )  # fmt: skip
        except AssertionError as error:
            raise AssertionError(f"request {request}, query {query}: {error}") from error
    return len(queries)
