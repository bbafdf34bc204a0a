"""A wrong kernel has no time: sampled queries of every timed call are compared with the NumPy backend first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import LSE_TOLERANCE, OUT_TOLERANCE, assert_close, with_sinks

from .workload import Workload, sampled_queries, to_host

MOST_KEYS = 2**16  # keys times KV heads of a sampled query; where it sees more, only some heads are compared


@dataclass(frozen=True)
class _Sample:
    """What one query of some KV heads gives."""

    request: int
    query: int
    row: int  # of q
    heads: slice  # of q
    out: np.ndarray
    lse: np.ndarray


class Expected:
    """What sampled queries of a causal workload give, computed once for everything that is timed on it."""

    def __init__(self, workload: Workload) -> None:
        self._case = workload.case
        self._has_sink = np.isfinite(to_host(workload.sinks)) if workload.case.sinks else np.False_
        self._starts = np.concatenate([[0], np.cumsum(workload.case.queries)])
        random = np.random.default_rng(0)
        self._samples = [self._sample(workload, *sampled, random) for sampled in sampled_queries(workload.case)]

    def _sample(self, workload: Workload, request: int, query: int, random: np.random.Generator) -> _Sample:
        case = self._case
        group = case.num_qo_heads // case.num_kv_heads
        count = max(case.kv_lens[request] - case.queries[request] + query + 1, 0) if case.kv_lens[request] else 0
        num_heads = min(max(MOST_KEYS // max(count, 1), 1), case.num_kv_heads)
        first = int(random.integers(case.num_kv_heads - num_heads + 1))
        row, heads = int(self._starts[request]) + query, slice(first * group, (first + num_heads) * group)
        k, v = workload.tokens(request, count, slice(first, first + num_heads))
        q = to_host(workload.q[row])[heads]
        out, lse = pa.single_decode(q, k, v, layout="NHD", window_left=case.window_left, return_lse=True)
        sinks = None if workload.sinks is None else to_host(workload.sinks)[heads]
        return _Sample(request, query, row, heads, *with_sinks(out, lse, sinks))

    def check(self, out: Any, lse: Any = None) -> int:
        """Compare `out` [queries, heads, dim] and, where it is given, `lse` [queries, heads]; how many were compared.

        Raises AssertionError with the row and size of what is wrong.
        """
        case = self._case
        if lse is not None:
            lse = to_host(lse)
            sees = np.repeat(np.array(case.kv_lens) > 0, case.queries)
            finite = np.broadcast_to(sees[:, None] | self._has_sink, lse.shape)
            unlike = np.argwhere(np.isfinite(lse) != finite)
            if len(unlike):
                at = tuple(unlike[0].tolist())
                wanted = "a number" if finite[at] else "-inf, for it sees no key"
                raise AssertionError(f"lse{list(at)} of {case} is {lse[at]}, and should be {wanted}")
        for sample in self._samples:
            here = {} if lse is None else {"lse": lse[sample.row, sample.heads], "expected_lse": sample.lse}
            try:
                assert_close(
                    to_host(out[sample.row])[sample.heads], sample.out, **here,
                    tolerance=OUT_TOLERANCE[case.dtype], lse_tolerance=LSE_TOLERANCE,
                )  # fmt: skip
            except AssertionError as error:
                where = f"request {sample.request}, query {sample.query}, heads from {sample.heads.start}"
                raise AssertionError(f"{where}: {error}") from error
        return len(self._samples)
