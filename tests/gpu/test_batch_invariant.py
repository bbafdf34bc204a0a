"""batch_invariant=True: a request's result is bitwise the same alone, in any batch, and wherever its pages lie."""

from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases

cupy = pytest.importorskip("cupy")

HEADS, KV_HEADS, PAGE = 8, 2, 16
KV_LENS = (700, 1, 33, 4000, 0, 260)


def attend(
    kv_lens: tuple[int, ...], requests: list[int], layout: str, seed: int, prefill: bool, head_dim: int
) -> list[np.ndarray]:
    """Bits of out and lse of these requests, attended in one batch; `seed` shuffles where their pages lie."""
    pages = [-(-kv_lens[request] // PAGE) for request in requests]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    num_pages = int(indptr[-1]) + 5
    ids = np.random.default_rng(seed).permutation(num_pages)[: indptr[-1]].astype(np.int32)
    last = [kv_lens[request] - max(n - 1, 0) * PAGE for request, n in zip(requests, pages, strict=True)]
    pools = np.full((2, num_pages, PAGE, KV_HEADS, head_dim), np.nan, np.float16)
    queries = []
    for row, request in enumerate(requests):
        random = np.random.default_rng(request)
        tokens = random.standard_normal((2, pages[row] * PAGE, KV_HEADS, head_dim), np.float32).astype(np.float16)
        pools[:, ids[indptr[row] : indptr[row + 1]]] = tokens.reshape(2, pages[row], PAGE, KV_HEADS, head_dim)
        queries.append(random.standard_normal((3 if prefill else 1, HEADS, head_dim), np.float32).astype(np.float16))
    if layout == "HND":
        pools = np.ascontiguousarray(pools.swapaxes(2, 3))
    kv = pa.PagedKV(cupy.asarray(pools[0]), cupy.asarray(pools[1]), layout=layout)
    table = pa.PageTable(*map(cupy.asarray, (indptr, ids, np.array(last, np.int32))), page_size=PAGE)
    q = cupy.asarray(np.concatenate(queries))
    plan: Any
    if prefill:
        plan = pa.BatchPrefillWithPagedKVCache(batch_invariant=True)
        plan.plan(kv, table, cupy.asarray(np.arange(len(requests) + 1, dtype=np.int32) * 3), HEADS)
    else:
        plan = pa.BatchDecodeWithPagedKVCache(batch_invariant=True)
        plan.plan(kv, table, HEADS)
    out, lse = plan.run(q, kv, return_lse=True)
    plan.status()
    rows = out.get().view(np.uint16).reshape(len(requests), -1)
    return [np.concatenate([a, b]) for a, b in zip(rows, lse.get().view(np.uint16).reshape(len(rows), -1), strict=True)]


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(("prefill", "head_dim"), ((False, 64), (True, 64), (True, 128)))
def test_bits_do_not_depend_on_the_batch_or_on_the_pages(layout: str, prefill: bool, head_dim: int) -> None:
    together = attend(KV_LENS, list(range(len(KV_LENS))), layout, 0, prefill, head_dim)
    crowd = attend(KV_LENS * 12, [*range(len(KV_LENS) * 12)][::-1], layout, 1, prefill, head_dim)[::-1]
    for request, expected in enumerate(together):
        (alone,) = attend(KV_LENS, [request], layout, 2, prefill, head_dim)
        assert (alone == expected).all(), f"request {request} alone"
        assert (crowd[request] == expected).all(), f"request {request} among {len(crowd)}"
