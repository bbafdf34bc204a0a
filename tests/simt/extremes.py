"""Numbers at their limits through both backends, the SIMT shim's card and NumPy: positions near 2^31, and floats that
overflow, underflow or are NaN under a caller's `np.errstate(all="raise")`. Prints which answers agree.
"""

import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import card

card.install()

import cupy  # noqa: E402

import paged_attn as pa  # noqa: E402
from tests import cases  # noqa: E402

LARGEST = 2**31 - 1
ROUNDS = 30


def agree(found: Any, right: Any) -> bool:
    found, right = (np.asarray(getattr(x, "host", x)).astype(np.float64) for x in (found, right))
    return bool(np.allclose(found, right, rtol=1e-2, atol=1e-2, equal_nan=True))


def both(compute: Any) -> Iterator[bool]:
    """Whether what `compute(to)` yields is the same on the card and on NumPy."""
    for found, right in zip(compute(cupy.asarray), compute(np.asarray), strict=True):
        yield agree(found, right)


def large_positions(rng: np.random.Generator) -> Iterator[bool]:
    """Attention, split and slots over tables whose strides, offsets and lengths are near 2^31."""
    for _ in range(ROUNDS):
        page_size = int(rng.choice([1, 4]))
        stride = int(rng.choice([1, 2, 2**20, LARGEST // (2 * page_size), LARGEST]))
        pages = 3 if 3 * stride * page_size < LARGEST else 1
        most_offset = LARGEST // page_size - 1 - (pages - 1) * stride
        offset = int(rng.choice([0, 1, max(most_offset - 1, 0), most_offset]))
        last = (offset + (pages - 1) * stride) * page_size  # where its last page begins
        total_len = min(last + int(rng.choice([0, 1, page_size, LARGEST])), LARGEST)
        window_left = int(rng.choice([-1, 0, 3, stride, LARGEST]))
        k, v = rng.standard_normal((2, pages, page_size, 1, 16)).astype(np.float16)
        q = rng.standard_normal((2, 2, 16)).astype(np.float16)

        def compute(
            to: Any,
            page_size: int = page_size, stride: int = stride, pages: int = pages, offset: int = offset,
            last: int = last, total_len: int = total_len, window_left: int = window_left,
            k: np.ndarray = k, v: np.ndarray = v, q: np.ndarray = q,
        ) -> Iterator[Any]:  # fmt: skip
            kv = pa.PagedKV(to(k), to(v), layout="NHD")
            arrays = ([0, pages], range(pages), [page_size])
            table = pa.PageTable(
                *(to(np.array(array, np.int32)) for array in arrays),
                page_size=page_size,
                page_stride=stride,
                page_offset=to(np.array([offset], np.int32)),
                total_len=to(np.array([total_len], np.int32)),
            )
            for causal in (True, False):
                indptr = to(np.array([0, 2], np.int32))
                options = {"causal": causal, "window_left": window_left, "return_lse": True}
                yield from pa.prefill(to(q), indptr, kv, table, **options)
            yield from pa.decode(to(q[None]), kv, table, window_left=window_left, return_lse=True)
            chunks = table.split(2)
            yield from (chunks.page_offset, chunks.total_len, chunks.last_page_len, chunks.seq_lens)
            table.validate(pages).raise_if_bad()
            at = [0, offset * page_size, last + page_size - 1, last, min(last + page_size, LARGEST - 1), LARGEST - 1]
            yield table.slots(to(np.zeros(len(at), np.int32)), to(np.array(at, np.int32)))

        yield from both(compute)


def hard_floats(to: Any) -> Iterator[Any]:
    """Scores that underflow exp and a weight that overflows float16 by its V, NaN in what nobody sees, empty states."""
    for case in (
        cases.Case("low", (40, 0, 3), num_qo_heads=4, head_dim=16, page_size=4),
        cases.Case("low_cap", (40, 0, 3), num_qo_heads=4, head_dim=16, page_size=4, logits_soft_cap=200.0),
        cases.Case("low_prefill", (40, 0, 3), q_lens=(9, 2, 5), num_qo_heads=4, head_dim=16, page_size=4),
    ):
        inputs = cases.build(case, scores="sigma50")
        q = inputs.q * np.float16(8)
        q, kv, table = to(q), inputs.kv(to), inputs.table(to)
        if case.is_decode:
            yield from pa.decode(q, kv, table, return_lse=True, logits_soft_cap=case.logits_soft_cap)
        else:
            yield from pa.prefill(q, to(inputs.qo_indptr), kv, table, return_lse=True)
    k = to(np.full((7, 2, 16), 3, np.float16))
    v = np.full((7, 2, 16), 60000, np.float16)
    v[2] = np.inf
    q = to(np.full((4, 4, 16), 200, np.float16))
    yield pa.single_decode(q[0], k, to(v), layout="NHD")
    yield pa.single_prefill(q, k, to(v), layout="NHD")

    random = np.random.default_rng(5)
    v, s = random.standard_normal((6, 3, 2, 16)).astype(np.float32) * 1e30, np.full((6, 3, 2), -200, np.float32)
    s[0], s[1], s[2, 0], s[3, 2], s[4, 0] = -np.inf, np.inf, np.inf, -np.inf, 300
    v[np.isinf(s)] = np.nan
    for base in ("e", 2):
        yield from pa.merge_states(to(v), to(s), base=base)
        yield from pa.merge_state(to(v[:, 0]), to(s[:, 0]), to(v[:, 1]), to(s[:, 1]), base=base)


def cache_calls(to: Any) -> Iterator[Any]:
    cache = pa.PagedKVCache(8, 4, 2, 16, layout="NHD", dtype="float16", device="cuda" if to is cupy.asarray else "cpu")
    sequence = cache.new_sequence()
    k = np.full((9, 2, 16), 6e-8, np.float16)  # subnormal
    k[3] = np.nan
    cache.append([sequence], [9], to(k), to(k))
    other = cache.fork(sequence)
    cache.append([other], [1], to(k[:1]), to(k[:1]))
    table = cache.page_table([sequence, other])
    yield table.seq_lens
    yield table.to_block_table(3)
    yield pa.decode(to(np.full((2, 4, 16), 2, np.float16)), cache.layers[0], table)


def strict_callers(rng: np.random.Generator) -> Iterator[bool]:
    with np.errstate(all="raise"):
        answers = [list(compute(to)) for compute in (hard_floats, cache_calls) for to in (cupy.asarray, np.asarray)]
    yield from (agree(found, right) for i in (0, 2) for found, right in zip(answers[i], answers[i + 1], strict=True))


if __name__ == "__main__":
    warnings.simplefilter("error")
    random = np.random.default_rng(0)
    print(json.dumps({work.__name__: list(work(random)) for work in (large_positions, strict_callers)}))
