"""A case of tests/cases.py as arrays of NumPy or CuPy: pools in shuffled page order, queries, page table."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import DTYPES, Case, some_sinks

TILE = 4_194_301  # a prime, so that no two pages hold the same numbers at the same offsets


def random_normal(xp: ModuleType, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> Any:
    """Standard normal numbers of a 16-bit dtype: a random tile from NumPy, repeated (cuRAND need not be installed)."""
    bits = xp.asarray(_random_tile(dtype, seed))
    flat = xp.empty(int(np.prod(shape)), np.uint16)
    whole = flat.size // TILE * TILE
    flat[:whole].reshape(whole // TILE, TILE)[...] = bits
    flat[whole:] = bits[: flat.size - whole]
    return flat.view(dtype).reshape(shape)


@functools.cache
def _random_tile(dtype: np.dtype, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(TILE, dtype=np.float32).astype(dtype).view(np.uint16)


def to_host(array: Any) -> np.ndarray:
    """A NumPy array of the same values."""
    return array if isinstance(array, np.ndarray) else array.get()


@dataclass(frozen=True)
class Workload:
    """One case, ready to run.

    storage     separate pools: [2, num_pages, ...page...], K pages, then V pages; combined: [num_pages, 2, ...page...]
                (one block of memory for the read floor)
    q           [queries, num_qo_heads, head_dim]     all requests' queries, one after the other
    qo_indptr   [batch + 1] int32                     where each request's queries begin
    sinks       [num_qo_heads] float32                None where the case has none
    indptr, indices, last_page_len                    int32 on the host: what `table` holds
    """

    case: Case
    storage: Any
    kv: pa.PagedKV
    table: pa.PageTable
    q: Any
    qo_indptr: Any
    sinks: Any
    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray

    @classmethod
    def build(cls, case: Case, xp: ModuleType, *, combined: bool = False, seed: int = 0) -> Workload:
        """Arrays of `xp` (numpy or cupy) for a case; combined: K and V of a page side by side."""
        kv_lens = np.array(case.kv_lens)
        num_pages = -(-kv_lens // case.page_size)
        indptr = np.concatenate([[0], np.cumsum(num_pages)]).astype(np.int32)
        indices = np.random.default_rng(seed).permutation(indptr[-1]).astype(np.int32)
        last_page_len = (kv_lens - np.maximum(num_pages - 1, 0) * case.page_size).astype(np.int32)
        axes = (case.page_size, case.num_kv_heads) if case.layout == "NHD" else (case.num_kv_heads, case.page_size)
        pools = (len(indices), 2) if combined else (2, len(indices))
        storage = random_normal(xp, (*pools, *axes, case.head_dim), DTYPES[case.dtype], seed)
        q_shape = (sum(case.queries), case.num_qo_heads, case.head_dim)
        return cls(
            case=case,
            storage=storage,
            kv=(
                pa.PagedKV.combined(storage, layout=case.layout)
                if combined
                else pa.PagedKV(storage[0], storage[1], layout=case.layout)
            ),
            table=pa.PageTable(*map(xp.asarray, (indptr, indices, last_page_len)), page_size=case.page_size),
            q=random_normal(xp, q_shape, DTYPES[case.dtype], seed + 1),
            qo_indptr=xp.asarray(np.concatenate([[0], np.cumsum(case.queries)]).astype(np.int32)),
            sinks=xp.asarray(some_sinks(case.num_qo_heads)) if case.sinks else None,
            indptr=indptr,
            indices=indices,
            last_page_len=last_page_len,
        )

    @property
    def without_sinks(self) -> Workload:
        """The same arrays, as a case without sinks has them."""
        return replace(self, case=replace(self.case, sinks=False), sinks=None)

    def of(self, library: Any) -> tuple[Any, Any]:
        """`kv` and `table` as the classes of `library` hold them: this package, or that of another checkout."""
        return (
            library.PagedKV(self.kv.k_pages, self.kv.v_pages, layout=self.case.layout),
            library.PageTable(
                self.table.indptr, self.table.indices, self.table.last_page_len, page_size=self.case.page_size
            ),
        )

    def on_host(self) -> dict[str, Any]:
        """What PageTable takes, in NumPy arrays."""
        names = ("indptr", "indices", "last_page_len")
        return {name: getattr(self, name) for name in names} | {"page_size": self.case.page_size}

    def pieces(self) -> tuple[Any, int]:
        """Pages of K and V in the order of the table, as numbers of equal pieces of `storage`; and a piece's bytes."""
        page_bytes = self.storage[0, 0].nbytes
        combined = self.kv.k_pages.strides[0] == 2 * page_bytes
        step, v_first = (2, 1) if combined else (1, len(self.indices))
        order = (self.indices[:, None] * step + np.array([0, v_first], np.int32)).ravel().astype(np.int32)
        if isinstance(self.qo_indptr, np.ndarray):
            return order, page_bytes
        import cupy

        return cupy.asarray(order), page_bytes

    def tokens(self, request: int, count: int, heads: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """K and V of a request's first `count` tokens, [count, KV heads, head_dim], on the host."""
        first = self.indptr[request]
        page_ids = self.table.indices[first : first - (-count // self.case.page_size)]

        def dense(pages: Any) -> np.ndarray:
            by_token = pages if self.case.layout == "NHD" else pages.swapaxes(1, 2)
            chosen = by_token.view(np.uint16)[:, :, heads][page_ids]
            return to_host(chosen.reshape(-1, *chosen.shape[2:])[:count]).view(DTYPES[self.case.dtype])

        return dense(self.kv.k_pages), dense(self.kv.v_pages)

    def contiguous(self) -> tuple[Any, Any]:
        """K and V of all requests, one after the other without pages: [sum(kv_lens), num_kv_heads, head_dim]."""
        kv_lens = np.array(self.case.kv_lens)
        request = np.repeat(np.arange(self.case.batch_size), kv_lens)
        token = np.arange(len(request)) - np.repeat(np.cumsum(kv_lens) - kv_lens, kv_lens)
        page, slot = self.indices[self.indptr[request] + token // self.case.page_size], token % self.case.page_size
        if not isinstance(self.qo_indptr, np.ndarray):
            import cupy

            page, slot = cupy.asarray(page), cupy.asarray(slot)

        def gathered(pages: Any) -> Any:
            by_token = pages if self.case.layout == "NHD" else pages.swapaxes(1, 2)
            return by_token.view(np.uint16)[page, slot].view(DTYPES[self.case.dtype])

        return gathered(self.kv.k_pages), gathered(self.kv.v_pages)


def seen_tokens(case: Case) -> int:
    """Tokens that at least one query of a causal case sees, of all requests together."""
    if case.window_left < 0:
        return sum(case.kv_lens)
    return sum(min(k, case.window_left + q) for q, k in zip(case.queries, case.kv_lens, strict=True))


def kv_bytes(case: Case) -> int:
    """Bytes of K and V that a causal case has to read."""
    return seen_tokens(case) * case.num_kv_heads * case.head_dim * 2 * DTYPES[case.dtype].itemsize


def causal_flops(case: Case) -> int:
    """Floating-point operations of a causal case: 4 * head_dim * num_qo_heads for each query and key it sees."""
    pairs = 0
    for q, k in zip(case.queries, case.kv_lens, strict=True):
        seen = np.arange(k - q + 1, k + 1).clip(min=0)
        pairs += int((seen if case.window_left < 0 else seen.clip(max=case.window_left + 1)).sum())
    return 4 * case.head_dim * case.num_qo_heads * pairs


def sampled_queries(case: Case, seed: int = 0) -> Iterator[tuple[int, int]]:
    """(request, query) to check: first, last and another query of the first, last, shortest and longest request."""
    random = np.random.default_rng(seed)
    for request in sorted({0, case.batch_size - 1, int(np.argmin(case.kv_lens)), int(np.argmax(case.kv_lens))}):
        num_queries = case.queries[request]
        for query in sorted({0, num_queries - 1, int(random.integers(num_queries))}):
            yield request, query
