"""Bad input: one table over the whole public API. For each case the message names argument, offending value and remedy,
nothing was launched, and nothing changed."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import paged_attn as pa
from paged_attn import backends, interop, plans, support
from paged_attn.checks import overlaps

NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, NUM_QO_HEADS = 6, 4, 2, 16, 4
SLOTS = NUM_PAGES * PAGE_SIZE
KINDS = (ValueError, TypeError, pa.LayoutMismatchError, pa.PageTableError, pa.OutOfPagesError, RuntimeError)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class World:
    """Good arguments of every kind, on one backend. Metadata is NumPy, so that its values can be checked everywhere."""

    def __init__(self, xp: Any) -> None:
        self.xp, self.device = xp, "cpu" if xp is np else "cuda"
        rng = np.random.default_rng(0)

        def normal(*shape: int, dtype: Any = np.float16) -> Any:
            return xp.asarray(rng.standard_normal(shape).astype(dtype))

        self.normal = normal
        self.k_pages, self.v_pages = (normal(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM) for _ in "kv")
        self.kv = pa.PagedKV(self.k_pages, self.v_pages, layout="NHD")
        self.kv_hnd = self.kv.to_layout("HND")
        self.kv_mistagged = pa.PagedKV(self.kv_hnd.k_pages, self.kv_hnd.v_pages, layout="NHD")
        self.indptr, self.indices, self.last_page_len = int32(0, 2, 3), int32(4, 1, 5), int32(3, 4)
        self.table = self.make_table()
        self.chunks = self.table.split(1)
        self.q, self.q_prefill = normal(2, NUM_QO_HEADS, HEAD_DIM), normal(5, NUM_QO_HEADS, HEAD_DIM)
        self.q_four = normal(2, 3, NUM_QO_HEADS, HEAD_DIM)
        self.qo_indptr = int32(0, 2, 5)
        self.k, self.v = (normal(3, NUM_KV_HEADS, HEAD_DIM) for _ in "kv")
        self.k_one, self.v_one = (normal(9, NUM_KV_HEADS, HEAD_DIM) for _ in "kv")
        self.slots = np.array([0, -1, SLOTS - 1], np.int64)
        self.out, self.lse = xp.zeros_like(self.q), xp.zeros(self.q.shape[:-1], np.float32)
        self.states, self.logs = normal(3, 4, NUM_QO_HEADS, HEAD_DIM), normal(3, 4, NUM_QO_HEADS, dtype=np.float32)
        self.decode = pa.BatchDecodeWithPagedKVCache()
        self.decode.plan(self.kv, self.table, NUM_QO_HEADS)
        self.prefill = pa.BatchPrefillWithPagedKVCache()
        self.prefill.plan(self.kv, self.table, self.qo_indptr, NUM_QO_HEADS)
        self.small_decode = pa.BatchDecodeWithPagedKVCache(max_batch_size=1, max_pages=9)
        self.few_pages = pa.BatchDecodeWithPagedKVCache(max_batch_size=9, max_pages=2)
        self.small_prefill = pa.BatchPrefillWithPagedKVCache(max_batch_size=9, max_pages=9, max_tokens=4)
        self.cache = self.make_cache()
        self.a, self.b, self.freed = (self.cache.new_sequence() for _ in range(3))
        self.cache.append([self.a, self.b], [5, 4], self.k_one, self.v_one)
        self.cache.free(self.freed)
        self.layered = self.make_cache(num_layers=2)
        self.c = self.layered.new_sequence()

    def make_table(self, **changed: Any) -> pa.PageTable:
        """The good table with some arguments changed."""
        arguments = {"indptr": self.indptr, "indices": self.indices, "last_page_len": self.last_page_len}
        return pa.PageTable(**(arguments | {"page_size": PAGE_SIZE} | changed))

    def make_cache(self, **changed: Any) -> pa.PagedKVCache:
        arguments = {
            "num_pages": NUM_PAGES,
            "page_size": PAGE_SIZE,
            "num_kv_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "layout": "NHD",
            "dtype": "float16",
            "device": self.device,
        }
        return pa.PagedKVCache(**(arguments | changed))

    def state(self) -> dict[str, Any]:
        """Everything that a refused call could have changed."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, (np.ndarray, self.xp.ndarray)):
                found[name] = value.tobytes()
        for name in ("cache", "layered"):
            cache, seqs = getattr(self, name), [self.a, self.b] if name == "cache" else [self.c]
            table = cache.page_table(seqs)
            arrays = (table.indptr, table.indices[: int(table.indptr[-1])], table.last_page_len)
            found[name] = [cache.num_free_pages, [cache.seq_len(seq) for seq in seqs], *(x.tobytes() for x in arrays)]
            found[name] += [pages.tobytes() for layer in cache.layers for pages in (layer.k_pages, layer.v_pages)]
        found["decode plan"] = self.decode.run(self.q, self.kv).tobytes()
        found["prefill plan"] = self.prefill.run(self.q_prefill, self.kv).tobytes()
        return found


class Launched(BaseException):
    """A backend was called. No Exception, so that nothing can take it for a refusal."""


ENTRIES = (
    "append",
    "check_table",
    "copy_pages",
    "from_block_table",
    "merge_state",
    "merge_states",
    "seq_lens",
    "split_table",
    "table_slots",
    "to_backend",
    "to_block_table",
    "update_table",
    "uploader",
)


def forbid_launches(patch: pytest.MonkeyPatch, device: str, entries: tuple[str, ...] = ENTRIES) -> None:
    """From now on every entry of the backend raises Launched, plans included."""
    backend = backends.of(device)

    def refuse(name: str) -> Callable[..., Any]:
        def launched(*arguments: Any, **more: Any) -> Any:
            raise Launched(name)

        return launched

    for name in entries:
        patch.setattr(backend, name, refuse(name))
    patch.setattr(backend.Plan, "run", refuse("Plan.run"))


@dataclass(frozen=True)
class Bad:
    """One wrong call, the kind of error, and what its message says: argument, offending value, remedy."""

    name: str
    call: Callable[[World], Any]
    error: type[Exception]
    says: tuple[str, ...]


CASES: list[Bad] = []


def bad(name: str, call: Callable[[World], Any], error: type[Exception], *says: str) -> None:
    CASES.append(Bad(name, call, error, says))


# -- PagedKV ---------------------------------------------------------------------------------------------------------

bad("pool: layout", lambda w: pa.PagedKV(w.k_pages, w.v_pages, layout="nhd"), ValueError, "layout", "'nhd'", "'HND'")
bad("pool: layout None", lambda w: pa.PagedKV(w.k_pages, w.v_pages, layout=None), ValueError, "layout", "None", "'NHD'")
bad("pool: no array", lambda w: pa.PagedKV([1, 2], w.v_pages, layout="NHD"), TypeError, "k_pages", "list", "np.asarray")
bad(
    "pool: rank",
    lambda w: pa.PagedKV(w.k_pages[0], w.v_pages[0], layout="NHD"),
    ValueError,
    "k_pages must have 4 axes, [num_pages, page_size, num_kv_heads, head_dim]",
    "(4, 2, 16)",
    "PagedKV.combined",
)
bad(
    "pool: shapes differ",
    lambda w: pa.PagedKV(w.k_pages, w.v_pages[1:], layout="NHD"),
    ValueError,
    "v_pages.shape=(5, 4, 2, 16)",
    "k_pages.shape=(6, 4, 2, 16)",
    "pass K and V of the same layer",
)
bad(
    "pool: empty axis",
    lambda w: pa.PagedKV(w.k_pages[:, :0], w.v_pages[:, :0], layout="NHD"),
    ValueError,
    "k_pages has an empty axis",
    "(6, 0, 2, 16)",
    "at least 1",
)
bad(
    "pool: int8",
    lambda w: pa.PagedKV(w.k_pages.astype(np.int8), w.v_pages, layout="NHD"),
    TypeError,
    "k_pages must be one of float16, bfloat16",
    "int8",
    "k_pages.astype",
)
bad(
    "pool: dtypes differ",
    lambda w: pa.PagedKV(w.k_pages, w.v_pages.astype(np.float32), layout="NHD"),
    TypeError,
    "v_pages must be float16",
    "got float32",
    "v_pages.astype(np.float16)",
)
bad(
    "pool: last axis strided",
    lambda w: pa.PagedKV(w.k_pages, w.normal(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, 32)[..., ::2], layout="NHD"),
    ValueError,
    "v_pages must be contiguous along its last axis",
    "4 bytes",
    "np.ascontiguousarray(v_pages)",
)
bad(
    "pool: backwards",
    lambda w: pa.PagedKV(w.k_pages[::-1], w.v_pages, layout="NHD"),
    ValueError,
    "k_pages runs backwards along axis 0",
    "-256 bytes",
    "np.ascontiguousarray(k_pages)",
)
bad(
    "pool: combined rank",
    lambda w: pa.PagedKV.combined(w.k_pages, layout="HND"),
    ValueError,
    "kv_pages must be [num_pages, 2, num_kv_heads, page_size, head_dim]",
    "(6, 4, 2, 16)",
    "PagedKV(k_pages, v_pages, layout=...)",
)
bad(
    "pool: combined K and V on another axis",
    lambda w: pa.PagedKV.combined(w.normal(2, NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM), layout="NHD"),
    ValueError,
    "kv_pages",
    "(2, 6, 4, 2, 16)",
    "pass K and V on axis 1",
)
bad("pool: to_layout", lambda w: w.kv.to_layout("DNH"), ValueError, "layout", "'DNH'", "'NHD'")

# -- PageTable -------------------------------------------------------------------------------------------------------

bad(
    "table: float indptr",
    lambda w: w.make_table(indptr=w.indptr.astype(float)),
    TypeError,
    "indptr must be int32",
    "got float64",
    "indptr.astype(np.int32)",
)
for array in ("indptr", "indices", "last_page_len"):
    bad(
        f"table: int64 {array}",
        lambda w, array=array: w.make_table(**{array: getattr(w, array).astype(np.int64)}),
        TypeError,
        f"{array} must be int32",
        "got int64",
        f"{array}.astype(np.int32)",
    )
for array in ("page_offset", "total_len"):
    bad(
        f"table: int64 {array}",
        lambda w, array=array: w.make_table(**{array: np.zeros(2, np.int64)}),
        TypeError,
        f"{array} must be int32",
        "got int64",
        f"{array}.astype(np.int32)",
    )
    bad(
        f"table: length of {array}",
        lambda w, array=array: w.make_table(**{array: int32(0, 0, 0)}),
        ValueError,
        f"{array} must have 2 entries",
        "got 3",
        f"make {array} of that length",
    )
bad("table: list", lambda w: w.make_table(indptr=[0, 2, 3]), TypeError, "indptr", "list", "np.asarray(indptr")
bad(
    "table: rank of indices",
    lambda w: w.make_table(indices=w.indices[None]),
    ValueError,
    "indices must be 1-D",
    "(1, 3)",
    "indices.reshape(-1)",
)
bad(
    "table: length of last_page_len",
    lambda w: w.make_table(last_page_len=int32(1)),
    ValueError,
    "last_page_len must have 2 entries",
    "got 1",
    "make last_page_len of that length",
)
bad(
    "table: empty indptr",
    lambda w: w.make_table(indptr=int32()),
    ValueError,
    "indptr is empty",
    "batch_size + 1",
    "[0]",
)
bad(
    "table: strided indices",
    lambda w: w.make_table(indices=int32(4, 0, 1, 0, 5, 0)[::2]),
    ValueError,
    "indices must be contiguous",
    "8 bytes",
    "np.ascontiguousarray(indices)",
)
bad("table: page_size 0", lambda w: w.make_table(page_size=0), ValueError, "page_size is 0", "[1, ", "at least 1")
bad(
    "table: float page_size",
    lambda w: w.make_table(page_size=4.0),
    TypeError,
    "page_size",
    "4.0 (float)",
    "pass an int",
)
bad(
    "table: bool page_size",
    lambda w: w.make_table(page_size=True),
    TypeError,
    "page_size",
    "True (bool)",
    "pass an int",
)
bad("table: page_stride", lambda w: w.make_table(page_stride=0), ValueError, "page_stride is 0", "[1, ", "at least 1")
bad(
    "table: empty, negative",
    lambda w: pa.PageTable.empty(2, -1, page_size=4),
    ValueError,
    "max_pages is -1",
    "[0, ",
    "at least 0",
)
bad(
    "table: empty, device",
    lambda w: pa.PageTable.empty(2, 3, page_size=4, device="tpu"),
    ValueError,
    "device must be 'cpu', 'cuda'",
    "'tpu'",
    "pass None",
)
bad(
    "table: empty, positions",
    lambda w: pa.PageTable.empty(2, 3, page_size=4, positions=1),
    TypeError,
    "positions must be a bool",
    "pass True or False",
)
bad("table: split 0", lambda w: w.table.split(0), ValueError, "num_chunks is 0", "[1, ", "at least 1")
bad("table: split 1.5", lambda w: w.table.split(1.5), TypeError, "num_chunks must be an int", "1.5", "pass an int")
bad(
    "table: split of a bad table",
    lambda w: w.make_table(indptr=int32(0, 2, 9)).split(2),
    pa.PageTableError,
    "indptr[2] = 9 gives request 1 the pages [2, 9)",
    "3 entries",
    "correct indptr[2]",
)
bad("table: split into a tuple", lambda w: w.table.split(2, out=(1, 2)), TypeError, "out", "tuple", "PageTable(")
bad(
    "table: split, rows of out",
    lambda w: w.table.split(3, out=pa.PageTable.empty(4, 9, page_size=4, device="cpu")),
    ValueError,
    "out has 4 rows",
    "are 6",
    "split(3)",
)
bad(
    "table: split, out without positions",
    lambda w: w.table.split(2, out=pa.PageTable.empty(4, 9, page_size=4, device="cpu")),
    ValueError,
    "out has no page_offset",
    "total_len",
    "pass the table that split(2)",
)


def split_out(**changed: Any) -> pa.PageTable:
    arguments = {"indptr": np.zeros(5, np.int32), "indices": np.zeros(3, np.int32), "page_size": PAGE_SIZE}
    arguments |= {name: np.zeros(4, np.int32) for name in ("last_page_len", "page_offset", "total_len")}
    return pa.PageTable(**(arguments | changed))


bad(
    "table: split, page_size of out",
    lambda w: w.table.split(2, out=split_out(page_size=8)),
    ValueError,
    "out has page_size=8",
    "4 and 1",
    "pass the table that split(2)",
)
bad(
    "table: split, capacity of out",
    lambda w: w.table.split(2, out=split_out(indices=int32(0, 0))),
    ValueError,
    "out.indices has 2 entries",
    "the 3 of the table",
    "pass the table that split(2)",
)
bad(
    "table: int64 block_table",
    lambda w: pa.PageTable.from_block_table(np.zeros((2, 3), np.int64), int32(1, 1), page_size=4),
    TypeError,
    "block_table must be int32",
    "got int64",
    "block_table.astype(np.int32)",
)
bad(
    "table: rank of block_table",
    lambda w: pa.PageTable.from_block_table(int32(1, 2), int32(1, 1), page_size=4),
    ValueError,
    "block_table must have 2 axes",
    "(2,)",
    "reshape block_table",
)
bad(
    "table: length of seq_lens",
    lambda w: pa.PageTable.from_block_table(np.zeros((2, 3), np.int32), int32(1), page_size=4),
    ValueError,
    "seq_lens must have 2 entries",
    "got 1",
    "make seq_lens of that length",
)
bad(
    "table: negative seq_lens",
    lambda w: pa.PageTable.from_block_table(np.zeros((2, 3), np.int32), int32(1, -1), page_size=4),
    pa.PageTableError,
    "seq_lens[1] = -1",
    "[0, 12]",
    "correct seq_lens[1]",
)
bad(
    "table: seq_lens past the block table",
    lambda w: pa.PageTable.from_block_table(np.zeros((2, 3), np.int32), int32(13, 1), page_size=4),
    pa.PageTableError,
    "seq_lens[0] = 13",
    "3 pages of 4 tokens",
    "wider block_table",
)
bad(
    "table: block_table without a page",
    lambda w: pa.PageTable.from_block_table(np.array([[1, 2], [3, -1]], np.int32), int32(8, 5), page_size=4),
    pa.PageTableError,
    "block_table[1, 1] = -1",
    "seq_lens[1] = 5",
    "put the page's id there",
)
bad(
    "table: to_block_table too narrow",
    lambda w: w.table.to_block_table(1),
    pa.PageTableError,
    "max_pages_per_seq is 1",
    "request 0 has 2 pages",
    "at least 2",
)
bad(
    "table: to_block_table negative",
    lambda w: w.table.to_block_table(-1),
    ValueError,
    "max_pages_per_seq is -1",
    "[0, ",
    "at least 0",
)
bad(
    "table: slots, int64",
    lambda w: w.table.slots(np.zeros(2, np.int64), int32(0, 0)),
    TypeError,
    "batch_indices must be int32",
    "got int64",
    "batch_indices.astype(np.int32)",
)
bad(
    "table: slots, lengths",
    lambda w: w.table.slots(int32(0, 1), int32(0)),
    ValueError,
    "positions must have 2 entries",
    "got 1",
    "make positions of that length",
)
bad(
    "table: slots, request",
    lambda w: w.table.slots(int32(0, 2), int32(0, 0)),
    pa.PageTableError,
    "batch_indices[1] = 2",
    "[0, 2)",
    "correct batch_indices[1]",
)
bad(
    "table: slots, position",
    lambda w: w.table.slots(int32(0, 1), int32(-3, 0)),
    pa.PageTableError,
    "positions[0] = -3",
    "[0, ",
    "correct positions[0]",
)
bad("table: validate", lambda w: w.table.validate(-1), ValueError, "num_pages is -1", "[0, ", "at least 0")

# -- append ----------------------------------------------------------------------------------------------------------

bad(
    "append: raw pool",
    lambda w: pa.append(w.k_pages, w.slots, w.k, w.v),
    TypeError,
    "kv must be a PagedKV",
    "ndarray",
    "PagedKV(k_pages, v_pages, layout=...)",
)
bad(
    "append: int16 slots",
    lambda w: pa.append(w.kv, w.slots.astype(np.int16), w.k, w.v),
    TypeError,
    "slots must be int64 or int32",
    "got int16",
    "slots.astype(np.int64)",
)
bad(
    "append: float slots",
    lambda w: pa.append(w.kv, w.slots.astype(float), w.k, w.v),
    TypeError,
    "slots must be int64",
    "got float64",
    "slots.astype(np.int64)",
)
bad(
    "append: slot past the pool",
    lambda w: pa.append(w.kv, np.array([0, SLOTS, 1], np.int64), w.k, w.v),
    pa.PageTableError,
    f"slots[1] = {SLOTS}",
    "6 pages of 4 tokens",
    f"pass slots in [0, {SLOTS}), or -1",
)
bad(
    "append: negative slot",
    lambda w: pa.append(w.kv, np.array([0, 1, -2], np.int64), w.k, w.v),
    pa.PageTableError,
    "slots[2] = -2",
    "6 pages of 4 tokens",
    "-1 to skip a token",
)
bad(
    "append: tokens",
    lambda w: pa.append(w.kv, w.slots, w.k[:2], w.v),
    ValueError,
    "k must have shape [3, 2, 16]",
    "k.shape=(2, 2, 16)",
    "reshape or slice k",
)
bad(
    "append: rank",
    lambda w: pa.append(w.kv, w.slots, w.k, w.v[0]),
    ValueError,
    "v must have 3 axes",
    "(2, 16)",
    "reshape v",
)
bad(
    "append: dtype",
    lambda w: pa.append(w.kv, w.slots, w.k, w.v.astype(np.float32)),
    TypeError,
    "v must be float16 (as kv is)",
    "got float32",
    "v.astype(np.float16)",
)
bad(
    "append: last axis strided",
    lambda w: pa.append(w.kv, w.slots, w.normal(3, NUM_KV_HEADS, 32)[..., ::2], w.v),
    ValueError,
    "k must be contiguous along its last axis",
    "4 bytes",
    "np.ascontiguousarray(k)",
)
bad(
    "append: layout",
    lambda w: pa.append(w.kv_mistagged, w.slots, w.k, w.v),
    pa.LayoutMismatchError,
    "k has 2 heads",
    "tagged NHD, has num_kv_heads=4",
    "tag the pool layout='HND'; if it was written as NHD, pass a k of shape [3, 4, 16]",
)


def jax_pool() -> pa.PagedKV:
    pages = jnp.zeros((NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM), jnp.float16)
    return pa.PagedKV(pages, pages, layout="NHD")


bad(
    "append: JAX pool",
    lambda w: pa.append(jax_pool(), w.slots, np.zeros((3, 2, 16), np.float16), np.zeros((3, 2, 16), np.float16)),
    ValueError,
    "kv cannot be written",
    "JAX arrays",
    "keep the pool as NumPy (CPU) or CuPy (GPU) arrays",
)

# -- decode and prefill ----------------------------------------------------------------------------------------------


def attend(**changed: Any) -> Callable[[World], Any]:
    """decode with some arguments replaced by what a function of the world gives."""

    def call(w: World) -> Any:
        arguments = {"q": w.q, "kv": w.kv, "table": w.table}
        return pa.decode(**(arguments | {name: f(w) if callable(f) else f for name, f in changed.items()}))

    return call


def attend_ragged(**changed: Any) -> Callable[[World], Any]:
    """prefill, likewise."""

    def call(w: World) -> Any:
        arguments = {"q": w.q_prefill, "qo_indptr": w.qo_indptr, "kv": w.kv, "table": w.table}
        return pa.prefill(**(arguments | {name: f(w) if callable(f) else f for name, f in changed.items()}))

    return call


bad("decode: list", attend(q=[1.0]), TypeError, "q must be an array", "list", "np.asarray(q")
bad(
    "decode: rank of q",
    attend(q=lambda w: w.q[0]),
    ValueError,
    "q must be [batch, num_qo_heads",
    "(4, 16)",
    "reshape q",
)
bad(
    "decode: heads",
    attend(q=lambda w: w.normal(2, 3, HEAD_DIM)),
    ValueError,
    "q has 3 heads, which is not a multiple of num_kv_heads=2",
    "q.shape=(2, 3, 16)",
    "pass a q with 2, 4, 6, ... heads",
)
bad(
    "decode: heads, of a pool with the wrong tag",
    lambda w: pa.decode(w.normal(2, 6, HEAD_DIM), w.kv_mistagged, w.make_table(page_size=2)),
    ValueError,
    "q has 6 heads, which is not a multiple of num_kv_heads=4",
    "pass a q with 4, 8, 12, ... heads",
    "tag the pool layout='HND' (page_size=4, num_kv_heads=2) and pass a table of that page_size",
)
bad(
    "decode: head_dim",
    attend(q=lambda w: w.normal(2, NUM_QO_HEADS, 32)),
    ValueError,
    "q must have shape [2, 4, 16]",
    "q.shape=(2, 4, 32)",
    "reshape q",
)
bad(
    "decode: batch",
    attend(q=lambda w: w.q_prefill),
    ValueError,
    "q must have shape [2, 4, 16]",
    "q.shape=(5, 4, 16)",
    "reshape q, or pass a table of that batch",
)
bad(
    "decode: dtype of q",
    attend(q=lambda w: w.q.astype(np.float32)),
    TypeError,
    "q must be float16 (q and kv share one dtype, and kv has it)",
    "got float32",
    "q.astype(np.float16)",
)
bad(
    "decode: last axis of q strided",
    attend(q=lambda w: w.normal(2, NUM_QO_HEADS, 32)[..., ::2]),
    ValueError,
    "q must be contiguous along its last axis",
    "4 bytes",
    "np.ascontiguousarray(q)",
)
bad("decode: raw pool", attend(kv=lambda w: w.k_pages), TypeError, "kv must be a PagedKV", "ndarray", "layout=...")
bad(
    "decode: raw table",
    attend(table=lambda w: w.indptr),
    TypeError,
    "table must be a PageTable",
    "ndarray",
    "PageTable(",
)
bad(
    "decode: layout",
    attend(kv=lambda w: w.kv_mistagged),
    pa.LayoutMismatchError,
    "kv is tagged NHD",
    "page_size=2 and num_kv_heads=4, but the table has page_size=4",
    "if the pool was written so, tag the pool layout='HND'; if it was written as NHD, pass a table that was made with "
    "page_size=2",
)
bad(
    "decode: page_size",
    attend(table=lambda w: w.make_table(page_size=8)),
    pa.LayoutMismatchError,
    "page_size=4",
    "the table has page_size=8",
    "neither layout fits",
)
bad("decode: window", attend(window_left=-2), ValueError, "window_left is -2", "[-1, ", "at least -1")
bad("decode: float window", attend(window_left=1.5), TypeError, "window_left", "1.5 (float)", "pass an int")
bad("decode: soft cap", attend(logits_soft_cap=-1.0), ValueError, "logits_soft_cap is -1", "at least 0", "pass 0.0")
bad("decode: soft cap nan", attend(logits_soft_cap=np.nan), ValueError, "logits_soft_cap is nan", "finite", "pass 0.0")
bad("decode: no scale", attend(sm_scale=0.0), ValueError, "sm_scale is 0", "positive", "pass None")
bad("decode: infinite scale", attend(sm_scale=np.inf), ValueError, "sm_scale is inf", "finite", "pass None")
for number in (1e-46, 1e-38, 2e38, 1e39):
    shown = f"sm_scale is {number:g}"
    bad(f"decode: scale {number:g}", attend(sm_scale=number), ValueError, shown, "2**127", "multiply q", "pass None")
    shown = f"logits_soft_cap is {number:g}"
    bad(f"decode: cap {number:g}", attend(logits_soft_cap=number), ValueError, shown, "[2**-126, 2**127]", "pass 0.0")
for scale, cap in ((1e20, 1e-20), (1e-20, 1e20)):
    bad(
        f"decode: scale {scale:g} cap {cap:g}", attend(sm_scale=scale, logits_soft_cap=cap), ValueError,
        f"sm_scale / logits_soft_cap is {scale / cap:g}", "[2**-126, 2**127]", f"nearer to sm_scale={scale:g}",
    )  # fmt: skip
bad("decode: scale of text", attend(sm_scale="1"), TypeError, "sm_scale must be a float", "'1' (str)", "pass a float")
bad(
    "decode: shape of out",
    attend(out=lambda w: w.out[:1]),
    ValueError,
    "out must have shape [2, 4, 16]",
    "out.shape=(1, 4, 16)",
    "reshape or slice out",
)
bad(
    "decode: dtype of out",
    attend(out=lambda w: w.out.astype(np.float64)),
    TypeError,
    "out must be float16 or float32",
    "got float64",
    "dtype=np.float16",
)
bad(
    "decode: out strided",
    attend(out=lambda w: w.normal(2, NUM_QO_HEADS, 2 * HEAD_DIM)[..., :HEAD_DIM]),
    ValueError,
    "out must be C-contiguous",
    "(256, 64, 2)",
    "empty_like",
)
bad(
    "decode: out of JAX", attend(out=jnp.zeros((2, 4, 16), jnp.float16)), ValueError, "out", "JAX array", "pass a NumPy"
)
bad(
    "decode: shape of sinks",
    attend(sinks=lambda w: w.lse),
    ValueError,
    "sinks must have 1 axes",
    "(2, 4)",
    "reshape sinks",
)
bad(
    "decode: heads of sinks", attend(sinks=lambda w: w.lse[0, :3]), ValueError,
    "sinks must have shape [4], one for each query head", "sinks.shape=(3,)", "slice sinks",
)  # fmt: skip
bad(
    "decode: dtype of sinks", attend(sinks=lambda w: w.out[0, 0, :4]), TypeError,
    "sinks must be float32", "got float16", "sinks.astype(np.float32)",
)  # fmt: skip
bad(
    "decode: strided sinks", attend(sinks=lambda w: w.normal(4, 2, dtype=np.float32)[:, 0]), ValueError,
    "sinks must be C-contiguous", "(8,)", "np.ascontiguousarray(sinks)",
)  # fmt: skip
bad(
    "decode: sinks of a split table",
    lambda w: pa.decode(w.q, w.kv, w.chunks, sinks=w.lse[0]),
    ValueError,
    "sinks were given with a table that split() made",
    "every chunk",
    "merge_states(v, s, sinks=sinks)",
)
bad(
    "merge_states: heads of sinks", lambda w: pa.merge_states(w.states, w.logs, sinks=w.lse[0, :2]), ValueError,
    "sinks must have shape [4], one for each head of v", "(2,)", "slice sinks",
)  # fmt: skip


def read_only(_: World) -> np.ndarray:
    array = np.zeros((2, 4, 16), np.float16)
    array.flags.writeable = False
    return array


bad("decode: read-only out", attend(out=read_only), ValueError, "out", "read-only NumPy array", "out.copy()")
bad(
    "decode: shape of lse",
    attend(lse=lambda w: w.lse[:, :1]),
    ValueError,
    "lse must have shape [2, 4]",
    "lse.shape=(2, 1)",
    "reshape or slice lse",
)
bad(
    "decode: dtype of lse",
    attend(lse=lambda w: w.lse.astype(np.float16)),
    TypeError,
    "lse must be float32",
    "got float16",
    "dtype=np.float32",
)

TABLE_FAULTS: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...]]] = {
    "decreasing indptr": (
        {"indptr": int32(0, 3, 2)},
        ("indptr[2] = 2 gives request 1 the pages [3, 2)", "must not decrease", "correct indptr[2]"),
    ),
    "negative indptr": (
        {"indptr": int32(-1, 2, 3)},
        ("indptr[0] = -1 gives request 0", "[-1, 2)", "correct indptr[0]"),
    ),
    "indptr past indices": (
        {"indptr": int32(0, 2, 4)},
        ("indptr[2] = 4 gives request 1", "[2, 4)", "correct indptr[2]"),
    ),
    "page id past the pool": ({"indices": int32(4, 6, 5)}, ("indices[1] = 6 (request 0)", "num_pages=6", "[0, 6)")),
    "negative page id": ({"indices": int32(4, 1, -1)}, ("indices[2] = -1 (request 1)", "num_pages=6", "[0, 6)")),
    "last page of no token": (
        {"last_page_len": int32(0, 4)},
        ("last_page_len[0] = 0", "<= page_size=4", "correct last_page_len[0]"),
    ),
    "last page too long": (
        {"last_page_len": int32(3, 5)},
        ("last_page_len[1] = 5", "<= page_size=4", "correct last_page_len[1]"),
    ),
    "negative page_offset": (
        {"page_offset": int32(0, -1)},
        ("page_offset[1] = -1", "not be negative", "correct page_offset[1]"),
    ),
    "negative total_len": (
        {"total_len": int32(-7, 0)},
        ("total_len[0] = -7", "not be negative", "correct total_len[0]"),
    ),
}
for fault, (changed, says) in TABLE_FAULTS.items():
    broken = lambda w, changed=changed: w.make_table(**changed)  # noqa: E731
    bad(f"decode: {fault}", attend(table=broken), pa.PageTableError, *says)
    bad(f"prefill: {fault}", attend_ragged(table=broken), pa.PageTableError, *says)
    bad(
        f"plan: {fault}",
        lambda w, broken=broken: w.decode.plan(w.kv, broken(w), NUM_QO_HEADS),
        pa.PageTableError,
        *says,
    )

for number in (None, 3):
    bad(
        f"prefill: qo_indptr={number}", lambda w, number=number: pa.prefill(w.q_prefill, number, w.kv, w.table),
        TypeError, "qo_indptr must be an array", type(number).__name__, "np.asarray(qo_indptr, dtype=np.int32)",
    )  # fmt: skip
bad(
    "prefill: rank of q",
    attend_ragged(q=lambda w: w.q_four),
    ValueError,
    "q must be [rows, num_qo_heads, head_dim]",
    "(2, 3, 4, 16)",
    "reshape q",
)
for wrong in (np.float64, np.int64):
    bad(
        f"prefill: {wrong.__name__} qo_indptr",
        attend_ragged(qo_indptr=lambda w, wrong=wrong: w.qo_indptr.astype(wrong)),
        TypeError,
        "qo_indptr must be int32",
        f"got {wrong.__name__}",
        "qo_indptr.astype(np.int32)",
    )
bad(
    "prefill: length of qo_indptr",
    attend_ragged(qo_indptr=lambda w: w.qo_indptr[1:]),
    ValueError,
    "qo_indptr must have 3 entries",
    "got 2",
    "make qo_indptr of that length",
)
bad(
    "prefill: qo_indptr does not start at 0",
    attend_ragged(qo_indptr=lambda w: w.qo_indptr + np.int32(1)),
    pa.PageTableError,
    "qo_indptr[0] = 1",
    "must start at 0",
    "pass qo_indptr - qo_indptr[0]",
)
bad(
    "prefill: qo_indptr decreases",
    attend_ragged(qo_indptr=int32(0, 7, 5)),
    pa.PageTableError,
    "qo_indptr[2] = 5 is less than qo_indptr[1] = 7",
    "request 1 has a negative number of queries",
    "correct qo_indptr[2]",
)
bad(
    "prefill: qo_indptr ends elsewhere",
    attend_ragged(qo_indptr=int32(0, 2, 4)),
    pa.PageTableError,
    "qo_indptr ends at 4",
    "q has 5 rows",
    "pass q[:qo_indptr[-1]]",
)
bad(
    "prefill: causal",
    attend_ragged(causal="no"),
    TypeError,
    "causal must be a bool",
    "'no' (str)",
    "pass True or False",
)
bad(
    "prefill: layout",
    attend_ragged(kv=lambda w: w.kv_mistagged),
    pa.LayoutMismatchError,
    "kv is tagged NHD",
    "but the table has page_size=4",
    "tag the pool layout='HND'",
)

# Arguments in another library's order: the message shows ours.
PREFILL_ORDER = "prefill(q, qo_indptr, kv, table)"
for name, call, wrong, order in (
    ("decode: kv first", lambda w: pa.decode(w.kv, w.q, w.table), "kv must be a PagedKV, got", "decode(q, kv, table)"),
    ("decode: table and kv", lambda w: pa.decode(w.q, w.table, w.kv), "got PageTable", "decode(q, kv, table)"),
    ("prefill: kv second", lambda w: pa.prefill(w.q_prefill, w.kv, w.qo_indptr, w.table), "kv must be", PREFILL_ORDER),
    ("prefill: kv last", lambda w: pa.prefill(w.q_prefill, w.qo_indptr, w.table, w.kv), "got PageTable", PREFILL_ORDER),
    (
        "prefill: table third",
        lambda w: pa.prefill(w.q_prefill, w.kv, w.table, w.qo_indptr),
        "got PageTable",
        PREFILL_ORDER,
    ),
    ("append: kv last", lambda w: pa.append(w.k, w.v, w.slots, w.kv), "kv must be", "append(kv, slots, k, v)"),
    (
        "plan: arrays of a table",
        lambda w: w.decode.plan(w.indptr, w.indices, 4),
        "kv must be a PagedKV, got ndarray",
        "plan(kv, table, num_qo_heads)",
    ),
    (
        "plan: qo_indptr first",
        lambda w: w.prefill.plan(w.qo_indptr, w.kv, w.table, 4),
        "kv must be a PagedKV, got ndarray",
        "plan(kv, table, qo_indptr, num_qo_heads)",
    ),
    ("run: kv first", lambda w: w.decode.run(w.kv, w.q), "q must be an array", "run(q, kv)"),
    ("run: table", lambda w: w.decode.run(w.q, w.table), "kv must be a PagedKV, got PageTable", "run(q, kv)"),
):
    bad(name, call, TypeError, wrong, order)
bad(
    "prefill: qo_indptr first",
    lambda w: pa.prefill(w.qo_indptr, w.q_prefill, w.kv, w.table),
    ValueError,
    "q must be [rows, num_qo_heads, head_dim]",
    "q.shape=(3,)",
    PREFILL_ORDER,
)

# What cannot be, in the words of the door it came through.
bad(
    "pool: layout of a rank",
    lambda w: pa.PagedKV(w.k_pages[0], w.v_pages[0], layout=pa.Layout.HND),
    ValueError,
    "for layout='HND'",
    "(4, 2, 16)",
    "pass one layer's pages",
)
for name, call, array, dtype in (
    ("table", lambda w: w.make_table(indices=[1, 2]), "indices", "int32"),
    ("table", lambda w: w.make_table(total_len=(1, 2)), "total_len", "int32"),
    ("block table", lambda w: pa.PageTable.from_block_table([[1]], int32(1), page_size=4), "block_table", "int32"),
    ("prefill", attend_ragged(qo_indptr=[0, 2, 5]), "qo_indptr", "int32"),
    ("append", lambda w: pa.append(w.kv, [0, 1, 2], w.k, w.v), "slots", "int64"),
    ("merge_states", lambda w: pa.merge_states(w.states, [1.0]), "s", "float32"),
):
    bad(
        f"{name}: list for {array}",
        call,
        TypeError,
        f"{array} must be an array",
        "list" if array != "total_len" else "tuple",
        f"pass np.asarray({array}, dtype=np.{dtype})",
    )
FLOATS = "must be one of float16, bfloat16, float32, float64"
for dtype in ("float8_e4m3fn", "int4", "float8_e5m2"):

    def eight_bit(*shape: int, dtype: str = dtype) -> Any:
        return np.zeros(shape, dtype)

    def eight_bit_of_jax(*shape: int, dtype: str = dtype) -> Any:
        return jnp.zeros(shape, dtype)

    for make, library in ((eight_bit, "NumPy"), (eight_bit_of_jax, "JAX")):
        bad(
            f"pool: {dtype} of {library}",
            lambda w, make=make: pa.PagedKV(make(6, 4, 2, 16), make(6, 4, 2, 16), layout="NHD"),
            TypeError,
            f"k_pages {FLOATS}",
            f"got {dtype}",
            "pass k_pages.astype(np.float16)",
        )
        bad(
            f"single_decode: {dtype} of {library}",
            lambda w, make=make: pa.single_decode(make(4, 16), make(9, 2, 16), make(9, 2, 16), layout="NHD"),
            TypeError,
            f"k {FLOATS}",
            f"got {dtype}",
            "pass k.astype(np.float16)",
        )
        bad(
            f"decode: q {dtype} of {library}",
            attend(q=lambda w, make=make: make(2, 4, 16)),
            TypeError,
            "q must be",
            f"got {dtype}",
            "pass q.astype(np.float16)",
        )
        bad(
            f"prefill: qo_indptr {dtype} of {library}",
            attend_ragged(qo_indptr=lambda w, make=make: make(3)),
            TypeError,
            "qo_indptr must be int32",
            f"got {dtype}",
            "pass qo_indptr.astype(np.int32)",
        )


def deleted(*shape: int, dtype: Any = jnp.float16) -> Any:
    array = jnp.ones(shape, dtype)
    array.delete()
    return array


DELETED: dict[str, tuple[str, Callable[[World], Any]]] = {
    "pool": ("k_pages", lambda w: pa.PagedKV(deleted(6, 4, 2, 16), w.v_pages, layout="NHD")),
    "combined": ("kv_pages", lambda w: pa.PagedKV.combined(deleted(6, 2, 4, 2, 16), layout="NHD")),
    "table": ("indptr", lambda w: w.make_table(indptr=deleted(3, dtype=jnp.int32))),
    "block table": (
        "seq_lens",
        lambda w: pa.PageTable.from_block_table(np.zeros((2, 3), np.int32), deleted(2, dtype=jnp.int32), page_size=4),
    ),
    "slots of a table": ("positions", lambda w: w.table.slots(int32(0), deleted(1, dtype=jnp.int32))),
    "append": ("slots", lambda w: pa.append(w.kv, deleted(3, dtype=jnp.int32), w.k, w.v)),
    "decode": ("q", attend(q=lambda w: deleted(2, 4, 16))),
    "decode out": ("out", attend(out=lambda w: deleted(2, 4, 16))),
    "prefill": ("qo_indptr", attend_ragged(qo_indptr=lambda w: deleted(3, dtype=jnp.int32))),
    "run": ("q", lambda w: w.decode.run(deleted(2, 4, 16), w.kv)),
    "single_decode": ("v", lambda w: pa.single_decode(w.q[0], w.k_one, deleted(9, 2, 16), layout="NHD")),
    "merge_states": ("s", lambda w: pa.merge_states(w.states, deleted(3, 4, 4, dtype=jnp.float32))),
    "cache seqs": ("seqs", lambda w: w.cache.page_table(deleted(2, dtype=jnp.int32))),
    "cache counts": ("counts", lambda w: w.cache.reserve([w.a, w.b], deleted(2, dtype=jnp.int32))),
}
for name, (array, call) in DELETED.items():
    bad(
        f"deleted JAX array: {name}",
        call,
        ValueError,
        f"{array} is a JAX array that was deleted",
        f"{array}.shape=",
        "pass the array that the jitted function returned",
    )

# -- one request -----------------------------------------------------------------------------------------------------

bad(
    "single_decode: rank of q",
    lambda w: pa.single_decode(w.q, w.k_one, w.v_one, layout="NHD"),
    ValueError,
    "q must be [num_qo_heads, head_dim]",
    "(2, 4, 16)",
    "reshape q",
)
bad(
    "single_decode: rank of k",
    lambda w: pa.single_decode(w.q[0], w.k_pages, w.v_pages, layout="NHD"),
    ValueError,
    "k must have 3 axes",
    "(6, 4, 2, 16)",
    "reshape k",
)
bad(
    "single_decode: layout",
    lambda w: pa.single_decode(w.q[0], w.k_one, w.v_one, layout="LHD"),
    ValueError,
    "layout",
    "'LHD'",
    "'NHD'",
)
bad(
    "single_decode: heads",
    lambda w: pa.single_decode(w.normal(3, HEAD_DIM), w.k_one, w.v_one, layout="NHD"),
    ValueError,
    "q has 3 heads, which is not a multiple of num_kv_heads=2",
    "(3, 16)",
    "pass a q with 2, 4, 6, ... heads",
)
bad(
    "single_decode: k and v differ",
    lambda w: pa.single_decode(w.q[0], w.k_one, w.v_one[1:], layout="NHD"),
    ValueError,
    "v must have shape [9, 2, v_head_dim]",
    "(8, 2, 16)",
    "reshape or slice v",
)
bad(
    "single_prefill: dtype",
    lambda w: pa.single_prefill(w.q_prefill.astype(np.float32), w.k_one, w.v_one, layout="NHD"),
    TypeError,
    "q must be float16",
    "got float32",
    "q.astype(np.float16)",
)
bad(
    "single_prefill: rank of q",
    lambda w: pa.single_prefill(w.q_four, w.k_one, w.v_one, layout="NHD"),
    ValueError,
    "q must be [rows, num_qo_heads, head_dim]",
    "(2, 3, 4, 16)",
    "reshape q",
)

# -- merging ---------------------------------------------------------------------------------------------------------


def two_states(w: World) -> dict[str, Any]:
    return {"v_a": w.states[:, 0], "s_a": w.logs[:, 0], "v_b": w.states[:, 1], "s_b": w.logs[:, 1]}


def merge_two(**changed: Any) -> Callable[[World], Any]:
    def call(w: World) -> Any:
        return pa.merge_state(**(two_states(w) | {name: f(w) if callable(f) else f for name, f in changed.items()}))

    return call


def merge_many(**changed: Any) -> Callable[[World], Any]:
    def call(w: World) -> Any:
        arguments = {"v": w.states, "s": w.logs}
        return pa.merge_states(**(arguments | {name: f(w) if callable(f) else f for name, f in changed.items()}))

    return call


for merge in (merge_two, merge_many):
    bad(f"{merge.__name__}: base", merge(base=10), ValueError, "base is 10", "base='e'", "base=2")
    bad(f"{merge.__name__}: base True", merge(base=True), ValueError, "base is True", "base='e'", "base=2")
bad(
    "merge_state: dtype of s",
    merge_two(s_b=lambda w: w.logs[:, 1].astype(np.float16)),
    TypeError,
    "s_b must be float32",
    "got float16",
    "s_b.astype(np.float32)",
)
bad(
    "merge_state: shapes",
    merge_two(v_b=lambda w: w.states[:2, 1]),
    ValueError,
    "v_b must have shape [3, 4, 16]",
    "v_b.shape=(2, 4, 16)",
    "reshape or slice v_b",
)
bad(
    "merge_state: dtypes",
    merge_two(v_b=lambda w: w.states[:, 1].astype(np.float32)),
    TypeError,
    "v_b must be float16 (as v_a is)",
    "got float32",
    "v_b.astype(np.float16)",
)
bad(
    "merge_state: rank",
    merge_two(v_a=lambda w: w.states),
    ValueError,
    "v_a must have 3 axes",
    "(3, 4, 4, 16)",
    "reshape v_a",
)
bad(
    "merge_states: shape of s",
    merge_many(s=lambda w: w.logs[:, 1:]),
    ValueError,
    "s must have shape [3, 4, 4]",
    "s.shape=(3, 3, 4)",
    "reshape or slice s",
)
bad(
    "merge_states: rank",
    merge_many(v=lambda w: w.states[0]),
    ValueError,
    "v must have 4 axes",
    "(4, 4, 16)",
    "reshape v",
)
bad(
    "merge_states: last axis strided",
    merge_many(v=lambda w: w.normal(3, 4, 4, 32)[..., ::2]),
    ValueError,
    "v must be contiguous along its last axis",
    "4 bytes",
    "np.ascontiguousarray(v)",
)
bad(
    "merge_states: int v",
    merge_many(v=lambda w: w.states.astype(np.int32)),
    TypeError,
    "v must be one of float16",
    "int32",
    "v.astype",
)
bad(
    "merge_states: shape of out",
    merge_many(out=lambda w: w.states),
    ValueError,
    "out must have 3 axes",
    "(3, 4, 4, 16)",
    "reshape out",
)
bad(
    "merge_states: lse of JAX",
    merge_many(lse=jnp.zeros((3, 4))),
    ValueError,
    "lse is a JAX array",
    "immutable",
    "pass a NumPy array",
)

# -- plan and run ----------------------------------------------------------------------------------------------------

for kind, name in ((pa.BatchDecodeWithPagedKVCache, "decode"), (pa.BatchPrefillWithPagedKVCache, "prefill")):
    bad(
        f"{name} plan: capacity 0",
        lambda w, kind=kind: kind(max_batch_size=0),
        ValueError,
        "max_batch_size is 0",
        "[1, ",
        "at least 1",
    )
    bad(
        f"{name} plan: float capacity",
        lambda w, kind=kind: kind(max_pages=1e6),
        TypeError,
        "max_pages must be an int",
        "1000000.0 (float)",
        "pass an int",
    )
    bad(
        f"{name} plan: run before plan",
        lambda w, kind=kind: kind().run(w.q, w.kv),
        RuntimeError,
        "run()",
        "before plan()",
        "call plan(kv, table, ...)",
    )
bad(
    "plan: heads",
    lambda w: w.decode.plan(w.kv, w.table, 3),
    ValueError,
    "3 heads, which is not a multiple of num_kv_heads=2",
    "num_qo_heads=3",
    "2, 4, 6, ... heads",
)
for name, value in (
    ("num_qo_heads", np.array([8, 8])),
    ("num_qo_heads", np.array([4])),
    ("num_qo_heads", jnp.array([4, 4])),
    ("q_len", np.array([1, 1])),
    ("sm_scale", np.ones(4, np.float32)),
    ("window_left", np.array([-1, -1])),
    ("logits_soft_cap", np.zeros(2)),
):
    bad(
        f"plan: {name} of shape {value.shape} ({type(value).__module__.partition('.')[0]})",
        lambda w, name=name, value=value: w.decode.plan(
            **{"kv": w.kv, "table": w.table, "num_qo_heads": 4, name: value}
        ),
        TypeError,
        f"{name} must be a",
        f"got an array of shape {value.shape}",
        "pass a",
    )
bad(
    "plan: causal of an array",
    lambda w: w.prefill.plan(w.kv, w.table, w.qo_indptr, 4, causal=np.ones(2, bool)),
    TypeError,
    "causal must be a bool",
    "array",
    "pass True or False",
)
bad(
    "plan: batch_invariant",
    lambda w: pa.BatchDecodeWithPagedKVCache(batch_invariant="no"),
    TypeError,
    "batch_invariant must be a bool",
    "'no' (str)",
    "pass True or False",
)
bad("plan: no heads", lambda w: w.decode.plan(w.kv, w.table, 0), ValueError, "num_qo_heads is 0", "[1, ", "at least 1")
bad(
    "plan: float heads",
    lambda w: w.decode.plan(w.kv, w.table, 4.0),
    TypeError,
    "num_qo_heads",
    "4.0 (float)",
    "pass an int",
)
bad("plan: q_len", lambda w: w.decode.plan(w.kv, w.table, 4, q_len=0), ValueError, "q_len is 0", "[1, ", "at least 1")
bad(
    "plan: layout",
    lambda w: w.decode.plan(w.kv_mistagged, w.table, 4),
    pa.LayoutMismatchError,
    "kv is tagged NHD",
    "the table has page_size=4",
    "tag the pool layout='HND'",
)
bad(
    "plan: qo_indptr",
    lambda w: w.prefill.plan(w.kv, w.table, int32(0, 3, 1), 4),
    pa.PageTableError,
    "qo_indptr[2] = 1 is less than qo_indptr[1] = 3",
    "request 1",
    "correct qo_indptr[2]",
)
bad(
    "plan: batch over capacity",
    lambda w: w.small_decode.plan(w.kv, w.table, 4),
    pa.PageTableError,
    "max_batch_size",
    "2",
    "larger max_batch_size",
)
bad(
    "plan: pages over capacity",
    lambda w: w.few_pages.plan(w.kv, w.table, 4),
    pa.PageTableError,
    "max_pages",
    "3",
    "larger max_pages",
)
bad(
    "plan: tokens over capacity",
    lambda w: w.small_prefill.plan(w.kv, w.table, w.qo_indptr, 4),
    pa.PageTableError,
    "max_tokens",
    "5",
    "larger max_tokens",
)
bad(
    "run: layout",
    lambda w: w.decode.run(w.q, w.kv_hnd),
    pa.LayoutMismatchError,
    "kv has layout HND",
    "the plan was made for NHD",
    "pass kv.to_layout('NHD') or plan with this kv",
)
bad(
    "run: layout, the shape fits under the other tag",
    lambda w: w.decode.run(w.q, pa.PagedKV(w.k_pages, w.v_pages, layout="HND")),
    pa.LayoutMismatchError,
    "kv has layout HND",
    "the plan was made for NHD",
    "the shape fits layout NHD: if the pool was written so, tag the pool layout='NHD'; if it was written as HND, plan "
    "with this kv",
)
bad(
    "run: shape under the tag",
    lambda w: w.prefill.run(w.q_prefill, w.kv_mistagged),
    pa.LayoutMismatchError,
    "kv is tagged NHD",
    "page_size=2 and num_kv_heads=4, but the plan was made for 4 and 2",
    "tag the pool layout='HND' and pass kv.to_layout('NHD'); if it was written as NHD, plan with this kv and a table "
    "of page_size=2",
)


def other_pool(w: World, *shape: int, dtype: Any = np.float16) -> pa.PagedKV:
    return pa.PagedKV(w.normal(*shape, dtype=dtype), w.normal(*shape, dtype=dtype), layout="NHD")


bad(
    "run: page_size",
    lambda w: w.decode.run(w.q, other_pool(w, NUM_PAGES, 8, 2, 16)),
    pa.LayoutMismatchError,
    "kv has page_size=8",
    "page_size=4",
    "plan with this kv",
)
bad(
    "run: KV heads",
    lambda w: w.decode.run(w.q, other_pool(w, NUM_PAGES, 4, 1, 16)),
    pa.LayoutMismatchError,
    "kv has num_kv_heads=1",
    "num_kv_heads=2",
    "plan with this kv",
)
bad(
    "run: head_dim",
    lambda w: w.decode.run(w.q, other_pool(w, NUM_PAGES, 4, 2, 32)),
    ValueError,
    "kv has head_dim=32",
    "16",
    "plan with this kv",
)
bad(
    "run: fewer pages",
    lambda w: w.decode.run(w.q, other_pool(w, 5, 4, 2, 16)),
    ValueError,
    "kv has num_pages=5",
    "at least 6",
    "plan with this kv",
)
bad(
    "run: dtype of kv",
    lambda w: w.decode.run(w.q, other_pool(w, 6, 4, 2, 16, dtype=np.float32)),
    TypeError,
    "kv is float32",
    "float16",
    "plan with this kv",
)
bad(
    "run: rows of q",
    lambda w: w.decode.run(w.q[:1], w.kv),
    ValueError,
    "q must have shape [2, 4, 16]",
    "q.shape=(1, 4, 16)",
    "plan anew",
)
bad(
    "run: q_len",
    lambda w: w.decode.run(w.q_four, w.kv),
    ValueError,
    "q must have shape [2, 4, 16] or [2, 1, 4, 16]",
    "q.shape=(2, 3, 4, 16)",
    "plan anew",
)
bad(
    "run: rows of a ragged q",
    lambda w: w.prefill.run(w.q, w.kv),
    ValueError,
    "q must have shape [5, 4, 16]",
    "q.shape=(2, 4, 16)",
    "plan anew",
)
bad(
    "run: dtype of lse", lambda w: w.decode.run(w.q, w.kv, lse=w.out[..., 0]), TypeError, "lse", "float16", "np.float32"
)

bad(
    "run: a layer of another v_head_dim",
    lambda w: w.decode.run(w.q, pa.PagedKV(w.k_pages, w.normal(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, 32), layout="NHD")),
    ValueError,
    "kv has v_head_dim=32 (v_pages.shape=(6, 4, 2, 32)",
    "the plan is for 16",
    "plan with this kv",
)
bad(
    "append: v of another v_head_dim",
    lambda w: pa.append(w.kv, w.slots, w.k, w.normal(3, NUM_KV_HEADS, 32)),
    ValueError,
    "v must have shape [3, 2, 16], [tokens, num_kv_heads, v_head_dim]",
    "v.shape=(3, 2, 32)",
    "reshape or slice v",
)
bad(
    "pool: v_head_dim 0",
    lambda w: pa.PagedKV(w.k_pages, w.v_pages[..., :0], layout="NHD"),
    ValueError,
    "v_pages has an empty axis",
    "(6, 4, 2, 0)",
    "at least 1",
)
bad("cache: v_head_dim 0", lambda w: w.make_cache(v_head_dim=0), ValueError, "v_head_dim is 0", "[1, ", "at least 1")

# -- questions -------------------------------------------------------------------------------------------------------

bad("supports: op", lambda w: pa.supports("fly"), ValueError, "op is 'fly'", "decode, prefill", "pass one of them")
bad(
    "supports: ops",
    lambda w: pa.supports(np.zeros(2)),
    ValueError,
    "op is array",
    "decode, prefill",
    "pass one of them",
)
bad("device: an array", lambda w: w.make_cache(device=np.zeros(2)), ValueError, "device must be 'cpu'", "pass None")
bad("layout: an array", lambda w: w.make_cache(layout=np.zeros(2)), ValueError, "layout must be 'NHD'", "pass the one")
bad("decode: scale without end", attend(sm_scale=10**400), TypeError, "sm_scale must be a float", "pass a float")
bad("decode: scale of bytes", attend(sm_scale=b"1"), TypeError, "sm_scale must be a float", "got b'1' (bytes)")
bad(
    "cache: layer of many",
    lambda w: w.cache.write(w.slots, w.k, w.v, layer=np.arange(2)),
    TypeError,
    "layer must be an",
)
for name, value, error, rule in (
    ("head_dim", "x", TypeError, "head_dim must be an int"),
    ("head_dim", 0, ValueError, "head_dim is 0"),
    ("head_dim", 64.0, TypeError, "head_dim must be an int"),
    ("page_size", -1, ValueError, "page_size is -1"),
    ("num_kv_heads", [8], TypeError, "num_kv_heads must be an int"),
    ("dtype", "flaot16", TypeError, "dtype must be one of"),
    ("layout", "NDH", ValueError, "layout must be"),
    ("device", "tpu", ValueError, "device must be"),
):
    bad(
        f"supports: {name}={value!r}",
        lambda w, name=name, value=value: pa.supports(**{name: value}),
        error,
        rule,
        str(value),
        "pass " if name != "dtype" else "(a name or a NumPy dtype)",
    )
bad("status: device", lambda w: pa.status("tpu"), ValueError, "device must be 'cpu', 'cuda'", "'tpu'", "pass None")

# -- the cache -------------------------------------------------------------------------------------------------------

bad("cache: layout", lambda w: w.make_cache(layout="DHN"), ValueError, "layout", "'DHN'", "'NHD'")
bad("cache: dtype", lambda w: w.make_cache(dtype="int8"), TypeError, "dtype must be one of float16", "'int8'", "a name")
bad("cache: no pages", lambda w: w.make_cache(num_pages=0), ValueError, "num_pages is 0", "[1, ", "at least 1")
bad(
    "cache: float page_size",
    lambda w: w.make_cache(page_size=4.0),
    TypeError,
    "page_size",
    "4.0 (float)",
    "pass an int",
)
bad("cache: no layers", lambda w: w.make_cache(num_layers=0), ValueError, "num_layers is 0", "[1, ", "at least 1")
bad(
    "cache: negative pages",
    lambda w: w.make_cache(num_pages=-1),
    ValueError,
    "num_pages is -1",
    "[1, ",
    "at least 1",
)
bad(
    "cache: device",
    lambda w: w.make_cache(device="tpu"),
    ValueError,
    "device must be 'cpu', 'cuda'",
    "'tpu'",
    "pass None",
)
for name, use in {
    "seq_len": lambda w: w.cache.seq_len(w.freed),
    "fork": lambda w: w.cache.fork(w.freed),
    "truncate": lambda w: w.cache.truncate(w.freed, 0),
    "free": lambda w: w.cache.free(w.freed),
    "reserve": lambda w: w.cache.reserve([w.a, w.freed], [1, 1]),
    "append": lambda w: w.cache.append([w.a, w.freed], [2, 1], w.k, w.v),
    "page_table": lambda w: w.cache.page_table([w.freed]),
}.items():
    bad(f"cache: {name} of a freed sequence", use, ValueError, "seq", "{freed}, which is no sequence", "pass an id")
for name, use in {
    "reserve": lambda w: w.cache.reserve([w.a, w.b, w.a], [1, 1, 1]),
    "append": lambda w: w.cache.append([w.a, w.b, w.a], [1, 1, 1], w.k, w.v),
    "page_table": lambda w: w.cache.page_table([w.a, w.b, w.a]),
}.items():
    bad(
        f"cache: {name} with a sequence twice", use, ValueError, "seqs", "sequence {a} more than once", "remove the rep"
    )
bad("cache: float seqs", lambda w: w.cache.page_table([0.0]), TypeError, "seqs must hold ints", "float64", "pass ints")
bad(
    "cache: rank of seqs",
    lambda w: w.cache.page_table([[w.a]]),
    ValueError,
    "seqs must be 1-D",
    "(1, 1)",
    "list of ints",
)
bad("cache: one seq", lambda w: w.cache.page_table(w.a), ValueError, "seqs must be 1-D", "()", "[{a}]")
bad("cache: negative seq", lambda w: w.cache.page_table([-1]), ValueError, "seqs[0] is -1", "no sequence", "pass an id")
bad("cache: float seq", lambda w: w.cache.free(1.0), TypeError, "seq must be an int", "1.0 (float)", "pass an int")
bad(
    "cache: negative count",
    lambda w: w.cache.reserve([w.a], [-1]),
    ValueError,
    "counts[0] = -1",
    "negative",
    "0 or more",
)
bad(
    "cache: float counts",
    lambda w: w.cache.reserve([w.a], [1.0]),
    TypeError,
    "counts must hold ints",
    "float64",
    "pass ints",
)
bad(
    "cache: number of counts",
    lambda w: w.cache.reserve([w.a, w.b], [1]),
    ValueError,
    "counts has 1 entries",
    "2 sequences",
    "pass one count for each",
)
for name, use in {
    "reserve": lambda w: w.cache.reserve([w.a, w.b], [8, 8]),
    "append": lambda w: w.cache.append([w.a, w.b], [8, 8], w.normal(16, 2, 16), w.normal(16, 2, 16)),
}.items():
    bad(f"cache: {name} in a full pool", use, pa.OutOfPagesError, "wants 4 pages", "3 are free", "free or truncate")
bad(
    "cache: truncate past the end",
    lambda w: w.cache.truncate(w.a, 6),
    ValueError,
    "length is 6",
    "5 tokens",
    "at most 5",
)
bad("cache: negative length", lambda w: w.cache.truncate(w.a, -1), ValueError, "length is -1", "[0, ", "at least 0")
bad("cache: fork past the end", lambda w: w.cache.fork(w.a, 6), ValueError, "length is 6", "5 tokens", "at most 5")
bad(
    "cache: layer",
    lambda w: w.layered.write(w.slots, w.k, w.v, layer=2),
    ValueError,
    "layer is 2",
    "num_layers=2",
    "pass an int in [0, 2)",
)
bad(
    "cache: int16 slots",
    lambda w: w.cache.write(w.slots.astype(np.int16), w.k, w.v),
    TypeError,
    "slots must be int64 or int32",
    "got int16",
    "slots.astype(np.int64)",
)
bad(
    "cache: append to many layers",
    lambda w: w.layered.append([w.c], [3], w.k, w.v),
    ValueError,
    "append()",
    "num_layers=2",
    "call reserve(seqs, counts) once and write",
)
bad(
    "cache: append of another number of tokens",
    lambda w: w.cache.append([w.a], [2], w.k, w.v),
    ValueError,
    "k must have shape [2, 2, 16]",
    "k.shape=(3, 2, 16)",
    "reshape or slice k",
)
bad(
    "cache: append of another dtype",
    lambda w: w.cache.append([w.a], [3], w.k, w.v.astype(np.float32)),
    TypeError,
    "v must be float16",
    "got float32",
    "v.astype(np.float16)",
)
bad(
    "cache: rows of out",
    lambda w: w.cache.page_table([w.a, w.b], out=pa.PageTable.empty(1, 9, page_size=4, device=w.device)),
    pa.PageTableError,
    "seqs has 2 sequences",
    "max_batch_size=1",
    "larger max_batch_size",
)
bad(
    "cache: pages of out",
    lambda w: w.cache.page_table([w.a, w.b], out=pa.PageTable.empty(2, 2, page_size=4, device=w.device)),
    pa.PageTableError,
    "seqs has 3 pages",
    "max_pages=2",
    "larger max_pages",
)
bad(
    "cache: page_size of out",
    lambda w: w.cache.page_table([w.a], out=pa.PageTable.empty(2, 9, page_size=8, device=w.device)),
    ValueError,
    "out has page_size=8",
    "the cache has 4 and 1",
    "make out with PageTable.empty(..., page_size=4, device=",
)
bad(
    "cache: out without positions",
    lambda w: w.make_cache(num_ranks=2).page_table([], out=pa.PageTable.empty(2, 9, page_size=4, device=w.device)),
    ValueError,
    "out has no positions",
    "num_ranks=2",
    "make out with PageTable.empty(..., page_size=4, device=",
    "positions=True, page_stride=2)",
)
bad("cache: rank", lambda w: w.make_cache(rank=2, num_ranks=2), ValueError, "rank is 2", "num_ranks=2", "in [0, 2)")
bad("cache: no ranks", lambda w: w.make_cache(num_ranks=0), ValueError, "num_ranks is 0", "[1, ", "at least 1")


# -- memory that is written while it is read -------------------------------------------------------------------------


def reshaped(array: Any, shape: tuple[int, ...], dtype: Any = np.float16, shift: int = 0) -> Any:
    """An array of `shape` over the memory of another one, from its byte `shift` on."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return array.reshape(-1).view(np.uint8)[shift : shift + size].view(dtype).reshape(shape)


def overlapping(name: str, call: Callable[[World], Any], first: str, second: str, remedy: str = "memory of ") -> None:
    bad(f"overlap: {name}", call, ValueError, f"{first} overlaps {second} in memory", "in use", remedy)


Q, LSE, TOKENS = (2, NUM_QO_HEADS, HEAD_DIM), (2, NUM_QO_HEADS), (3, NUM_KV_HEADS, HEAD_DIM)
overlapping("decode, out = q", attend(out=lambda w: w.q), "out", "q")
overlapping(
    "decode, out behind the beginning of q",
    lambda w: pa.decode(w.q_prefill[:2], w.kv, w.table, out=w.q_prefill[1:3]),
    "out",
    "q",
)
overlapping("decode, out over K", attend(out=lambda w: reshaped(w.k_pages, Q, shift=512)), "out", "kv.k_pages")
overlapping("decode, out over V", attend(out=lambda w: reshaped(w.v_pages, Q)), "out", "kv.v_pages")
overlapping("decode, lse over q", attend(lse=lambda w: reshaped(w.q, LSE, np.float32, 32)), "lse", "q")
overlapping("decode, lse over K", attend(lse=lambda w: reshaped(w.k_pages, LSE, np.float32)), "lse", "kv.k_pages")
overlapping("decode, lse over V", attend(lse=lambda w: reshaped(w.v_pages, LSE, np.float32)), "lse", "kv.v_pages")
overlapping(
    "decode, lse over out",
    attend(out=lambda w: w.out, lse=lambda w: reshaped(w.out, LSE, np.float32, 64)),
    "out",
    "lse",
)
overlapping(
    "prefill, out = q", lambda w: pa.prefill(w.q_prefill, w.qo_indptr, w.kv, w.table, out=w.q_prefill), "out", "q"
)
overlapping(
    "decode, lse over sinks",
    lambda w: pa.decode(w.q, w.kv, w.table, lse=w.lse, sinks=w.lse[0]),
    "lse",
    "sinks",
)
overlapping("run, out = q", lambda w: w.decode.run(w.q, w.kv, out=w.q), "out", "q")
overlapping(
    "run of prefill, lse over V",
    lambda w: w.prefill.run(w.q_prefill, w.kv, lse=reshaped(w.v_pages, (5, NUM_QO_HEADS), np.float32)),
    "lse",
    "kv.v_pages",
)
overlapping(
    "single_decode, out = q",
    lambda w: pa.single_decode(w.q[0], w.k_one, w.v_one, layout="NHD", out=w.q[0]),
    "out",
    "q",
)
overlapping(
    "single_prefill, out over v",
    lambda w: pa.single_prefill(w.q, w.k_one, w.v_one, layout="NHD", out=reshaped(w.v_one, Q)),
    "out",
    "kv.v_pages",
)
overlapping(
    "append, k of the pool", lambda w: pa.append(w.kv, w.slots, w.k_pages[0, 1:], w.v), "k", "kv.k_pages", "k.copy()"
)
overlapping(
    "append, v of the pool's K",
    lambda w: pa.append(w.kv, w.slots, w.k, reshaped(w.k_pages, TOKENS, shift=32)),
    "v",
    "kv.k_pages",
    "v.copy()",
)


def append_slots_of_the_pool(w: World) -> None:
    pool = w.xp.zeros_like(w.k_pages)
    pa.append(pa.PagedKV(w.k_pages.copy(), pool, layout="NHD"), reshaped(pool, (3,), np.int64), w.k, w.v)


overlapping("append, slots in the pool", append_slots_of_the_pool, "slots", "kv.v_pages", "slots.copy()")
overlapping(
    "cache, append of its own pages",
    lambda w: w.cache.append([w.a], [3], w.cache.layers[0].k_pages[0, :3], w.v),
    "k",
    "kv.k_pages",
    "k.copy()",
)


def whole_states(w: World) -> dict[str, Any]:
    """Contiguous states, which out and lse may be."""
    return {name: array.copy() for name, array in two_states(w).items()}


def merge_over(written: str, over: str, shape: tuple[int, ...], dtype: Any, shift: int = 0) -> Callable[[World], Any]:
    def call(w: World) -> Any:
        states = whole_states(w)
        return pa.merge_state(**states, **{written: reshaped(states[over], shape, dtype, shift)})

    return call


def merge_into_a_part(w: World, out: int) -> Any:
    memory = w.normal(4, NUM_QO_HEADS, HEAD_DIM)
    return pa.merge_state(**(whole_states(w) | {"v_a": memory[:3]}), out=memory[out : out + 3])


overlapping("merge_state, out over v_b", merge_over("out", "v_b", (3, 4, 16), np.float16), "out", "v_b")
overlapping("merge_state, lse over s_b", merge_over("lse", "s_b", (3, 4), np.float32), "lse", "s_b")
overlapping("merge_state, lse over v_a", merge_over("lse", "v_a", (3, 4), np.float32, 32), "lse", "v_a")
overlapping("merge_state, out behind the beginning of v_a", lambda w: merge_into_a_part(w, 1), "out", "v_a")
overlapping(
    "merge_state, out over lse",
    lambda w: pa.merge_state(**whole_states(w), out=w.states[0, :3], lse=reshaped(w.states[0], (3, 4), np.float32)),
    "out",
    "lse",
)


def merge_into_wider(w: World) -> Any:
    out = w.normal(3, 4, 16, dtype=np.float32)
    return pa.merge_state(**(whole_states(w) | {"v_a": reshaped(out, (3, 4, 16))}), out=out)


overlapping("merge_state, a float32 out over v_a", merge_into_wider, "out", "v_a")
overlapping("merge_states, out over v", merge_many(out=lambda w: w.states.reshape(12, 4, 16)[1:4]), "out", "v")
overlapping("merge_states, lse over s", merge_many(lse=lambda w: w.logs.reshape(12, 4)[:3]), "lse", "s")
overlapping(
    "merge_states, lse over out",
    merge_many(
        out=lambda w: reshaped(w.q_prefill, (3, 4, 16)), lse=lambda w: reshaped(w.q_prefill, (3, 4), np.float32)
    ),
    "out",
    "lse",
)


def split_over(w: World, **changed: Any) -> Any:
    """split of a table on the world's device into an `out` that takes some arrays from elsewhere."""
    table = pa.PageTable(*map(w.xp.asarray, (w.indptr, w.indices, w.last_page_len)), page_size=PAGE_SIZE)
    out = {"indptr": w.xp.zeros(5, np.int32), "indices": w.xp.zeros(3, np.int32)}
    out |= {name: w.xp.zeros(4, np.int32) for name in ("last_page_len", "page_offset", "total_len")}
    out |= {name: f(table, out) for name, f in changed.items()}
    return table.split(2, out=pa.PageTable(**out, page_size=PAGE_SIZE))


overlapping(
    "split, indices of the table",
    lambda w: split_over(w, indices=lambda table, out: table.indices),
    "out.indices",
    "the table's indices",
)
overlapping(
    "split, two arrays of out",
    lambda w: split_over(w, total_len=lambda table, out: out["page_offset"]),
    "out.page_offset",
    "out.total_len",
)
overlapping(
    "split, indptr over last_page_len",
    lambda w: split_over(w, last_page_len=lambda table, out: out["indptr"][1:]),
    "out.indptr",
    "out.last_page_len",
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(xp, case: Bad) -> None:
    w = World(xp)
    before = w.state()
    with pytest.MonkeyPatch.context() as patch:
        forbid_launches(patch, w.device)
        if xp is not np:  # tables of NumPy arrays are served by the reference backend, whatever kv lives on
            forbid_launches(patch, "cpu")
        with pytest.raises(KINDS) as raised:
            case.call(w)
    assert type(raised.value) is case.error, raised.value
    for part in case.says:
        wanted = re.sub(r"\{(\w+)\}", lambda name: str(getattr(w, name[1])), part)
        assert wanted in str(raised.value), str(raised.value)
    assert w.state() == before


def test_memory_that_is_not_shared_is_not_refused(xp) -> None:
    """Slices of one array, interleaved K and V, heads by turns; and a merge into its first state."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return xp.asarray(rng.standard_normal(shape).astype(np.float16))

    def host(array: Any) -> np.ndarray:
        return array if xp is np else array.get()

    qkv, memory = normal(9, 8, 16), normal(4, 4, 16)  # heads 0-3 are q, 4-5 k, 6-7 v
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    whole = pa.single_prefill(q, k, v, layout="NHD")
    out, lse = xp.empty((9, 4, 16), np.float16), xp.empty((9, 4), np.float32)
    pa.single_prefill(q, k, v, layout="NHD", out=out, lse=lse)
    np.testing.assert_array_equal(host(out), host(whole))
    # out and lse behind q, in one array with it; then in the gap that q leaves between its rows.
    memory[:1] = qkv[:1, :4]
    pa.single_decode(memory[0], k, v, layout="NHD", out=memory[1], lse=reshaped(memory[2], (4,), np.float32))
    one = pa.single_decode(q[0], k, v, layout="NHD")
    np.testing.assert_array_equal(host(memory[1]), host(one))
    kv = pa.PagedKV(k[None], v[None], layout="NHD")
    table = pa.PageTable(int32(0, 1), int32(0), int32(9), page_size=9)
    wide = normal(4, 80)
    wide[:, :16] = qkv[0, :4]
    pa.decode(wide[None, :, :16], kv, table, out=reshaped(wide[1, 16:80], (1, 4, 16)))
    np.testing.assert_array_equal(host(wide[1, 16:80]).reshape(4, 16), host(one))
    # K and V interleaved, new tokens between a token's K and V of another layer: [page, slot, layer and K or V, ...]
    pool = normal(3, 4, 6, 2, 16)
    before = host(pool).copy()
    layer = pa.PagedKV(pool[:, :, 0], pool[:, :, 1], layout="NHD")
    pa.append(layer, xp.asarray(np.array([11, 0])), pool[0, :2, 4], pool[1, :2, 5])
    np.testing.assert_array_equal(host(pool)[[2, 0], [3, 0], 0], before[0, :2, 4])
    np.testing.assert_array_equal(host(pool)[[2, 0], [3, 0], 1], before[1, :2, 5])
    pa.PagedKV.combined(normal(3, 2, 4, 2, 16), layout="NHD")
    v_a, v_b = normal(2, 3, 4, 16)
    s_a, s_b = xp.asarray(rng.standard_normal((2, 3, 4)).astype(np.float32))
    merged, log = pa.merge_state(v_a, s_a, v_b, s_b)
    pa.merge_state(v_a, s_a, v_b, s_b, out=v_a, lse=s_a)
    np.testing.assert_array_equal(host(v_a), host(merged))
    np.testing.assert_array_equal(host(s_a), host(log))


def test_overlap_is_exact_on_the_host_and_by_addresses() -> None:
    """Random views of one buffer, as NumPy arrays and as arrays that look like a GPU's, against sets of bytes."""
    rng = np.random.default_rng(0)
    memory = np.zeros(1000, np.uint8)
    found = []
    for _ in range(2000):
        views = []
        for _ in "ab":
            dtype = np.dtype(rng.choice(["u1", "f2", "f4"]))
            shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 4, 3))
            strides = tuple(int(n) * dtype.itemsize for n in rng.integers(-2, 12, 3))
            low = sum(max(n - 1, 0) * min(stride, 0) for n, stride in zip(shape, strides, strict=True))
            offset = int(rng.integers(0, 60)) - low
            views.append(np.ndarray(shape, dtype, memory, offset, strides))
        bytes_of = [
            {
                view.ctypes.data + sum(i * s for i, s in zip(index, view.strides, strict=True)) + byte
                for index in np.ndindex(view.shape)
                for byte in range(view.itemsize)
            }
            for view in views
        ]
        shared = bool(bytes_of[0] & bytes_of[1])
        on_gpu = [FakeGpuArray(view, view.ctypes.data) for view in views]
        assert overlaps.overlap(*views) == overlaps.overlap(*on_gpu) == shared
        assert not overlaps.overlap(views[0], on_gpu[1])
        found.append(shared)
    assert 0.1 < np.mean(found) < 0.9


# -- two devices -----------------------------------------------------------------------------------------------------


class FakeGpuArray:
    """What the checks read of a CuPy array, on a machine that has none."""

    def __init__(self, array: np.ndarray, address: int) -> None:
        self._array, self._address = array, address
        self.shape, self.strides, self.ndim = array.shape, array.strides, array.ndim
        self.dtype, self.size = array.dtype, array.size
        self.flags = SimpleNamespace(c_contiguous=array.flags.c_contiguous)
        self.device, self.data = SimpleNamespace(id=0), SimpleNamespace(ptr=address, device_id=0)

    def __getitem__(self, index: None) -> "FakeGpuArray":
        return FakeGpuArray(self._array[index], self._address)


class TwoDevices:
    """Good arguments on the host; `gpu` makes arrays on a GPU, real or only looking so."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.places = itertools.count(1)  # of arrays that only look like a GPU's
        self.host = World(np)
        self.kv = pa.PagedKV(self.gpu(6, 4, 2, 16), self.gpu(6, 4, 2, 16), layout="NHD")
        self.q = self.gpu(2, 4, 16)

    def gpu(self, *shape: int, dtype: Any = np.float16, padding: int = 0, shift: float = 0) -> Any:
        """Zeros on the GPU, `shift` elements into a buffer and with `padding` elements behind each last axis."""
        *leading, last = shape
        count = int(np.prod(leading, dtype=int)) * (last + padding)
        itemsize = np.dtype(dtype).itemsize
        skipped = int(shift * itemsize)
        flat = (np if self.xp is None else self.xp).zeros(count * itemsize + skipped, np.uint8)
        array = flat[skipped:].view(dtype).reshape(*leading, last + padding)[..., :last]
        return FakeGpuArray(array, 4096 * next(self.places) + skipped) if self.xp is None else array

    def table(self) -> pa.PageTable:
        return pa.PageTable(*(self.gpu(n, dtype=np.int32) for n in (3, 3, 2)), page_size=4)


TWO_DEVICES: dict[str, tuple[Callable[[TwoDevices], Any], type[Exception], tuple[str, ...]]] = {
    "pool": (
        lambda w: pa.PagedKV(w.host.k_pages, w.gpu(6, 4, 2, 16), layout="NHD"),
        TypeError,
        ("v_pages lives on cuda:0 and k_pages on cpu", "pass cupy.asnumpy(v_pages)"),
    ),
    "table": (
        lambda w: pa.PageTable(w.host.indptr, w.gpu(3, dtype=np.int32), w.host.last_page_len, page_size=4),
        TypeError,
        ("indices lives on cuda:0 and indptr on cpu", "pass cupy.asnumpy(indices)"),
    ),
    "block table": (
        lambda w: pa.PageTable.from_block_table(np.zeros((2, 3), np.int32), w.gpu(2, dtype=np.int32), page_size=4),
        TypeError,
        ("seq_lens lives on cuda:0 and block_table on cpu", "pass cupy.asnumpy(seq_lens)"),
    ),
    "slots of a table": (
        lambda w: w.host.table.slots(w.gpu(2, dtype=np.int32), int32(0, 0)),
        TypeError,
        ("batch_indices lives on cuda:0 and the table on cpu", "must be a NumPy array"),
    ),
    "split": (
        lambda w: w.host.table.split(
            2, out=pa.PageTable(*(w.gpu(n, dtype=np.int32) for n in (5, 3, 4)), page_size=4, **w_positions(w))
        ),
        TypeError,
        ("out lives on cuda:0 and the table on cpu", "pass the table that split("),
    ),
    "q on the host": (
        lambda w: pa.decode(w.host.q, w.kv, w.host.table),
        TypeError,
        ("q lives on cpu and kv on cuda:0", "pass cupy.asarray(q)"),
    ),
    "kv on the host": (
        lambda w: pa.decode(w.q, w.host.kv, w.host.table),
        TypeError,
        ("q lives on cuda:0 and kv on cpu", "pass cupy.asnumpy(q)"),
    ),
    "table on the GPU only": (
        lambda w: pa.decode(w.host.q, w.host.kv, w.table()),
        TypeError,
        ("table lives on cuda:0 and kv on cpu", "make it from arrays there"),
    ),
    "qo_indptr on the GPU only": (
        lambda w: pa.prefill(w.host.q_prefill, w.gpu(3, dtype=np.int32), w.host.kv, w.host.table),
        TypeError,
        ("qo_indptr lives on cuda:0 and kv on cpu", "pass cupy.asnumpy(qo_indptr)"),
    ),
    "out on the host": (
        lambda w: pa.decode(w.q, w.kv, w.host.table, out=w.host.out),
        TypeError,
        ("out lives on cpu and q on cuda:0", "pass cupy.asarray(out)"),
    ),
    "lse on the host": (
        lambda w: pa.decode(w.q, w.kv, w.host.table, lse=w.host.lse),
        TypeError,
        ("lse lives on cpu and q on cuda:0", "pass cupy.asarray(lse)"),
    ),
    "sinks on the host": (
        lambda w: pa.decode(w.q, w.kv, w.host.table, sinks=w.host.lse[0]),
        TypeError,
        ("sinks lives on cpu and q on cuda:0", "pass cupy.asarray(sinks)"),
    ),
    "kv of a run": (
        lambda w: w.host.decode.run(w.host.q, w.kv),
        TypeError,
        ("kv lives on cuda:0", "the plan was made for cpu", "plan with this kv"),
    ),
    "k on the host": (
        lambda w: pa.append(w.kv, w.host.slots, w.host.k, w.host.v),
        TypeError,
        ("k lives on cpu and kv on cuda:0", "pass cupy.asarray(k)"),
    ),
    "slots on the GPU only": (
        lambda w: pa.append(w.host.kv, w.gpu(3, dtype=np.int64), w.host.k, w.host.v),
        TypeError,
        ("slots lives on cuda:0 and kv on cpu", "pass cupy.asnumpy(slots)"),
    ),
    "single_decode": (
        lambda w: pa.single_decode(w.gpu(4, 16), w.host.k_one, w.host.v_one, layout="NHD"),
        TypeError,
        ("q lives on cuda:0 and kv on cpu", "pass cupy.asnumpy(q)"),
    ),
    "merge_state": (
        lambda w: pa.merge_state(**(two_states(w.host) | {"v_b": w.gpu(3, 4, 16)})),
        TypeError,
        ("v_b lives on cuda:0 and v_a on cpu", "pass cupy.asnumpy(v_b)"),
    ),
    "merge_states": (
        lambda w: pa.merge_states(w.gpu(3, 4, 4, 16), w.host.logs),
        TypeError,
        ("s lives on cpu and v on cuda:0", "pass cupy.asarray(s)"),
    ),
    "out of the cache's table": (
        lambda w: w.host.cache.page_table([w.host.a], out=w.table()),
        TypeError,
        ("out lives on cuda:0 and the cache on cpu", "device='cpu'"),
    ),
    "base of the pool": (
        lambda w: pa.PagedKV(w.gpu(6, 4, 2, 16, shift=4), w.gpu(6, 4, 2, 16), layout="NHD"),
        ValueError,
        ("k_pages begins at address 0x", "no multiple of 16 bytes", "pass a view that begins at a multiple of it"),
    ),
    "stride of the pool": (
        lambda w: pa.PagedKV(w.gpu(6, 4, 2, 16), w.gpu(6, 4, 2, 16, padding=4), layout="NHD"),
        ValueError,
        (
            "v_pages has a stride of 40 bytes along axis 2",
            "no multiple of 16",
            "multiples of 8 elements, or pass a copy",
        ),
    ),
    "base of q": (
        lambda w: pa.decode(w.gpu(2, 4, 16, shift=1), w.kv, w.host.table),
        ValueError,
        ("q begins at address 0x", "no multiple of 16 bytes", "or a copy"),
    ),
    "stride of q": (
        lambda w: pa.decode(w.gpu(2, 4, 16, padding=2), w.kv, w.host.table),
        ValueError,
        ("q has a stride of 36 bytes along axis 1", "no multiple of 16", "multiples of 8 elements, or pass a copy"),
    ),
    "base of out": (
        lambda w: pa.decode(w.q, w.kv, w.host.table, out=w.gpu(2, 4, 16, shift=3)),
        ValueError,
        ("out begins at address 0x", "no multiple of 16 bytes", "or a copy"),
    ),
    "base of lse": (
        lambda w: pa.decode(w.q, w.kv, w.host.table, lse=w.gpu(2, 4, dtype=np.float32, shift=0.5)),
        ValueError,
        ("lse begins at address 0x", "no multiple of 4 bytes", "or a copy"),
    ),
    "base of slots": (
        lambda w: pa.append(w.kv, w.gpu(3, dtype=np.int64, shift=0.5), w.gpu(3, 2, 16), w.gpu(3, 2, 16)),
        ValueError,
        ("slots begins at address 0x", "no multiple of 8 bytes", "or a copy"),
    ),
    "base of s": (
        lambda w: pa.merge_states(w.gpu(3, 4, 4, 16), w.gpu(3, 4, 4, dtype=np.float32, shift=0.25)),
        ValueError,
        ("s begins at address 0x", "no multiple of 4 bytes", "or a copy"),
    ),
    "stride of k": (
        lambda w: pa.append(w.kv, w.host.slots, w.gpu(3, 2, 16, padding=1), w.gpu(3, 2, 16)),
        ValueError,
        ("k has a stride of 68 bytes along axis 0", "no multiple of 16", "multiples of 8 elements, or pass a copy"),
    ),
}


def w_positions(w: TwoDevices) -> dict[str, Any]:
    return {name: w.gpu(4, dtype=np.int32) for name in ("page_offset", "total_len")}


@pytest.mark.parametrize("gpu", ["looks like a GPU", pytest.param("is a GPU", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", TWO_DEVICES)
def test_host_and_gpu_are_not_mixed(monkeypatch: pytest.MonkeyPatch, case: str, gpu: str) -> None:
    call, error, says = TWO_DEVICES[case]
    if gpu == "is a GPU":
        w = TwoDevices(pytest.importorskip("cupy"))
        forbid_launches(monkeypatch, "cuda")
    else:  # here a call that gets past the checks fails, because there is no CUDA backend to import
        monkeypatch.setattr(interop, "is_native", lambda x: isinstance(x, (np.ndarray, FakeGpuArray)))
        monkeypatch.setattr(support, "_check_compute_capability", lambda device: None)
        monkeypatch.setattr(plans, "current_stream", lambda device: (None, 0))
        w = TwoDevices(None)
    before = w.host.state()
    with pytest.MonkeyPatch.context() as patch:
        forbid_launches(patch, "cpu")
        with pytest.raises(KINDS) as raised:
            call(w)
    assert type(raised.value) is error, raised.value
    for part in says:
        assert part in str(raised.value)
    assert w.host.state() == before


# -- no errors -------------------------------------------------------------------------------------------------------


def test_an_empty_batch_is_no_error(xp) -> None:
    """Empty results, nothing launched."""
    w = World(xp)
    none = pa.PageTable(int32(0), int32(), int32(), page_size=PAGE_SIZE)
    q, tokens = w.q[:0], w.k[:0]
    with pytest.MonkeyPatch.context() as patch:
        forbid_launches(patch, w.device, ("append", "merge_state", "merge_states"))
        out, lse = pa.decode(q, w.kv, none, return_lse=True)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((0, 4, 16), np.float16, (0, 4), np.float32)
        assert pa.decode(w.q_four[:0], w.kv, none).shape == (0, 3, 4, 16)
        assert pa.prefill(q, int32(0), w.kv, none).shape == (0, 4, 16)
        assert pa.prefill(q, int32(0, 0, 0), w.kv, w.table).shape == (0, 4, 16)
        assert pa.single_prefill(q, w.k_one, w.v_one, layout="NHD").shape == (0, 4, 16)
        w.decode.plan(w.kv, none, NUM_QO_HEADS)
        assert w.decode.run(q, w.kv).shape == (0, 4, 16)
        w.prefill.plan(w.kv, none, int32(0), NUM_QO_HEADS)
        assert w.prefill.run(q, w.kv).shape == (0, 4, 16)
        pa.append(w.kv, w.slots[:0], tokens, tokens)
        merged, log = pa.merge_states(w.states[:0], w.logs[:0])
        assert (merged.shape, log.shape) == ((0, 4, 16), (0, 4))
        merged, log = pa.merge_state(**{name: array[:0] for name, array in two_states(w).items()})
        assert (merged.shape, log.shape) == ((0, 4, 16), (0, 4))
        assert w.cache.reserve([], []).shape == (0,)
        assert w.cache.page_table([]).batch_size == 0


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
