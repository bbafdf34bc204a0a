"""Calls whose arrays change their form from one to the next, on the SIMT shim's card, and the reference's answers.

A launch keeps what a form decides (strides, rows, dtypes) and gets new addresses only. Prints how many calls were made
and which went wrong.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import card

card.install()

import cupy  # noqa: E402

import paged_attn as pa  # noqa: E402
from tests import cases  # noqa: E402

ROUNDS = 40


def strided(array: np.ndarray, padding: int) -> Any:
    """The array on the card, `padding` elements behind each of its rows (heads, where it is 32 or more)."""
    axis = -1 if padding >= 32 else -2
    shape = list(array.shape)
    shape[axis] += 16 if axis == -1 else 1
    wide = cupy.asarray(np.zeros(shape, array.dtype))
    view = wide[..., : array.shape[-1]] if axis == -1 else wide[..., : array.shape[-2], :]
    view.host[...] = array
    return view


def given(array: np.ndarray, rng: np.random.Generator) -> Any:
    return cupy.asarray(array) if rng.random() < 0.5 else strided(array, int(rng.choice([1, 32])))


def attentions(rng: np.random.Generator) -> Iterator[bool]:
    """Two batches in turn through one plan each of decode and prefill: whether a run was right."""
    made = [
        cases.build(
            cases.Case(f"forms{i}", kv_lens, num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, q_lens=q)
        )
        for i, (kv_lens, q) in enumerate([((9, 3), None), ((5, 1, 14), None), ((9, 3), (2, 3)), ((6,), (4,))])
    ]
    decode = pa.BatchDecodeWithPagedKVCache(max_batch_size=3, max_pages=16)
    prefill = pa.BatchPrefillWithPagedKVCache()
    planned: dict[bool, Any] = {}
    for _ in range(ROUNDS):
        is_decode = rng.random() < 0.5
        if is_decode not in planned or rng.random() < 0.3:
            inputs = planned[is_decode] = made[int(rng.integers(2)) + (0 if is_decode else 2)]
            table = inputs.table(cupy.asarray)
            if is_decode:
                decode.plan(inputs.kv(cupy.asarray), table, 4)
            else:
                prefill.plan(inputs.kv(cupy.asarray), table, cupy.asarray(inputs.qo_indptr), 4)
        inputs = planned[is_decode]
        dtype, with_lse = rng.choice(["float16", "float32"]), rng.random() < 0.5
        q = given(inputs.q, rng)
        out = cupy.empty(inputs.q.shape, dtype)
        lse = cupy.empty(inputs.q.shape[:-1], np.float32) if with_lse else None
        kv = pa.PagedKV(*(given(pages, rng) for pages in (inputs.k_pages, inputs.v_pages)), layout="NHD")
        (decode if is_decode else prefill).run(q, kv, out=out, lse=lse)
        if is_decode:
            right = pa.decode(inputs.q, inputs.kv(), inputs.table(), return_lse=True)
        else:
            right = pa.prefill(inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(), return_lse=True)
        good = np.allclose(out.host.astype(np.float32), right[0].astype(np.float32), rtol=0.01, atol=0.01)
        yield good and (lse is None or np.allclose(lse.host, right[1], atol=1e-3))


def growing_steps(rng: np.random.Generator) -> Iterator[bool]:
    """The same arrays by plans whose buffers have to grow from step to step, and new launches with them."""
    inputs = cases.build(cases.Case("forms_grow", (9, 3), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4))
    right = pa.decode(inputs.q, inputs.kv(), inputs.table())
    q, kv, out = cupy.asarray(inputs.q), inputs.kv(cupy.asarray), cupy.empty(inputs.q.shape, np.float16)
    ragged, indptr = cupy.empty(inputs.q.shape, np.float16), np.arange(3, dtype=np.int32)
    decode, prefill = pa.BatchDecodeWithPagedKVCache(), pa.BatchPrefillWithPagedKVCache()
    for entries in (4, 5, 9, 40, 9):
        indices = np.zeros(entries, np.int32)
        indices[: inputs.indptr[-1]] = inputs.indices[: inputs.indptr[-1]]
        arrays = (cupy.asarray(array) for array in (inputs.indptr, indices, inputs.last_page_len))
        table = pa.PageTable(*arrays, page_size=4)
        decode.plan(kv, table, 4)
        prefill.plan(kv, table, cupy.asarray(indptr), 4)
        for plan, result in ((decode, out), (prefill, ragged)):
            result.host[...] = np.nan
            plan.run(q, kv, out=result)
            yield np.allclose(result.host.astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01)


def appends(rng: np.random.Generator) -> Iterator[bool]:
    """Numbers of tokens, strides and pools in turn: whether an append was right."""
    for _ in range(ROUNDS):
        heads, tokens = int(rng.choice([1, 2])), int(rng.integers(1, 7))
        zeros = np.zeros((4, 4, heads, 16), np.float16)
        pools = [
            pa.PagedKV(cupy.asarray(zeros), given(zeros, rng), layout="NHD"),
            pa.PagedKV(zeros, zeros.copy(), layout="NHD"),
        ]
        slots = rng.permutation(16)[:tokens]
        k, v = rng.standard_normal((2, tokens, heads, 16)).astype(np.float16)
        pa.append(pools[0], slots if rng.random() < 0.3 else cupy.asarray(slots), given(k, rng), given(v, rng))
        pa.append(pools[1], slots, k, v)
        yield all(
            np.array_equal(getattr(pools[0], name).host, getattr(pools[1], name)) for name in ("k_pages", "v_pages")
        )


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    print(json.dumps({work.__name__: list(work(rng)) for work in (attentions, growing_steps, appends)}))
