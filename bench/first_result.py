"""A child of cold.py: `python -m bench.first_result NAME` makes one first call and prints how long it took.

Whatever is imported here at the top would not be counted.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np


def decode(cupy: Any) -> Any:
    """16 requests of 256 tokens."""
    import paged_attn as pa

    kv, table = _pool(cupy, pa)
    return pa.decode(_zeros(cupy, 16, 32, 128), kv, table)


def prefill(cupy: Any) -> Any:
    """16 requests of 256 tokens, the last 16 of each are queries."""
    import paged_attn as pa

    kv, table = _pool(cupy, pa)
    return pa.prefill(_zeros(cupy, 16 * 16, 32, 128), np.arange(17, dtype=np.int32) * 16, kv, table)


def cache(cupy: Any) -> Any:
    """append, page table and decode through a PagedKVCache."""
    import paged_attn as pa

    pool = pa.PagedKVCache(256, 16, num_kv_heads=8, head_dim=128, layout="NHD", dtype="float16")
    sequences = [pool.new_sequence() for _ in range(4)]
    k = _zeros(cupy, 4 * 100, 8, 128)
    pool.append(sequences, 100, k, k)
    return pa.decode(_zeros(cupy, 4, 32, 128), pool.layers[0], pool.page_table(sequences))


CALLS = {"decode": decode, "prefill": prefill, "cache": cache}


def _zeros(cupy: Any, *shape: int) -> Any:
    return cupy.asarray(np.zeros(shape, np.float16))  # no kernel of CuPy's, whose compilation would be counted


def _pool(cupy: Any, pa: Any) -> tuple[Any, Any]:
    pages = _zeros(cupy, 256, 16, 8, 128)
    arrays = (np.arange(17) * 16, np.arange(256), np.full(16, 16))
    return pa.PagedKV(pages, pages, layout="NHD"), pa.PageTable(*(x.astype(np.int32) for x in arrays), page_size=16)


def main(name: str) -> None:
    """Print one line of JSON."""
    began = time.perf_counter()
    import cupy

    cupy.cuda.runtime.free(0)  # makes the context
    ready = time.perf_counter()
    CALLS[name](cupy).get()
    ended = time.perf_counter()
    print(json.dumps({"import_cupy_and_context": ready - began, "first_result": ended - ready}))


if __name__ == "__main__":
    main(sys.argv[1])
