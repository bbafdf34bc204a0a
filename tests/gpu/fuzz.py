"""Corrupted tables, slots, positions and qo_indptr for every operation; test_fuzz.py runs this in a child process.

    python -m tests.gpu.fuzz --rounds 63 --seed 0

A round makes one corrupted input for every operation. Each must come to its end, within SLOWEST times what right inputs
take and a slice of time for each other process of the test run; leave the canaries around all arrays (the library's own
too) and the inputs as they were; give finite results; and name a culprit in a status word, exactly where the input
breaks a rule. A line of JSON is printed before every input and one at the end. The first thing that is wrong ends the
process: the last line says which input it was.
"""

import argparse
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cupy
import numpy as np

import paged_attn as pa
from paged_attn import compile as kernels
from paged_attn.backends import cuda as backend

HEADS, KV_HEADS = 4, 2
NUM_PAGES = 48
LONGEST = 6  # pages a request
CHUNKS = 3
WIDTH = 7  # of block tables
LIST_ENTRIES = 200  # of the cache's page lists
SPARE_REQUESTS = 2
TOP = 2**31 - 1
SLOWEST = 10
TIME_SLICE_MS = 5.0  # what each other process on the card may take of a run's time: the driver's slices are of 2 ms
WARM_UP = 7

Fault = tuple[str, int | None, int | None]  # field, index, value; None: any
Faults = set[Fault]


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """Host arrays by name, and for each the smallest value that is too large."""

    arrays: dict[str, np.ndarray]
    limits: dict[str, int]
    page_size: int
    page_stride: int
    layout: str
    q_len: int
    window_left: int
    head_dim: int
    rows: int  # of q, for prefill
    max_pages: int

    @property
    def batch(self) -> int:
        return self.arrays["last_page_len"].size

    def list(self, name: str) -> list[int]:
        """An array of one number a request; zeros where there is none."""
        return self.arrays[name].tolist() if name in self.arrays else [0] * self.batch


def right_input(random: np.random.Generator, head_dim: int) -> Given:
    """An input that breaks no rule; what stands behind the end of indices is impossible."""
    batch, page_size = int(random.integers(1, 7)), int(random.choice((1, 3, 16)))
    page_stride, tokens = int(random.choice((1, 3))), int(random.integers(1, 40))
    indptr = _cumulated(random.integers(0, LONGEST + 1, batch))
    qo_indptr = _cumulated(random.integers(0, 30, batch) + np.eye(1, batch, dtype=int)[0])
    used, num_slots = int(indptr[-1]), NUM_PAGES * page_size
    pages, longest = random.permutation(NUM_PAGES), WIDTH * page_size
    arrays = {
        "indptr": indptr,
        "indices": np.concatenate([pages[:used], [-9, TOP, NUM_PAGES]]),
        "last_page_len": random.integers(1, page_size + 1, batch),
        "qo_indptr": qo_indptr,
        "batch_indices": random.integers(0, batch, tokens),
        "positions": random.integers(0, LONGEST * page_stride * page_size, tokens),
        "block_table": random.integers(0, NUM_PAGES, (batch, WIDTH)),
        "seq_lens": random.integers(0, longest + 1, batch),
        "update_index": random.permutation(LIST_ENTRIES)[:tokens],
        "starts": random.integers(0, LIST_ENTRIES - LONGEST * page_stride, batch),
        "source": pages[:4],
        "target": pages[4:8],
    }
    if random.random() < 0.5:
        arrays |= {"page_offset": random.integers(0, 9, batch), "total_len": random.integers(0, 500, batch)}
    limits = {
        "indptr": used + 4,
        "last_page_len": page_size + 1,
        "qo_indptr": int(qo_indptr[-1]) + 1,
        "batch_indices": batch,
        "positions": TOP,
        "seq_lens": longest + 1,
        "update_index": LIST_ENTRIES,
        "starts": LIST_ENTRIES,
        "page_offset": TOP // page_size,
        "total_len": TOP,
        "slots": num_slots,
    }
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    slots = random.permutation(num_slots)[:tokens].astype(np.int64)
    arrays["slots"] = np.where(random.random(tokens) < 0.1, -1, slots)
    arrays["s"] = random.standard_normal((5, CHUNKS, HEADS)).astype(np.float32)
    return Given(
        arrays, limits, page_size, page_stride, str(random.choice(("NHD", "HND"))), int(random.choice((1, 3))),
        int(random.choice((-1, 5))), head_dim, int(qo_indptr[-1]), used + 1,
    )  # fmt: skip


def _cumulated(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def corrupted(random: np.random.Generator, given: Given, names: Sequence[str]) -> Given:
    """The input with one to three of the named arrays changed, in one entry, some or all."""
    names = [name for name in names if name in given.arrays]
    arrays = dict(given.arrays)
    for name in random.choice(names, min(len(names), int(random.integers(1, 4))), replace=False).tolist():
        array = arrays[name]
        while np.array_equal(array, given.arrays[name]):
            share = random.choice((0.0, 0.3, 1.0))
            changed = random.random(array.shape) < share
            changed.flat[random.integers(array.size)] = True
            noise = _noise(random, array, given.limits.get(name, NUM_PAGES))
            array = np.where(changed, noise, array).astype(array.dtype)
        arrays[name] = array
    return replace(given, arrays=arrays)


def _noise(random: np.random.Generator, array: np.ndarray, limit: int) -> np.ndarray:
    if array.dtype.kind == "f":
        return random.choice(np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 1e4], array.dtype), array.shape)
    top, shape = int(np.iinfo(array.dtype).max), array.shape
    choices: tuple[Callable[[], np.ndarray], ...] = (
        lambda: random.choice(np.array([-1, limit, min(limit + 1, top)], array.dtype), shape),  # just outside
        lambda: random.integers(-top - 1, 0, shape, array.dtype),  # negative
        lambda: random.choice(np.array([top, top // 2, -top - 1, 2**30, -top], array.dtype), shape),  # huge
        lambda: np.sort(random.integers(0, limit, shape, array.dtype), axis=None)[::-1].reshape(shape),  # decreasing
        lambda: random.integers(-3, min(2 * limit + 4, top), shape, array.dtype),
        lambda: random.integers(-top - 1, top, shape, array.dtype),
    )
    return choices[int(random.integers(len(choices)))]()


# -- the rules: which faults an input has ------------------------------------------------------------------------------


def ranges(indptr: np.ndarray, limit: int, name: str, faults: Faults) -> Iterator[tuple[int, int]]:
    """[begin, end) of each row, empty where it does not lie in [0, limit]. An entry is named by the row it ends."""
    for row, (begin, end) in enumerate(itertools.pairwise(indptr.tolist())):
        if not 0 <= begin <= limit:
            if row == 0:
                faults.add((name, 0, begin))
            yield 0, 0
        elif not begin <= end <= limit:
            faults.add((name, row + 1, end))
            yield 0, 0
        else:
            yield begin, end


def indptr_faults(given: Given) -> tuple[Faults, list[tuple[int, int]]]:
    faults: Faults = set()
    return faults, list(ranges(given.arrays["indptr"], given.arrays["indices"].size, "indptr", faults))


def table_faults(given: Given, max_pages: int = TOP) -> Faults:
    """The rules of a page table over a pool of NUM_PAGES pages."""
    faults, rows = indptr_faults(given)
    indices, page_size = given.arrays["indices"].tolist(), given.page_size
    lengths, offsets, totals = (given.list(name) for name in ("last_page_len", "page_offset", "total_len"))
    first = rows[0][0] if rows else 0  # capacity counts from there
    for row, (begin, end) in enumerate(rows):
        if offsets[row] < 0:
            faults.add(("page_offset", row, offsets[row]))
        if totals[row] < 0:
            faults.add(("total_len", row, totals[row]))
        if end - first > max_pages:
            faults.add(("max_pages", row, end - first))
            continue
        faults |= {("indices", i, indices[i]) for i in range(begin, end) if not 0 <= indices[i] < NUM_PAGES}
        if begin == end:
            continue
        if not 1 <= lengths[row] <= page_size:
            faults.add(("last_page_len", row, lengths[row]))
        # The position behind the last token; what is wrong in it counts as it stands, or cleaned.
        for offset in (offsets[row], max(offsets[row], 0)):
            for length in (lengths[row], min(max(lengths[row], 1), page_size)):
                last_page = min(offset + (end - begin - 1) * given.page_stride, TOP)
                if last_page * page_size + length > TOP:
                    faults.add(("page_offset" if "page_offset" in given.arrays else "indptr", row, None))
    return faults


def plan_faults(given: Given) -> Faults:
    return table_faults(given, given.max_pages)


def query_faults(given: Given, limit: int) -> Faults:
    indptr, faults = given.arrays["qo_indptr"], set[Fault]()
    if indptr[0] != 0:
        faults.add(("qo_indptr", 0, int(indptr[0])))
    list(ranges(indptr, limit, "qo_indptr", faults))
    return faults


def split_faults(given: Given) -> Faults:
    faults, rows = indptr_faults(given)
    if sum(end - begin for begin, end in rows) > given.arrays["indices"].size:
        faults.add(("max_pages", None, None))
    return faults


def partials_faults(given: Given) -> Faults:
    """Those of the split, and what the split table inherits: the rows have other numbers there."""
    inherited = {(name, None, None) for name, _, _ in table_faults(given)}
    overflows = any(value is None for _, _, value in table_faults(given))
    return split_faults(given) | inherited | ({("page_offset", None, None)} if overflows else set())


def slots_faults(given: Given) -> Faults:
    faults: Faults = set()
    indices, page_size, offsets = given.arrays["indices"].tolist(), given.page_size, given.list("page_offset")
    tokens = zip(given.arrays["batch_indices"].tolist(), given.arrays["positions"].tolist(), strict=True)
    for token, (request, position) in enumerate(tokens):
        if not 0 <= request < given.batch:
            faults.add(("batch_indices", token, request))
        elif position < 0:
            faults.add(("positions", token, position))
        else:
            of_request: Faults = set()
            row = given.arrays["indptr"][request : request + 2]
            ((begin, end),) = ranges(row, len(indices), "indptr", of_request)
            # Only request 0 names the entry that it begins with.
            faults |= {(name, at + request, value) for name, at, value in of_request if at == 1 or request == 0}
            page, rest = divmod(position // page_size - offsets[request], given.page_stride)
            if page >= 0 and rest == 0 and begin + page < end and indices[begin + page] < 0:
                faults.add(("indices", begin + page, indices[begin + page]))
    return faults


def block_table_faults(given: Given) -> Faults:
    faults: Faults = set()
    longest = WIDTH * given.page_size
    for row, length in enumerate(given.list("seq_lens")):
        if not 0 <= length <= longest:
            faults.add(("seq_lens", row, length))
        for column in range(-(-min(max(length, 0), longest) // given.page_size)):
            page = int(given.arrays["block_table"][row, column])
            if page < 0:
                faults.add(("block_table", row * WIDTH + column, page))
    return faults


def to_block_table_faults(given: Given) -> Faults:
    faults, rows = indptr_faults(given)
    return faults | {("max_pages", i, end - begin) for i, (begin, end) in enumerate(rows) if end - begin > WIDTH}


def update_faults(given: Given) -> Faults:
    faults, rows = indptr_faults(given)
    for i, entry in enumerate(given.list("update_index")):
        if not 0 <= entry < LIST_ENTRIES:
            faults.add(("indices", i, entry))
    for i, ((begin, end), start) in enumerate(zip(rows, given.list("starts"), strict=True)):
        if start < 0 or start + (end - begin - 1) * given.page_stride >= LIST_ENTRIES:
            faults.add(("indices", i, start))
    return faults


def copy_faults(given: Given) -> Faults:
    pairs = zip(given.list("source"), given.list("target"), strict=True)
    return {("indices", i, page) for i, pair in enumerate(pairs) for page in pair if not 0 <= page < NUM_PAGES}


def append_faults(given: Given) -> Faults:
    slots = given.list("slots")
    return {("slots", i, slot) for i, slot in enumerate(slots) if not -1 <= slot < NUM_PAGES * given.page_size}


def no_faults(given: Given) -> Faults:
    return set()


# -- operations --------------------------------------------------------------------------------------------------------


@dataclass
class Card:
    """An input on the card, and which arrays must stay as they are."""

    given: Given
    kept: list[tuple[Any, bytes]] = field(default_factory=list)

    def upload(self, array: np.ndarray) -> Any:
        copy = cupy.asarray(array)
        self.kept.append((copy, array.tobytes()))
        return copy

    def array(self, name: str) -> Any:
        return self.upload(self.given.arrays[name])

    def numbers(self, *shape: int) -> Any:
        return self.upload(numbers(shape))

    def pool(self, upload: Callable[[np.ndarray], Any] | None = None) -> pa.PagedKV:
        shape = pool_shape(self.given)
        upload = upload or self.upload
        return pa.PagedKV(upload(numbers(shape)), upload(numbers(shape, 1)), layout=self.given.layout)

    def table(self) -> pa.PageTable:
        given = self.given
        positions = {name: self.array(name) for name in ("page_offset", "total_len") if name in given.arrays}
        arrays = (self.array(name) for name in ("indptr", "indices", "last_page_len"))
        return pa.PageTable(*arrays, page_size=given.page_size, page_stride=given.page_stride, **positions)


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(np.float16)


def pool_shape(given: Given) -> tuple[int, ...]:
    page = (given.page_size, KV_HEADS) if given.layout == "NHD" else (KV_HEADS, given.page_size)
    return (NUM_PAGES, *page, given.head_dim)


@dataclass(frozen=True)
class Result:
    out: Any = None  # has to be finite
    lse: Any = None  # has to be finite or -inf
    status: Callable[[], None] | None = None  # beside the status of the device
    check: Callable[[], None] | None = None


Go = Callable[[], Result]


def append(card: Card) -> Go:
    given = card.given
    kv, slots = card.pool(cupy.asarray), card.array("slots")
    k, v = (card.numbers(given.arrays["slots"].size, KV_HEADS, given.head_dim) for _ in range(2))

    def untouched() -> None:
        page, offset = np.divmod(given.arrays["slots"], given.page_size)
        named = np.zeros((NUM_PAGES, given.page_size), bool)
        inside = (given.arrays["slots"] >= 0) & (page < NUM_PAGES)
        named[page[inside], offset[inside]] = True
        for seed, pages in enumerate((kv.k_pages.get(), kv.v_pages.get())):
            changed = pages != numbers(pool_shape(given), seed)
            by_slot = (changed if given.layout == "NHD" else changed.swapaxes(1, 2)).any(axis=(2, 3))
            assert not (by_slot & ~named).any(), "append wrote to slots that nobody named"

    def go() -> Result:
        pa.append(kv, slots, k, v)
        return Result(check=untouched)

    return go


def decode(card: Card) -> Go:
    given = card.given
    capacity = given.batch + SPARE_REQUESTS
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=capacity, max_pages=given.max_pages)
    kv, table, q = card.pool(), card.table(), card.numbers(capacity, given.q_len, HEADS, given.head_dim)

    def go() -> Result:
        plan.plan(kv, table, HEADS, q_len=given.q_len, window_left=given.window_left)
        return Result(*plan.run(q, kv, return_lse=True), plan.status)

    return go


def decode_once(card: Card) -> Go:
    given = card.given
    kv, table, q = card.pool(), card.table(), card.numbers(given.batch, given.q_len, HEADS, given.head_dim)
    return lambda: Result(*pa.decode(q, kv, table, window_left=given.window_left, return_lse=True))


def prefill(card: Card) -> Go:
    given = card.given
    plan = pa.BatchPrefillWithPagedKVCache(
        max_batch_size=given.batch + SPARE_REQUESTS, max_pages=given.max_pages, max_tokens=given.rows
    )
    kv, table, qo_indptr = card.pool(), card.table(), card.array("qo_indptr")
    q = card.numbers(given.rows, HEADS, given.head_dim)

    def go() -> Result:
        plan.plan(kv, table, qo_indptr, HEADS, window_left=given.window_left)
        return Result(*plan.run(q, kv, return_lse=True), plan.status)

    return go


def prefill_once(card: Card) -> Go:
    given = card.given
    kv, table, qo_indptr = card.pool(), card.table(), card.array("qo_indptr")
    q = card.numbers(given.rows, HEADS, given.head_dim)
    return lambda: Result(*pa.prefill(q, qo_indptr, kv, table, window_left=given.window_left, return_lse=True))


def partials(card: Card) -> Go:
    """Sequence parallelism on one card: split, decode, merge_states."""
    given = card.given
    kv, table = card.pool(), card.table()
    rows = (CHUNKS, given.batch, HEADS)
    q = card.upload(np.tile(numbers((given.batch, HEADS, given.head_dim)), (CHUNKS, 1, 1)))

    def go() -> Result:
        plan = pa.BatchDecodeWithPagedKVCache()
        plan.plan(kv, table.split(CHUNKS), HEADS, window_left=given.window_left)
        out, lse = plan.run(q, kv, return_lse=True)
        out, lse = out.reshape(*rows, given.head_dim).swapaxes(0, 1), lse.reshape(rows).swapaxes(0, 1)
        return Result(*pa.merge_states(out, lse), plan.status)

    return go


def validate(card: Card) -> Go:
    table = card.table()
    return lambda: Result(status=table.validate(NUM_PAGES).raise_if_bad)


def split(card: Card) -> Go:
    table = card.table()

    def go() -> Result:
        table.split(CHUNKS)
        return Result()

    return go


def seq_lens(card: Card) -> Go:
    table = card.table()

    def go() -> Result:
        assert table.seq_lens.size == card.given.batch
        return Result()

    return go


def from_block_table(card: Card) -> Go:
    block_table, lengths = card.array("block_table"), card.array("seq_lens")

    def go() -> Result:
        pa.PageTable.from_block_table(block_table, lengths, page_size=card.given.page_size)
        return Result()

    return go


def to_block_table(card: Card) -> Go:
    table = card.table()

    def go() -> Result:
        table.to_block_table(WIDTH)
        return Result()

    return go


def slots(card: Card) -> Go:
    table, batch_indices, positions = card.table(), card.array("batch_indices"), card.array("positions")

    def go() -> Result:
        table.slots(batch_indices, positions)
        return Result()

    return go


def update_table(card: Card) -> Go:
    """What PagedKVCache.page_table launches. It makes these arrays itself, so they go in below the public call."""
    arrays = card.given.arrays
    lists = cupy.asarray(np.arange(LIST_ENTRIES, dtype=np.int32))
    rows = ("last_page_len", "page_offset", "total_len")
    out = pa.PageTable.empty(
        card.given.batch + SPARE_REQUESTS, arrays["indices"].size, page_size=1, device="cuda",
        positions="page_offset" in arrays, page_stride=card.given.page_stride,
    )  # fmt: skip

    def go() -> Result:
        backend.update_table(
            lists, arrays["update_index"], arrays["update_index"], arrays["starts"], arrays["indptr"],
            {name: arrays[name] for name in rows if name in arrays}, out,
        )  # fmt: skip
        return Result()

    return go


def copy_pages(card: Card) -> Go:
    """What PagedKVCache launches on a copy-on-write."""
    source, target = card.given.arrays["source"], card.given.arrays["target"]
    right = numbers((2, NUM_PAGES, 2, 3, KV_HEADS, 16))
    storage = cupy.asarray(right)

    def untouched() -> None:
        changed = (storage.get() != right).any(axis=(0, 2, 3, 4, 5))
        changed[target[(target >= 0) & (target < NUM_PAGES)]] = False
        assert not changed.any(), "copy_pages wrote to pages that nobody named"

    def go() -> Result:
        backend.copy_pages(storage, source, target)
        return Result(check=untouched)

    return go


def merge_states(card: Card) -> Go:
    v, s = card.numbers(5, CHUNKS, HEADS, card.given.head_dim), card.array("s")

    def go() -> Result:
        pa.merge_states(v, s)
        return Result()

    return go


def merge_state(card: Card) -> Go:
    v, s = card.numbers(5, HEADS, card.given.head_dim), card.array("s")

    def go() -> Result:
        pa.merge_state(v, s[:, 0], v, s[:, 1])
        return Result()

    return go


@dataclass(frozen=True)
class Operation:
    prepare: Callable[[Card], Go]
    corruptible: tuple[str, ...]
    faults: Callable[[Given], Faults]


TABLE = ("indptr", "indices", "last_page_len", "page_offset", "total_len")
OPERATIONS = {
    "append": Operation(append, ("slots",), append_faults),
    "decode": Operation(decode, TABLE, plan_faults),
    "decode_once": Operation(decode_once, TABLE, table_faults),
    "prefill": Operation(
        prefill, (*TABLE, "qo_indptr"), lambda given: plan_faults(given) | query_faults(given, given.rows)
    ),
    "prefill_once": Operation(
        prefill_once, (*TABLE, "qo_indptr"), lambda given: table_faults(given) | query_faults(given, given.rows)
    ),
    "partials": Operation(partials, TABLE, partials_faults),
    "validate": Operation(validate, TABLE, table_faults),
    "split": Operation(split, TABLE, split_faults),
    "seq_lens": Operation(seq_lens, TABLE, no_faults),
    "from_block_table": Operation(from_block_table, ("block_table", "seq_lens"), block_table_faults),
    "to_block_table": Operation(to_block_table, ("indptr", "indices"), to_block_table_faults),
    "slots": Operation(slots, ("indptr", "indices", "page_offset", "batch_indices", "positions"), slots_faults),
    "update_table": Operation(update_table, ("update_index", "starts", "indptr"), update_faults),
    "copy_pages": Operation(copy_pages, ("source", "target"), copy_faults),
    "merge_states": Operation(merge_states, ("s",), no_faults),
    "merge_state": Operation(merge_state, ("s",), no_faults),
}


# -- memory between canaries -------------------------------------------------------------------------------------------


class Arena:
    """A CuPy allocator whose arrays stand in one block of memory, between bytes that nobody may write.

    All bytes begin as 0xFF, also those of the arrays: as page ids they are -1, as floats NaN, so that reading past an
    array or leaving a row out shows in the result.
    """

    CANARY = 0xFF
    GAP = 256

    def __init__(self, num_bytes: int = 16 << 20) -> None:
        self._memory = cupy.cuda.Memory(num_bytes)
        self._bytes = cupy.ndarray((num_bytes,), np.uint8, cupy.cuda.MemoryPointer(self._memory, 0))
        self._bytes.data.memset_async(self.CANARY, num_bytes)
        cupy.cuda.get_current_stream().synchronize()  # the status word is zeroed on a stream that does not wait
        self._taken: list[tuple[int, int]] = []
        self._kept = 0
        cupy.cuda.set_allocator(self)

    def __call__(self, num_bytes: int) -> Any:
        begin = -(-self._end // self.GAP) * self.GAP
        if begin + num_bytes + self.GAP > self._bytes.size:
            raise MemoryError(f"the arena of {self._bytes.size} bytes has no room for {num_bytes} more")
        self._taken.append((begin, begin + num_bytes))
        return cupy.cuda.MemoryPointer(self._memory, begin)

    @property
    def _end(self) -> int:
        """Behind the last array and its canaries."""
        return self._taken[-1][1] + self.GAP if self._taken else self.GAP

    def keep(self) -> None:
        """What is there now stays for good."""
        self._kept = len(self._taken)

    def start(self) -> None:
        """Forget all arrays but the kept ones."""
        end = self._end
        del self._taken[self._kept :]
        cupy.cuda.MemoryPointer(self._memory, self._end).memset_async(self.CANARY, end - self._end + self.GAP)

    def check(self) -> None:
        image, place = self._bytes[: self._end].get(), 0
        for begin, end in [*self._taken, (image.size, 0)]:
            assert (image[place:begin] == self.CANARY).all(), f"canaries at {place} to {begin} were overwritten"
            place = end


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    milliseconds: float
    faults: tuple[Fault, ...]


def run(operation: Operation, given: Given, memory: Any) -> Outcome:
    """Do it once; raises AssertionError where it did what no input may make it do."""
    memory.start()
    card = Card(given)
    go = operation.prepare(card)
    cupy.cuda.get_current_stream().synchronize()
    began = time.perf_counter()
    result = go()
    cupy.cuda.get_current_stream().synchronize()
    milliseconds = (time.perf_counter() - began) * 1e3

    memory.check()
    for array, before in card.kept:
        assert array.get().tobytes() == before, "an input was written"
    if result.check is not None:
        result.check()
    if result.out is not None:
        assert np.isfinite(result.out.get()).all(), "out has rows that were not written, or read what is not theirs"
        lse = result.lse.get()
        assert not (np.isnan(lse) | np.isposinf(lse)).any(), "lse is NaN or +inf"
    words = [pa.status] if result.status is None else [pa.status, result.status]
    return Outcome(milliseconds, tuple(fault for word in words if (fault := recorded(word))))


def recorded(status: Callable[[], None]) -> Fault | None:
    try:
        status()
    except pa.PageTableError as error:
        return (str(error.field), error.index, error.value)
    return None


def assert_named(found: tuple[Fault, ...], faults: Faults) -> None:
    """A culprit is named where there is one, and it is one."""
    assert found or not faults, f"nobody was named; wrong are {sorted(faults, key=str)[:9]}"
    for fault in found:
        fits = any(all(said in (None, is_) for said, is_ in zip(wrong, fault, strict=True)) for wrong in faults)
        assert fits, f"{fault} was named; wrong are {sorted(faults, key=str)[:9]}"


def count_launches() -> Counter[str]:
    """From here on, the launches of every kernel."""
    launches: Counter[str] = Counter()
    launch = kernels.Launch.__call__

    def counting(self: kernels.Launch, *grid: int) -> None:
        launches[self.kernel.name] += 1
        launch(self, *grid)

    kernels.Launch.__call__ = counting  # type: ignore[method-assign]
    return launches


def main(arguments: Sequence[str] | None = None, memory: Any = None, *, timed: bool = True) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.fuzz", description=__doc__)
    parser.add_argument("--rounds", type=int, default=63)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    options = parser.parse_args(arguments)
    memory = memory or Arena()
    pa.status()  # makes the device's status word
    memory.keep()
    others = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1
    healthy: dict[str, float] = {}
    for name in options.operations:
        times = []
        for warm_up in range(WARM_UP):
            print(json.dumps({"right": name, "number": warm_up}), flush=True)
            given = right_input(np.random.default_rng((options.seed, warm_up)), options.head_dim)
            outcome = run(OPERATIONS[name], given, memory)
            assert not outcome.faults, f"{outcome.faults[0]} was named, but the input breaks no rule"
            times.append(outcome.milliseconds)
        healthy[name] = float(np.median(times))

    launches = count_launches()
    inputs, wrong, slowest = Counter[str](), Counter[str](), dict.fromkeys(healthy, 0.0)
    for number in range(options.rounds):
        for place, name in enumerate(options.operations):
            print(json.dumps({"corrupted": name, "number": number}), flush=True)
            operation = OPERATIONS[name]
            random = np.random.default_rng((options.seed, number, place))
            given = corrupted(random, right_input(random, options.head_dim), operation.corruptible)
            faults = operation.faults(given)
            limit = SLOWEST * healthy[name] + TIME_SLICE_MS * others if timed else np.inf
            # A slow input is slow every time; a hiccup of the host is not.
            for _ in range(5):
                outcome = run(operation, given, memory)
                assert_named(outcome.faults, faults)
                if outcome.milliseconds <= limit:
                    break
            assert outcome.milliseconds <= limit, f"took {outcome.milliseconds} ms, right inputs {healthy[name]} ms"
            inputs[name] += 1
            wrong[name] += bool(faults)
            slowest[name] = max(slowest[name], outcome.milliseconds)
    print(
        json.dumps(
            {
                "inputs": inputs,
                "with_a_fault": wrong,
                "healthy_ms": {name: round(value, 3) for name, value in healthy.items()},
                "slowest_ms": {name: round(value, 3) for name, value in slowest.items()},
                "launches": launches,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
