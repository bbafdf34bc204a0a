"""Pools of every make: past 2^31 elements, views of larger ones, K unlike V, one contiguous request, many layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.gpu.answers import assert_right

cupy = pytest.importorskip("cupy")

DTYPES = ("float16", "bfloat16")


# -- past 2^31 elements ------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
PAGE_ELEMENTS = 2 * PAGE * KV_HEADS * DIM  # K and V of a page
EDGE = 2**31 // PAGE_ELEMENTS  # the page that begins 2^31 elements, or 2^32 bytes, behind the first
MANY_PAGES = 2 * EDGE + 9  # K and V alike hold more than 2^31 elements, and together they span more than 2^32


@pytest.fixture(scope="module")
def large_storage() -> Iterator[Any]:
    """8.6 GB, most of which nobody ever touches."""
    memory = cupy.cuda.Memory(MANY_PAGES * PAGE_ELEMENTS * 2)  # not of CuPy's pool, so that it is given back
    yield cupy.ndarray((MANY_PAGES * PAGE_ELEMENTS,), np.float16, memptr=cupy.cuda.MemoryPointer(memory, 0))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_pool_past_2_to_the_31_elements(layout: str, large_storage: Any) -> None:
    """All at the very end and on both sides of the edges, with NaN wherever 32 bits would lead."""
    inputs = cases.build(
        cases.Case(
            f"large_pool_{layout}", (90, 0, 17), q_lens=(20, 1, 17), num_qo_heads=HEADS, num_kv_heads=KV_HEADS,
            head_dim=DIM, page_size=PAGE, layout=layout,
        )
    )  # fmt: skip
    ids = np.array([EDGE, MANY_PAGES - 1, 2 * EDGE, EDGE - 1, MANY_PAGES - 3, 2 * EDGE - 1, MANY_PAGES - 2, EDGE + 1])
    assert ids.size == inputs.indptr[-1]
    page = (2, PAGE, KV_HEADS, DIM) if layout == "NHD" else (2, KV_HEADS, PAGE, DIM)
    pages = large_storage.reshape(MANY_PAGES, *page)
    assert pages[1:].size > 2**32
    traps = np.setdiff1d(np.concatenate([ids % EDGE, ids % (2 * EDGE)]), ids).tolist()
    for number in (*traps, *ids.tolist()):
        pages[number].set(np.full(page, np.nan, np.float16))

    kv = pa.PagedKV.combined(pages, layout=layout)
    table = pa.PageTable(
        cupy.asarray(inputs.indptr), cupy.asarray(ids.astype(np.int32)), cupy.asarray(inputs.last_page_len),
        page_size=PAGE,
    )  # fmt: skip
    request = np.repeat(np.arange(3, dtype=np.int32), inputs.case.kv_lens)
    position = np.concatenate([np.arange(kv_len, dtype=np.int32) for kv_len in inputs.case.kv_lens])
    slots = table.slots(cupy.asarray(request), cupy.asarray(position))
    right_slots = ids[inputs.indptr[request] + position // PAGE] * PAGE + position % PAGE
    np.testing.assert_array_equal(slots.get(), right_slots)
    pa.append(kv, slots, *(cupy.asarray(np.concatenate(tokens)) for tokens in (inputs.k, inputs.v)))

    for number in traps:
        assert np.isnan(pages[number].get()).all(), f"append wrote into page {number}"
    for request_number, (k, v) in enumerate(zip(inputs.k, inputs.v, strict=True)):
        for token in range(0, len(k), PAGE):
            held = pages[int(ids[inputs.indptr[request_number] + token // PAGE])].get()
            held = held if layout == "NHD" else held.swapaxes(1, 2)
            piece = slice(token, min(token + PAGE, len(k)))
            for found, tokens in zip(held, (k, v), strict=True):
                np.testing.assert_array_equal(found[: piece.stop - token], tokens[piece])

    out, lse = pa.prefill(cupy.asarray(inputs.q), inputs.qo_indptr, kv, table, return_lse=True)
    assert_right(inputs, out, lse)
    one_each = replace(inputs.case, q_lens=(1, 1, 1))
    last_rows = inputs.qo_indptr[1:] - 1
    decode_inputs = replace(inputs, case=one_each, q=inputs.q[last_rows], qo_indptr=np.arange(4, dtype=np.int32))
    out, lse = pa.decode(cupy.asarray(decode_inputs.q), kv, table, return_lse=True)
    assert_right(decode_inputs, out, lse)
    pa.status()


def test_a_pool_that_32_bits_of_16_bytes_cannot_span_is_refused() -> None:
    """The kernels count in units of 16 bytes; nothing is read here."""
    page = cupy.zeros((1, PAGE, KV_HEADS, DIM), np.float16)
    stride = 2**33
    spread = cupy.lib.stride_tricks.as_strided(page, (9, *page.shape[1:]), (stride, *page.strides[1:]))
    with pytest.raises(NotImplementedError, match=r"k_pages spans \d+ bytes .*64 GiB"):
        pa.PagedKV(spread, spread, layout="NHD")
    assert pa.PagedKV(spread[:8], spread[:8], layout="NHD").k_strides[0] == stride


# -- views of larger arrays --------------------------------------------------------------------------------------------


def among_layers(k_pages: np.ndarray, v_pages: np.ndarray) -> tuple[np.ndarray, Callable[[Any], tuple[Any, Any]]]:
    """Layer 1 of a pool [pages, 3 layers, 2, <page>]."""
    pool = np.full((len(k_pages), 3, 2, *k_pages.shape[1:]), np.nan, k_pages.dtype)
    pool[:, 1, 0], pool[:, 1, 1] = k_pages, v_pages
    return pool, lambda pool: (pool[:, 1, 0], pool[:, 1, 1])


def separate(k_pages: np.ndarray, v_pages: np.ndarray) -> tuple[np.ndarray, Callable[[Any], tuple[Any, Any]]]:
    """All pages of K in front of all pages of V."""
    return np.stack([k_pages, v_pages]), lambda pool: (pool[0], pool[1])


def every_second_page(k_pages: np.ndarray, v_pages: np.ndarray) -> tuple[np.ndarray, Callable[[Any], tuple[Any, Any]]]:
    """Pages of K and V one after the other: each is a view with steps."""
    pool = np.stack([v_pages, k_pages], axis=1).reshape(-1, *k_pages.shape[1:])
    return pool, lambda pool: (pool[1::2], pool[::2])


def unlike(k_pages: np.ndarray, v_pages: np.ndarray) -> tuple[np.ndarray, Callable[[Any], tuple[Any, Any]]]:
    """K and V with strides of their own: room behind the tokens and heads of V, and around those of K, and in rows."""
    pages, first, second, dim = k_pages.shape
    pool = np.full((pages, 2, first + 3, second + 2, dim + 16), np.nan, k_pages.dtype)

    def views(pool: Any) -> tuple[Any, Any]:
        k = pool[:, 0, 1 : first + 1, 1 : second + 1, 16:]
        half = pool.reshape(pages, 2, -1)[:, 1, : first * (second + 1) * dim]  # V stands closer together
        return k, half.reshape(pages, first, second + 1, dim)[:, :, :second]

    k, v = views(pool)
    k[...], v[...] = k_pages, v_pages
    return pool, views


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("embed", [among_layers, separate, every_second_page, unlike])
def test_views_of_larger_pools(embed: Callable, layout: str, dtype: str) -> None:
    case = cases.Case(f"view_{embed.__name__}", (130, 0, 1, 33), layout=layout, dtype=dtype)
    for inputs in map(cases.build, (case, replace(case, q_lens=(40, 2, 1, 33)))):
        host, views = embed(inputs.k_pages, inputs.v_pages)
        pool = cupy.asarray(host)
        kv, table, q = pa.PagedKV(*views(pool), layout=layout), inputs.table(cupy.asarray), cupy.asarray(inputs.q)
        if inputs.case.is_decode:
            out, lse = pa.decode(q, kv, table, return_lse=True)
        else:
            out, lse = pa.prefill(q, inputs.qo_indptr, kv, table, return_lse=True)
        assert_right(inputs, out, lse)

        # New tokens, from views as well: the whole of the larger array becomes what the reference makes of it.
        slots = np.array([5, -1, 40, 17, 0], np.int64)
        new = np.random.default_rng(3).standard_normal((2, 3, 5, 4, 64), np.float32).astype(inputs.q.dtype)
        pa.append(pa.PagedKV(*views(host), layout=layout), slots, new[0, 1, :, 1:3], new[1, 2, :, ::2])
        gpu_new, width = cupy.asarray(new), np.int32 if inputs.case.is_decode else np.int64
        pa.append(kv, cupy.asarray(slots.astype(width)), gpu_new[0, 1, :, 1:3], gpu_new[1, 2, :, ::2])
        assert pool.tobytes() == host.tobytes()
    pa.status()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_combined_pools_are_views(layout: str) -> None:
    inputs = cases.build(cases.Case("combined", (130, 0, 1, 33), layout=layout))
    pool = cupy.asarray(np.stack([inputs.k_pages, inputs.v_pages], axis=1))
    kv = pa.PagedKV.combined(pool, layout=layout)
    assert kv.k_pages.data.ptr == pool.data.ptr
    assert kv.v_pages.data.ptr == pool.data.ptr + pool.strides[1]
    layers = cupy.asarray(np.stack([inputs.k_pages, inputs.v_pages], axis=1)[:, None].repeat(2, axis=1))
    for served in (kv, pa.PagedKV.combined(layers[:, 1], layout=layout)):
        out, lse = pa.decode(cupy.asarray(inputs.q), served, inputs.table(cupy.asarray), return_lse=True)
        assert_right(inputs, out, lse)


# -- one request, contiguous -------------------------------------------------------------------------------------------


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The sizes that are allocated inside."""
    sizes: list[int] = []
    before = cupy.cuda.get_allocator()

    def allocate(size: int) -> Any:
        sizes.append(size)
        return before(size)

    cupy.cuda.set_allocator(allocate)
    try:
        yield sizes
    finally:
        cupy.cuda.set_allocator(before)


@pytest.mark.parametrize("length", [20000, 20003])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_single_requests_are_served_without_a_copy(layout: str, length: int) -> None:
    random = np.random.default_rng(length)
    rows, heads, kv_heads, dim, left = 33, 16, 4, 64, 5
    shape = (length + left, kv_heads, dim) if layout == "NHD" else (kv_heads, length + left, dim)
    inside = (slice(left, None),) if layout == "NHD" else (slice(None), slice(left, None))
    k, v = (random.standard_normal(shape, np.float32).astype(np.float16) for _ in "kv")
    q = random.standard_normal((rows, heads, dim), np.float32).astype(np.float16)
    d_q, d_k, d_v = (cupy.asarray(array) for array in (q, k, v))
    k, v, d_k, d_v = k[inside], v[inside], d_k[inside], d_v[inside]  # views that begin behind the base of their memory
    tolerance = cases.OUT_TOLERANCE["float16"]

    with counted_bytes() as sizes:
        out, lse = pa.single_decode(d_q[0], d_k, d_v, layout=layout, return_lse=True)
    assert sum(sizes) < d_k.nbytes / 4
    right = np.empty((heads, dim), np.float32)
    _, right_lse = pa.single_decode(q[0], k, v, layout=layout, out=right, return_lse=True)
    cases.assert_close(out.get(), right, lse.get(), right_lse, tolerance=tolerance)
    assert out.shape == (heads, dim) and lse.shape == (heads,)

    with counted_bytes() as sizes:
        out, lse = pa.single_prefill(d_q, d_k, d_v, layout=layout, return_lse=True)
    assert sum(sizes) < d_k.nbytes / 4
    right = np.empty(q.shape, np.float32)
    _, right_lse = pa.single_prefill(q, k, v, layout=layout, out=right, return_lse=True)
    cases.assert_close(out.get(), right, lse.get(), right_lse, tolerance=tolerance)

    given_out, given_lse = cupy.empty(d_q.shape[1:], np.float32), cupy.empty(heads, np.float32)
    given = {"out": given_out, "lse": given_lse}
    result, result_lse = pa.single_decode(d_q[3], d_k, d_v, layout=layout, return_lse=True, **given)
    assert result is given_out and result_lse is given_lse
    _, right_lse = pa.single_decode(q[3], k, v, layout=layout, out=right[3], return_lse=True)
    cases.assert_close(given_out.get(), right[3], given_lse.get(), right_lse, tolerance=tolerance)
    pa.status()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_single_request_without_keys(layout: str) -> None:
    q = cupy.ones((3, 4, 64), np.float16)
    nothing = cupy.empty((0, 2, 64) if layout == "NHD" else (2, 0, 64), np.float16)
    for out, lse in (
        pa.single_decode(q[0], nothing, nothing, layout=layout, return_lse=True),
        pa.single_prefill(q, nothing, nothing, layout=layout, return_lse=True),
    ):
        assert (out.get() == 0).all() and np.isneginf(lse.get()).all()


# -- many layers over one table ----------------------------------------------------------------------------------------


def bits(pages: Any) -> np.ndarray:
    """A strided view of 16-bit numbers on the host."""
    return pages.view(np.uint16).get()


class Twins:
    """The same calls on a cache on the CPU and on one on the GPU."""

    LAYERS, HEADS, KV_HEADS, DIM, PAGE = 3, 8, 2, 64, 8

    def __init__(self, layout: str, dtype: str) -> None:
        self.random = np.random.default_rng(11)
        self.dtype = dtype
        self.cpu, self.gpu = (
            pa.PagedKVCache(
                60, self.PAGE, self.KV_HEADS, self.DIM,
                layout=layout, dtype=dtype, num_layers=self.LAYERS, device=device,
            )
            for device in ("cpu", "cuda")
        )  # fmt: skip
        self.decode = pa.BatchDecodeWithPagedKVCache()
        self.prefill = pa.BatchPrefillWithPagedKVCache()
        self.live: list[int] = []

    def both(self, name: str, *arguments: Any) -> Any:
        """The method of either cache; its result, which is the same."""
        on_cpu, on_gpu = (getattr(cache, name)(*arguments) for cache in (self.cpu, self.gpu))
        assert on_cpu == on_gpu
        assert self.cpu.num_free_pages == self.gpu.num_free_pages
        return on_cpu

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32).astype(cases.DTYPES[self.dtype])

    def grow(self, seqs: list[int], counts: list[int]) -> None:
        slots, gpu_slots = self.cpu.reserve(seqs, counts), self.gpu.reserve(seqs, counts)
        np.testing.assert_array_equal(gpu_slots.get(), slots)
        for layer in range(self.LAYERS):
            k, v = (self.normal(sum(counts), self.KV_HEADS, self.DIM) for _ in "kv")
            self.cpu.write(slots, k, v, layer=layer)
            self.gpu.write(gpu_slots, cupy.asarray(k), cupy.asarray(v), layer=layer)

    def step(self) -> None:
        """One change: a sequence joins, all grow, one is forked, cut, or ends."""
        choice = self.random.random()
        if not self.live or (choice < 0.15 and len(self.live) < 6 and self.cpu.num_free_pages >= 15):
            self.live.append(self.both("new_sequence"))
            self.grow(self.live[-1:], [int(self.random.integers(1, 30))])
        elif choice < 0.35 and len(self.live) < 6:
            seq = int(self.random.choice(self.live))
            length = int(self.random.integers(self.cpu.seq_len(seq) + 1))
            self.live.append(self.both("fork", seq, length) if choice < 0.25 else self.both("fork", seq))
        elif choice < 0.5:
            seq = int(self.random.choice(self.live))
            self.both("truncate", seq, int(self.random.integers(self.cpu.seq_len(seq) + 1)))
        elif choice < 0.6 or self.cpu.num_free_pages < 15:
            self.both("free", self.live.pop(int(self.random.integers(len(self.live)))))
        else:
            self.grow(self.live, self.random.integers(0, 4, len(self.live)).tolist())

    def check(self) -> None:
        """Table, pages and attention of every layer are the same."""
        seqs = self.random.permutation(self.live).tolist()
        table, gpu_table = self.cpu.page_table(seqs), self.gpu.page_table(seqs)
        used = int(table.indptr[-1])
        for name, end in (("indptr", None), ("indices", used), ("last_page_len", None)):
            np.testing.assert_array_equal(getattr(gpu_table, name).get()[:end], getattr(table, name)[:end])
        gpu_table.validate(self.gpu.num_pages).raise_if_bad()
        queries = self.random.integers(0, 6, len(seqs))
        qo_indptr = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        self.decode.plan(self.gpu.layers[0], gpu_table, self.HEADS)
        self.prefill.plan(self.gpu.layers[0], gpu_table, qo_indptr, self.HEADS)
        pages = np.unique(table.indices[:used])
        for layer, gpu_layer in zip(self.cpu.layers, self.gpu.layers, strict=True):
            for held, gpu_held in ((layer.k_pages, gpu_layer.k_pages), (layer.v_pages, gpu_layer.v_pages)):
                np.testing.assert_array_equal(bits(gpu_held)[pages], held.view(np.uint16)[pages])
            q, rows = self.normal(len(seqs), self.HEADS, self.DIM), self.normal(qo_indptr[-1], self.HEADS, self.DIM)
            right, right_rows = np.empty(q.shape, np.float32), np.empty(rows.shape, np.float32)
            _, right_lse = pa.decode(q, layer, table, out=right, return_lse=True)
            out, lse = self.decode.run(cupy.asarray(q), gpu_layer, return_lse=True)
            cases.assert_close(out.get(), right, lse.get(), right_lse, tolerance=cases.OUT_TOLERANCE[self.dtype])
            _, right_lse = pa.prefill(rows, qo_indptr, layer, table, out=right_rows, return_lse=True)
            out, lse = self.prefill.run(cupy.asarray(rows), gpu_layer, return_lse=True)
            cases.assert_close(out.get(), right_rows, lse.get(), right_lse, tolerance=cases.OUT_TOLERANCE[self.dtype])
        self.decode.status()
        self.prefill.status()


@pytest.mark.parametrize(("layout", "dtype"), [("NHD", "float16"), ("HND", "bfloat16")])
def test_many_layers_over_one_table(layout: str, dtype: str) -> None:
    """Joining, growing, forking (whole and prefix), copy-on-write, cutting and ending, with three layers."""
    twins = Twins(layout, dtype)
    for step in range(120):
        twins.step()
        if twins.live and step % 4 == 3:
            twins.check()
    for seq in twins.live:
        twins.both("free", seq)
    assert twins.gpu.num_free_pages == twins.gpu.num_pages
    pa.status()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_fork_copies_the_page_that_it_writes_in_all_layers(layout: str) -> None:
    twins = Twins(layout, "float16")
    twins.live = [twins.both("new_sequence")]
    twins.grow(twins.live, [20])  # two pages and a half
    twins.live.append(twins.both("fork", twins.live[0]))
    twins.live.append(twins.both("fork", twins.live[0], 12))
    assert twins.gpu.num_shared_pages == 3
    before = [bits(layer.k_pages) for layer in twins.gpu.layers]
    twins.grow(twins.live[1:], [1, 6])
    assert twins.gpu.num_shared_pages == 2
    kept = twins.cpu.page_table(twins.live[:1]).indices[:3]
    for layer, old in zip(twins.gpu.layers, before, strict=True):
        np.testing.assert_array_equal(bits(layer.k_pages)[kept], old[kept])
    twins.check()
    twins.both("truncate", twins.live[0], 9)
    twins.grow(twins.live[:1], [9])
    twins.check()
