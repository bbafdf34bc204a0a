"""A case of tests/cases.py as arrays of NumPy or CuPy: pools in shuffled page order, queries, page table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import DTYPES, Case

TILE = 4_194_301  # a prime, so that no two pages repeat the same numbers at the same place


def random_normal(xp: ModuleType, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> Any:
    """Standard normal numbers of a 16-bit dtype: a random tile from NumPy, repeated (cuRAND need not be installed)."""
    tile = np.random.default_rng(seed).standard_normal(TILE, dtype=np.float32).astype(dtype)
    bits = xp.asarray(tile.view(np.uint16))
    flat = xp.empty(int(np.prod(shape)), np.uint16)
    for start in range(0, flat.size, TILE):
        flat[start : start + TILE] = bits[: flat.size - start]
    return flat.view(dtype).reshape(shape)


def to_host(array: Any) -> np.ndarray:
    """A NumPy array of the same values."""
    return array if isinstance(array, np.ndarray) else array.get()


@dataclass(frozen=True)
class Workload:
    """One case, ready to run.

    storage     [2, num_pages, ...page...]            K pages, then V pages: one block of memory for the read floor
    q           [queries, num_qo_heads, head_dim]     all requests' queries, one after the other
    qo_indptr   [batch + 1] int32                     where each request's queries begin
    indptr      [batch + 1] int32 on the host         where each request's page ids begin in table.indices
    """

    case: Case
    storage: Any
    kv: pa.PagedKV
    table: pa.PageTable
    q: Any
    qo_indptr: Any
    indptr: np.ndarray

    @classmethod
    def build(cls, case: Case, xp: ModuleType, seed: int = 0) -> Workload:
        """Arrays of `xp` (numpy or cupy) for a case whose requests all have keys."""
        kv_lens = np.array(case.kv_lens)
        num_pages = -(-kv_lens // case.page_size)
        indptr = np.concatenate([[0], np.cumsum(num_pages)]).astype(np.int32)
        indices = np.random.default_rng(seed).permutation(indptr[-1]).astype(np.int32)
        last_page_len = (kv_lens - (num_pages - 1) * case.page_size).astype(np.int32)
        axes = (case.page_size, case.num_kv_heads) if case.layout == "NHD" else (case.num_kv_heads, case.page_size)
        storage = random_normal(xp, (2, len(indices), *axes, case.head_dim), DTYPES[case.dtype], seed)
        q_shape = (sum(case.queries), case.num_qo_heads, case.head_dim)
        return cls(
            case=case,
            storage=storage,
            kv=pa.PagedKV(storage[0], storage[1], layout=case.layout),
            table=pa.PageTable(*map(xp.asarray, (indptr, indices, last_page_len)), page_size=case.page_size),
            q=random_normal(xp, q_shape, DTYPES[case.dtype], seed + 1),
            qo_indptr=xp.asarray(np.concatenate([[0], np.cumsum(case.queries)]).astype(np.int32)),
            indptr=indptr,
        )

    def tokens(self, request: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of a request's first `count` tokens, [count, num_kv_heads, head_dim], on the host."""
        first = self.indptr[request]
        page_ids = self.table.indices[first : first - (-count // self.case.page_size)]
        pages = to_host(self.storage.view(np.uint16)[:, page_ids]).view(DTYPES[self.case.dtype])
        if self.case.layout == "HND":
            pages = pages.swapaxes(2, 3)
        k, v = pages.reshape(2, -1, self.case.num_kv_heads, self.case.head_dim)[:, :count]
        return k, v


def kv_bytes(case: Case) -> int:
    """Bytes of K and V that the tokens of a case occupy: what any decode has to read."""
    return sum(case.kv_lens) * case.num_kv_heads * case.head_dim * 2 * DTYPES[case.dtype].itemsize


def causal_flops(case: Case) -> int:
    """Floating-point operations of a causal prefill: 4 * head_dim * num_qo_heads for each query and key it sees."""
    pairs = sum(q * k - q * (q - 1) // 2 for q, k in zip(case.queries, case.kv_lens, strict=True))
    return 4 * case.head_dim * case.num_qo_heads * pairs


def sampled_queries(case: Case, seed: int = 0) -> Iterator[tuple[int, int]]:
    """(request, query) to check: first, last and another query of the first, last, shortest and longest request."""
    random = np.random.default_rng(seed)
    for request in sorted({0, case.batch_size - 1, int(np.argmin(case.kv_lens)), int(np.argmax(case.kv_lens))}):
        num_queries = case.queries[request]
        for query in sorted({0, num_queries - 1, int(random.integers(num_queries))}):
            yield request, query
