"""Sinks, V with a dim of its own and caches of several ranks, by public functions on a card. Prints what was wrong.

python -m tests.features shim 80                      on the SIMT shim's card of this compute capability
python -m tests.features shim 90 sinks_of_gpt_oss     of this feature alone
python -m tests.features gpu                          on a GPU
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

if sys.argv[1] == "shim":
    from tests.simt import card

    card.install(sys.argv[2])

import cupy

import paged_attn as pa
from tests.cases import DTYPES, LSE_TOLERANCE, OUT_TOLERANCE, assert_close

Result = tuple[Any, Any]
GPT_OSS = {"heads": (64, 8), "dims": (64, 64), "dtype": "bfloat16"}


class Model:
    """Requests of one model: their queries, their pool and table in NumPy, and whatever a call of theirs gives."""

    def __init__(
        self,
        kv_lens: tuple[int, ...],
        q_lens: tuple[int, ...] | None = None,
        *,
        q_len: int = 1,
        heads: tuple[int, int] = (8, 2),
        dims: tuple[int, int] = (64, 64),
        dtype: str = "float16",
        sinks: bool = False,
        page_size: int = 16,
    ) -> None:
        rng = np.random.default_rng(len(kv_lens) + sum(dims))
        self.dtype, self.heads, self.q_len = dtype, heads, q_len
        pages = [-(-kv_len // page_size) for kv_len in kv_lens]
        self.num_pages = sum(pages) + 3

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])

        self.pools = [normal(self.num_pages, page_size, heads[1], dim) for dim in dims]
        last = [kv_len - max(n - 1, 0) * page_size for kv_len, n in zip(kv_lens, pages, strict=True)]
        ids = rng.permutation(self.num_pages)[: sum(pages)]
        self.metadata = [np.array(array, np.int32) for array in (np.append(0, np.cumsum(pages)), ids, last)]
        self.page_size = page_size
        queries = (q_len,) * len(kv_lens) if q_lens is None else q_lens
        self.qo_indptr = None if q_lens is None else np.append(0, np.cumsum(queries)).astype(np.int32)
        self.q = normal(sum(queries), heads[0], dims[0])
        if q_lens is None and q_len > 1:
            self.q = self.q.reshape(len(kv_lens), q_len, *self.q.shape[1:])
        self.sinks = rng.normal(0, 2, heads[0]).astype(np.float32) if sinks else None
        if self.sinks is not None:
            self.sinks[:2] = -np.inf, 4

    def kv(self, to: Callable[[np.ndarray], Any]) -> pa.PagedKV:
        return pa.PagedKV(*map(to, self.pools), layout="NHD")

    def table(self, to: Callable[[np.ndarray], Any]) -> pa.PageTable:
        return pa.PageTable(*map(to, self.metadata), page_size=self.page_size)

    def call(self, to: Callable[[np.ndarray], Any], **options: Any) -> Result:
        """One call, on the GPU or on the CPU."""
        options = {"return_lse": True, "sinks": None if self.sinks is None else to(self.sinks), **options}
        if self.qo_indptr is None:
            return pa.decode(to(self.q), self.kv(to), self.table(to), **options)
        return pa.prefill(to(self.q), to(self.qo_indptr), self.kv(to), self.table(to), **options)

    def right(self, **options: Any) -> Result:
        """The reference's answer, in float32."""
        out = np.empty((*self.q.shape[:-1], self.pools[1].shape[-1]), np.float32)
        return self.call(np.asarray, out=out, **options)

    def check(self, result: Result, **options: Any) -> None:
        right, lse = self.right(**options)
        out, found = (np.asarray(array.get()) for array in result)
        tolerances = {"tolerance": OUT_TOLERANCE[self.dtype], "lse_tolerance": LSE_TOLERANCE}
        assert_close(out.astype(np.float32).reshape(right.shape), right, found.reshape(lse.shape), lse, **tolerances)

    def check_all(self, **options: Any) -> None:
        """One-shot calls, and plans of all kinds with and without sinks in turns."""
        self.check(self.call(cupy.asarray, **options), **options)
        kv, table, q = self.kv(cupy.asarray), self.table(cupy.asarray), cupy.asarray(self.q)
        sinks = None if self.sinks is None else cupy.asarray(self.sinks)
        given = self.sinks
        for kind in ({}, {"batch_invariant": True}, {"max_batch_size": 9, "max_pages": 400}):
            plan: Any
            if self.qo_indptr is None:
                plan = pa.BatchDecodeWithPagedKVCache(**kind)
                plan.plan(kv, table, self.heads[0], q_len=self.q_len, **options)
            else:
                plan = pa.BatchPrefillWithPagedKVCache(**kind)
                plan.plan(kv, table, cupy.asarray(self.qo_indptr), self.heads[0], **options)
            self.check(plan.run(q, kv, sinks=sinks, return_lse=True), **options)
            self.sinks = None
            self.check(plan.run(q, kv, return_lse=True), **options)
            self.sinks = given
            self.check(plan.run(q, kv, sinks=sinks, return_lse=True), **options)
            plan.status()


def sinks_of_gpt_oss() -> None:
    for window_left in (-1, 127):
        Model((300, 0, 17), sinks=True, **GPT_OSS).check_all(window_left=window_left)
        Model((140, 0, 17), (33, 2, 17), sinks=True, **GPT_OSS).check_all(window_left=window_left)


def sinks_of_several_queries() -> None:
    Model((70, 0, 3), q_len=4, sinks=True).check_all()
    Model((70, 9), q_len=4, sinks=True, heads=(16, 1), dims=(128, 128)).check_all(window_left=20, logits_soft_cap=3.0)


def sinks_of_a_split_request() -> None:
    """Decode divides it among CTAs."""
    Model((3000,), sinks=True).check_all()


def sinks_of_chunks() -> None:
    """A sink is counted once: where the chunks are merged."""
    model, chunks = Model((90, 0, 33), sinks=True), 3
    q, kv, table = cupy.asarray(model.q), model.kv(cupy.asarray), model.table(cupy.asarray).split(chunks)
    wide = cupy.empty((chunks, *q.shape), q.dtype)
    for chunk in range(chunks):
        wide[chunk] = q
    out, lse = pa.decode(wide.reshape(-1, *q.shape[1:]), kv, table, return_lse=True)
    v, s = out.reshape(wide.shape).swapaxes(0, 1), lse.reshape(wide.shape[:-1]).swapaxes(0, 1)
    model.check(pa.merge_states(v, s, sinks=cupy.asarray(model.sinks)))


def values_with_a_dim_of_their_own() -> None:
    for dims in ((192, 128), (64, 128)):
        Model((70, 0, 33), dims=dims).check_all()
        Model((70, 0, 33), (20, 3, 33), dims=dims, dtype="bfloat16", sinks=True).check_all(window_left=40)
        Model((40, 9), q_len=3, dims=dims, heads=(16, 1), sinks=True).check_all()


def a_cache_of_values_with_a_dim_of_their_own() -> None:
    rng = np.random.default_rng(0)
    for layout in ("NHD", "HND"):
        cache = pa.PagedKVCache(8, 4, 2, 192, layout=layout, dtype="float16", v_head_dim=128, device="cuda")
        first, k, v = cache.new_sequence(), *(
            rng.standard_normal((10, 2, dim), np.float32).astype(np.float16) for dim in (192, 128)
        )  # fmt: skip
        cache.append([first], [9], cupy.asarray(k[:9]), cupy.asarray(v[:9]))
        second = cache.fork(first)
        cache.append([second], [1], cupy.asarray(k[9:]), cupy.asarray(v[9:]))  # copies the last page
        q = rng.standard_normal((1, 4, 192), np.float32).astype(np.float16)
        for seq, length in ((first, 9), (second, 10)):
            found = pa.decode(cupy.asarray(q), cache.layers[0], cache.page_table([seq]))
            single = pa.single_decode(cupy.asarray(q[0]), *map(cupy.asarray, (k[:length], v[:length])), layout="NHD")
            right = pa.single_decode(q[0], k[:length], v[:length], layout="NHD")
            for out in (found.get()[0], single.get()):
                assert_close(out.astype(np.float32), right.astype(np.float32), tolerance=OUT_TOLERANCE["float16"])


def a_cache_of_several_ranks() -> None:
    """Attention of every rank over its pages, merged, is that over all pages on the CPU; `out` is written anew."""
    rng, num_ranks, heads, dim, options = np.random.default_rng(1), 3, 4, 64, {"window_left": 14, "return_lse": True}

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    def make(device: str, **ranks: int) -> pa.PagedKVCache:
        return pa.PagedKVCache(16, 4, 2, dim, layout="HND", dtype="float16", device=device, **ranks)

    whole, ranks = make("cpu"), [make("cuda", rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    sizes: dict[str, Any] = {"page_size": 4, "positions": True, "page_stride": num_ranks}
    outs = [pa.PageTable.empty(4, 16, device="cuda", **sizes) for _ in ranks]

    def check(seqs: list[int], counts: list[int]) -> None:
        k, v, q = normal(sum(counts), 2, dim), normal(sum(counts), 2, dim), normal(len(seqs), 2, heads, dim)
        whole.append(seqs, counts, k, v)
        right = np.empty(q.shape, np.float32)
        _, lse = pa.decode(q, whole.layers[0], whole.page_table(seqs), out=right, **options)
        states = cupy.empty((num_ranks, *q.shape), np.float32), cupy.empty((num_ranks, *lse.shape), np.float32)
        for rank, cache in enumerate(ranks):
            cache.append(seqs, counts, cupy.asarray(k), cupy.asarray(v))
            table = cache.page_table(seqs, outs[rank])
            table.validate(16).raise_if_bad()
            out, partial_lse = (array[rank] for array in states)
            pa.decode(cupy.asarray(q), cache.layers[0], table, out=out, lse=partial_lse, **options)
        rows = (array.reshape(num_ranks, -1, *array.shape[3:]).swapaxes(0, 1) for array in states)
        found, found_lse = (array.get() for array in pa.merge_states(*rows))
        tolerances = {"tolerance": OUT_TOLERANCE["float16"], "lse_tolerance": LSE_TOLERANCE}
        assert_close(found.reshape(right.shape), right, found_lse.reshape(lse.shape), lse, **tolerances)

    (first,), (second,) = ({cache.new_sequence() for cache in (whole, *ranks)} for _ in range(2))
    check([first, second], [22, 9])
    (fork,) = {cache.fork(first) for cache in (whole, *ranks)}
    check([fork], [2])  # into a copy of the last page
    check([second, first], [4, 1])


FEATURES = (
    sinks_of_gpt_oss,
    sinks_of_several_queries,
    sinks_of_a_split_request,
    sinks_of_chunks,
    values_with_a_dim_of_their_own,
    a_cache_of_values_with_a_dim_of_their_own,
    a_cache_of_several_ranks,
)


def wrong() -> Iterator[tuple[str, str]]:
    chosen = sys.argv[3:] or [feature.__name__ for feature in FEATURES]
    for feature in (feature for feature in FEATURES if feature.__name__ in chosen):
        try:
            feature()
        except Exception as error:
            yield feature.__name__, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps(dict(wrong())))
