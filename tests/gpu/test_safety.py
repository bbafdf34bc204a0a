"""Device tables, slots and offsets that hold anything: a wrong row at worst, and a word about it.

All inputs run in one child process (python -m tests.gpu.test_safety), so that a hang is a failure and a fault of the
device takes nothing along. There every array of the device, the library's own buffers included, lies between two bands
of a pattern, which are compared after each input.
"""

import faulthandler
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.gpu.answers import expected

cupy = pytest.importorskip("cupy")

ROOT = Path(__file__).parents[2]
CHILD_SECONDS = 120  # compilation included
CALL_SECONDS = 2.0  # a call takes some 100 us, and a loop over 2^32 nothings some 10 s
BAND, PATTERN = 4096, 0xA5  # bytes on either side of an array
INT_MIN, INT_MAX = -(2**31), 2**31 - 1

PLAIN = cases.Case("safety", (130, 0, 1, 16, 33, 77), layout="HND")
PAIRS = replace(PLAIN, name="safety_q_len2", q_len=2, layout="NHD", window_left=20)
PARTS = replace(
    next(case for case in cases.DECODE if case.name == "decode_stride3_rank1"), name="safety_stride3", window_left=-1
)  # every third page of each sequence, with page_offset and total_len
PREFILL = replace(PLAIN, name="safety_prefill", q_lens=(40, 3, 1, 16, 60, 5))
PREFILL_PARTS = replace(PARTS, name="safety_prefill_stride3", q_lens=(9, 33, 1, 4, 20))


# -- guards ------------------------------------------------------------------------------------------------------------


class Guard:
    """An allocator for CuPy that puts a band of the pattern on either side of every array."""

    def __init__(self) -> None:
        self._regions: list[tuple[Any, int]] = []
        self._kept: list[tuple[Any, int]] = []

    def allocate(self, size: int) -> Any:
        memory = cupy.cuda.Memory(size + 2 * BAND)
        cupy.cuda.MemoryPointer(memory, 0).memset_async(PATTERN, size + 2 * BAND)  # on the stream that asks
        self._regions.append((memory, size))
        return cupy.cuda.MemoryPointer(memory, BAND)

    def keep(self) -> None:
        """What is allocated by now is looked at after every input; the rest after its own."""
        self._kept += self._regions
        self._regions = []

    def check(self) -> None:
        regions, self._regions = self._regions, []
        for memory, size in self._kept + regions:
            whole = cupy.ndarray((size + 2 * BAND,), np.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))
            for band, side in ((whole[:BAND], "in front of"), (whole[-BAND:], "behind")):
                touched = np.flatnonzero(band.get() != PATTERN)
                assert not touched.size, f"byte {touched[0]} {side} an array of {size} bytes was written"


# -- one input ---------------------------------------------------------------------------------------------------------


class Trial:
    """One input of a kind of call: its random numbers, its arrays, and what must hold afterwards."""

    def __init__(self, random: np.random.Generator, corrupted: bool) -> None:
        self.random, self.corrupted = random, corrupted
        self._uploads: list[tuple[Any, bytes]] = []

    def upload(self, array: np.ndarray) -> Any:
        """An array that no kernel may change."""
        copy = cupy.asarray(array)
        self._uploads.append((copy, array.tobytes()))
        return copy

    def timed(self, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        cupy.cuda.Device().synchronize()
        seconds = time.perf_counter() - start
        assert seconds < CALL_SECONDS or not self.corrupted, f"a call took {seconds:.2f} s"
        return result

    def fields(self, *names: str) -> set[str]:
        """One or two of the names, whose arrays are to hold wrong values; none for a right input."""
        if not self.corrupted:
            return set()
        count = min(len(names), int(self.random.integers(1, 3)))
        return set(self.random.choice(names, count, replace=False).tolist())

    def assert_names(self, fields: set[str], ask: Callable[[], Any]) -> None:
        """The question is answered by a PageTableError that names one of the fields, or by none if there are none."""
        try:
            ask()
        except pa.PageTableError as error:
            assert error.field in fields, f"{error.field} is named, and {sorted(fields)} were wrong: {error}"
        else:
            assert not fields, f"nothing was recorded, and {sorted(fields)} were wrong"

    def assert_inputs_are_unchanged(self) -> None:
        for array, before in self._uploads:
            assert array.tobytes() == before, f"an input of {array.shape} {array.dtype} was written"

    def wrong(self, low: int, high: int, info: Any = None) -> int:
        """A number outside [low, high], of any size that the dtype (int32, if it is not given) holds."""
        info = info or np.iinfo(np.int32)
        near, far = int(self.random.integers(1, 9)), int(self.random.integers(9, 10**6))
        choices = [low - near, low - far, info.min, high + near, high + far, info.max - near, info.max]
        choices = [value for value in choices if info.min <= value < low or high < value <= info.max]
        return choices[int(self.random.integers(len(choices)))]

    def some(self, candidates: Sequence[int]) -> list[int]:
        """One to three of the candidates."""
        count = min(len(candidates), int(self.random.integers(1, 4)))
        return self.random.choice(candidates, count, replace=False).tolist()

    def tokens(self, case: cases.Case, count: int) -> np.ndarray:
        """New keys or values."""
        return self.random.standard_normal((count, case.num_kv_heads, case.head_dim)).astype(case.dtype)


class Table:
    """The table of a case with wrong values in some fields, on the device."""

    FIELDS = ("indptr", "indices", "last_page_len")
    POSITIONS = ("page_offset", "total_len")

    def __init__(self, trial: Trial, inputs: cases.Inputs, fields: set[str], *, may_decrease: bool = True) -> None:
        case, batch_size = inputs.case, inputs.case.batch_size
        names = self.FIELDS + (self.POSITIONS if case.page_offsets else ())
        arrays = {name: getattr(inputs, name).copy() for name in names}
        touched: set[int] = set()
        with_pages = np.flatnonzero(np.diff(inputs.indptr)).tolist()
        if "indptr" in fields:
            limit = inputs.indices.size
            for entry in trial.some(range(batch_size + 1)):
                before = int(inputs.indptr[entry - 1]) if entry else 0
                decreases = may_decrease and before > 0 and trial.random.random() < 0.5
                value = int(trial.random.integers(before)) if decreases else trial.wrong(0, limit)
                arrays["indptr"][entry] = value
                touched |= {entry - 1, entry}
        if "indices" in fields:
            for entry in trial.some(range(int(inputs.indptr[-1]))):
                arrays["indices"][entry] = trial.wrong(0, len(inputs.k_pages) - 1)
                touched.add(int(np.searchsorted(inputs.indptr, entry, side="right")) - 1)
        if "last_page_len" in fields:
            for request in trial.some(with_pages):
                arrays["last_page_len"][request] = trial.wrong(1, case.page_size)
                touched.add(request)
        if "page_offset" in fields:  # a page of 8 tokens must end below 2^31
            for request in trial.some(with_pages):
                arrays["page_offset"][request] = trial.wrong(0, 2**31 // case.page_size)
                touched.add(request)
        if "total_len" in fields:
            for request in trial.some(range(batch_size)):
                arrays["total_len"][request] = trial.wrong(0, INT_MAX)
                touched.add(request)
        self.healthy = [request for request in range(batch_size) if request not in touched]
        self.host = arrays
        on_device = {name: trial.upload(array) for name, array in arrays.items()}
        self.table = pa.PageTable(**on_device, page_size=case.page_size, page_stride=case.page_stride)

    @staticmethod
    def faults(fields: set[str]) -> set[str]:
        """The fields that may be named. A row whose indptr is wrong may reach ids and a last page not its own."""
        return fields | ({"indices", "last_page_len"} if "indptr" in fields else set())

    @staticmethod
    def names(case: cases.Case) -> tuple[str, ...]:
        return Table.FIELDS + (Table.POSITIONS if case.page_offsets else ())


@cache
def inputs_of(case: cases.Case) -> cases.Inputs:
    return cases.build(case)


@cache
def answer(case: cases.Case) -> tuple[np.ndarray, np.ndarray]:
    """What the reference says to the right input."""
    return expected(inputs_of(case))


def assert_rows_are_right(case: cases.Case, rows: Any, out: Any, lse: Any) -> None:
    right, right_lse = answer(case)
    cases.assert_close(
        out.get()[rows], right[rows], lse.get()[rows], right_lse[rows],
        tolerance=cases.OUT_TOLERANCE[case.dtype], lse_tolerance=cases.LSE_TOLERANCE,
    )  # fmt: skip


# -- decode and prefill ------------------------------------------------------------------------------------------------


def decode(trial: Trial) -> None:
    case = (PLAIN, PAIRS, PARTS)[trial.random.integers(3)]
    inputs, fields = inputs_of(case), trial.fields(*Table.names(case))
    wrong = Table(trial, inputs, fields)
    q, kv = trial.upload(inputs.q), inputs.kv(trial.upload)
    out, lse = trial.timed(lambda: pa.decode(q, kv, wrong.table, return_lse=True, **inputs.options()))
    trial.assert_names(Table.faults(fields), pa.status)
    pa.status()  # it has told all
    assert_rows_are_right(case, wrong.healthy, out, lse)


def planned_decode(trial: Trial) -> None:
    """With capacities, the batch's rows and all of them; sometimes more pages than fit."""
    case = (PLAIN, PAIRS, PARTS)[trial.random.integers(3)]
    inputs, fields = inputs_of(case), trial.fields(*Table.names(case), "max_pages")
    wrong = Table(trial, inputs, fields)
    healthy, used = wrong.healthy, int(inputs.indptr[-1])
    max_pages = used - 1 if "max_pages" in fields else inputs.indices.size
    healthy = [request for request in healthy if inputs.indptr[request + 1] <= max_pages]
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=9, max_pages=max_pages)
    kv, q = inputs.kv(trial.upload), trial.upload(inputs.q)
    trial.timed(lambda: plan.plan(kv, wrong.table, case.num_qo_heads, q_len=case.q_len, **inputs.options()))
    out, lse = trial.timed(lambda: plan.run(q, kv, return_lse=True))
    assert_rows_are_right(case, healthy, out, lse)
    rows = np.concatenate([inputs.q, np.zeros((9 - case.batch_size, *inputs.q.shape[1:]), inputs.q.dtype)])
    padded = trial.upload(rows)
    out, lse = trial.timed(lambda: plan.run(padded, kv, return_lse=True))
    assert_rows_are_right(case, healthy, out[: case.batch_size], lse[: case.batch_size])
    assert (out[case.batch_size :].get() == 0).all() and np.isneginf(lse[case.batch_size :].get()).all()
    trial.assert_names(Table.faults(fields), plan.status)
    pa.status()  # the plan has a word of its own
    plan.plan(kv, inputs.table(trial.upload), case.num_qo_heads, q_len=case.q_len, **inputs.options())
    trial.assert_names(fields & {"max_pages"}, plan.status)


def wrong_queries(trial: Trial, qo_indptr: np.ndarray, max_rows: int) -> np.ndarray:
    """qo_indptr with one wrong entry."""
    wrong = qo_indptr.copy()
    wrong[int(trial.random.integers(wrong.size))] = trial.wrong(0, max_rows)
    return wrong


def query_rows(inputs: cases.Inputs, qo_indptr: np.ndarray, requests: list[int]) -> list[int]:
    """The rows of those requests whose queries begin and end where they should, in spite of what stands before."""
    right, rows = inputs.qo_indptr, []
    for request in requests:
        first = max(0, *qo_indptr[: request + 1].tolist())
        if first == right[request] == qo_indptr[request] and qo_indptr[request + 1] == right[request + 1]:
            rows += range(first, int(right[request + 1]))
    return rows


def prefill(trial: Trial) -> None:
    case = (PREFILL, PREFILL_PARTS)[trial.random.integers(2)]
    inputs, fields = inputs_of(case), trial.fields(*Table.names(case), "qo_indptr")
    wrong = Table(trial, inputs, fields)
    queries = wrong_queries(trial, inputs.qo_indptr, len(inputs.q)) if "qo_indptr" in fields else inputs.qo_indptr
    q, kv, qo_indptr = trial.upload(inputs.q), inputs.kv(trial.upload), trial.upload(queries)
    out, lse = trial.timed(lambda: pa.prefill(q, qo_indptr, kv, wrong.table, return_lse=True, **inputs.options()))
    trial.assert_names(Table.faults(fields), pa.status)
    pa.status()
    assert_rows_are_right(case, query_rows(inputs, queries, wrong.healthy), out, lse)


def planned_prefill(trial: Trial) -> None:
    case = (PREFILL, PREFILL_PARTS)[trial.random.integers(2)]
    inputs, fields = inputs_of(case), trial.fields(*Table.names(case), "qo_indptr")
    wrong = Table(trial, inputs, fields)
    num_rows = len(inputs.q)
    max_tokens = num_rows + 30
    queries = wrong_queries(trial, inputs.qo_indptr, max_tokens) if "qo_indptr" in fields else inputs.qo_indptr
    plan = pa.BatchPrefillWithPagedKVCache(max_batch_size=9, max_pages=inputs.indices.size, max_tokens=max_tokens)
    kv, qo_indptr = inputs.kv(trial.upload), trial.upload(queries)
    q = trial.upload(np.concatenate([inputs.q, np.zeros((30, *inputs.q.shape[1:]), inputs.q.dtype)]))
    trial.timed(lambda: plan.plan(kv, wrong.table, qo_indptr, case.num_qo_heads, **inputs.options()))
    rows = query_rows(inputs, queries, wrong.healthy)
    out, lse = trial.timed(lambda: plan.run(q, kv, return_lse=True))
    assert_rows_are_right(case, rows, out[:num_rows], lse[:num_rows])
    out, lse = trial.timed(lambda: plan.run(q[:num_rows], kv, return_lse=True))
    assert_rows_are_right(case, rows, out, lse)
    trial.assert_names(Table.faults(fields), plan.status)


# -- tables ------------------------------------------------------------------------------------------------------------


def split(trial: Trial) -> None:
    """A split of a wrong table, attended and merged."""
    case = (PLAIN, PARTS)[trial.random.integers(2)]
    inputs, fields = inputs_of(case), trial.fields(*Table.names(case))
    wrong = Table(trial, inputs, fields, may_decrease=False)  # else rows may overlap, and their chunks have no room
    chunks, batch_size = int(trial.random.integers(1, 6)), case.batch_size
    kv, q = inputs.kv(trial.upload), trial.upload(np.tile(inputs.q, (chunks, 1, 1)))
    table = trial.timed(lambda: wrong.table.split(chunks))
    partial = cupy.empty(q.shape, np.float32)
    partial, logs = trial.timed(lambda: pa.decode(q, kv, table, out=partial, return_lse=True, **inputs.options()))
    shape = (chunks, batch_size, *inputs.q.shape[1:])
    out, lse = trial.timed(
        lambda: pa.merge_states(partial.reshape(shape).swapaxes(0, 1), logs.reshape(shape[:-1]).swapaxes(0, 1))
    )
    trial.assert_names(Table.faults(fields), pa.status)
    assert_rows_are_right(case, wrong.healthy, out, lse)


def from_block_table(trial: Trial) -> None:
    inputs, fields = inputs_of(PLAIN), trial.fields("seq_lens", "block_table")
    page_size, batch_size = PLAIN.page_size, PLAIN.batch_size
    counts, width = np.diff(inputs.indptr), 11
    block_table = np.full((batch_size, width), INT_MIN, np.int32)  # what stands past the last page is not read
    for request, count in enumerate(counts):
        block_table[request, :count] = inputs.indices[inputs.indptr[request] : inputs.indptr[request + 1]]
    seq_lens, touched = np.array(PLAIN.kv_lens, np.int32), set()
    if "seq_lens" in fields:
        for request in trial.some(range(batch_size)):
            seq_lens[request] = trial.wrong(0, width * page_size)
            touched.add(request)
    if "block_table" in fields:
        for request in trial.some(np.flatnonzero(counts).tolist()):
            block_table[request, trial.random.integers(counts[request])] = trial.wrong(0, INT_MAX)
            touched.add(request)
    given, lens = trial.upload(block_table), trial.upload(seq_lens)
    table = trial.timed(lambda: pa.PageTable.from_block_table(given, lens, page_size=page_size))
    # A row of too many tokens has all its columns, and those that were not meant hold no page.
    trial.assert_names(fields | ({"block_table"} if "seq_lens" in fields else set()), pa.status)

    held = np.clip(seq_lens, 0, width * page_size).astype(np.int64)
    pages = -(-held // page_size)
    indptr = np.concatenate([[0], np.cumsum(pages)])
    np.testing.assert_array_equal(table.indptr.get(), indptr)
    np.testing.assert_array_equal(table.last_page_len.get(), np.where(pages, held - (pages - 1) * page_size, 0))
    ids = np.concatenate([block_table[request, :count] for request, count in enumerate(pages)])
    np.testing.assert_array_equal(table.indices.get()[: indptr[-1]], ids)

    q, kv = trial.upload(inputs.q), inputs.kv(trial.upload)
    out, lse = trial.timed(lambda: pa.decode(q, kv, table, return_lse=True))
    bad_ids = (ids < 0) | (ids >= len(inputs.k_pages))
    trial.assert_names({"indices"} if bad_ids.any() else set(), pa.status)
    assert_rows_are_right(PLAIN, [request for request in range(batch_size) if request not in touched], out, lse)


def to_block_table(trial: Trial) -> None:
    inputs, fields = inputs_of(PLAIN), trial.fields("indptr", "max_pages")
    wrong = Table(trial, inputs, fields, may_decrease=False)
    counts = np.diff(inputs.indptr)
    width = int(counts.max()) - (3 if "max_pages" in fields else -2)
    rows = trial.timed(lambda: wrong.table.to_block_table(width)).get()
    # The one long request may be among those that are gone.
    too_long = any(counts[request] > width for request in wrong.healthy)
    trial.assert_names((fields & {"indptr"}) | ({"max_pages"} if too_long else set()), pa.status)
    for request in range(PLAIN.batch_size):
        ids = inputs.indices[inputs.indptr[request] : inputs.indptr[request + 1]] if request in wrong.healthy else []
        np.testing.assert_array_equal(rows[request], np.pad(ids, (0, width), constant_values=-1)[:width])


def slots(trial: Trial) -> None:
    """Slots of a wrong table for wrong places, and new tokens written there."""
    case = (PLAIN, PARTS)[trial.random.integers(2)]
    inputs, fields = inputs_of(case), trial.fields("batch_indices", "positions", "indptr", "indices")
    wrong = Table(trial, inputs, fields, may_decrease=False)
    places = []  # (request, position, slot): every token that the table holds, and one behind them
    for request in range(case.batch_size):
        ids = inputs.indices[inputs.indptr[request] : inputs.indptr[request + 1]].astype(np.int64)
        positions = case.positions(request)
        held = np.arange(len(positions))
        right = ids[held // case.page_size] * case.page_size + held % case.page_size
        offset = case.page_offsets[request] if case.page_offsets else 0
        behind = (offset + len(ids) * case.page_stride) * case.page_size
        places += [(request, *pair) for pair in zip(positions.tolist(), right.tolist(), strict=True)]
        places.append((request, behind, -1))
    batch_indices, positions, right = (np.array(column) for column in zip(*places, strict=True))
    batch_indices, positions = batch_indices.astype(np.int32), positions.astype(np.int32)
    sure = np.isin(batch_indices, wrong.healthy)
    if "batch_indices" in fields:
        for token in trial.some(range(len(places))):
            batch_indices[token], right[token], sure[token] = trial.wrong(0, case.batch_size - 1), -1, True
    if "positions" in fields:
        for token in trial.some(np.flatnonzero(sure).tolist()):
            positions[token], right[token] = trial.wrong(0, INT_MAX), -1
    # A table does not know how large the pool is: an id behind it gives a slot behind it, which append refuses.
    given, where = trial.upload(batch_indices), trial.upload(positions)
    found = trial.timed(lambda: wrong.table.slots(given, where))
    k, v = trial.tokens(case, len(places)), trial.tokens(case, len(places))
    kv = inputs.kv(cupy.asarray)
    trial.timed(lambda: pa.append(kv, found, trial.upload(k), trial.upload(v)))
    trial.assert_names(fields | ({"slots"} if "indices" in fields else set()), pa.status)
    np.testing.assert_array_equal(found.get()[sure], right[sure])
    assert_pool_holds(inputs, kv, found.get(), k, v)


# -- append ------------------------------------------------------------------------------------------------------------


def assert_pool_holds(inputs: cases.Inputs, kv: pa.PagedKV, where: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """The pool is as it was but for the tokens with a slot in it."""
    limit = kv.num_pages * kv.page_size
    good = np.flatnonzero((where >= 0) & (where < limit))
    assert np.unique(where[good]).size == good.size
    page, slot = np.divmod(where[good], kv.page_size)
    for pages, before, tokens in ((kv.k_pages, inputs.k_pages, k), (kv.v_pages, inputs.v_pages, v)):
        right = before.copy()
        (right if kv.layout == "NHD" else right.swapaxes(1, 2))[page, slot] = tokens[good]
        assert pages.tobytes() == right.tobytes(), "append wrote what it should not, or not what it should"


def append(trial: Trial) -> None:
    case = (PLAIN, PAIRS)[trial.random.integers(2)]
    inputs, fields = inputs_of(case), trial.fields("slots")
    limit = len(inputs.k_pages) * case.page_size
    where = trial.random.permutation(limit)[:100].astype(np.int64)
    where[trial.some(range(100))] = -1
    if fields:
        for token in trial.some(range(100)):
            where[token] = trial.wrong(-1, limit - 1, np.iinfo(np.int64))
    k, v = trial.tokens(case, 100), trial.tokens(case, 100)
    kv, slots, new_k, new_v = inputs.kv(cupy.asarray), trial.upload(where), trial.upload(k), trial.upload(v)
    trial.timed(lambda: pa.append(kv, slots, new_k, new_v))
    trial.assert_names(fields, pa.status)
    assert_pool_holds(inputs, kv, where, k, v)


# -- validate ----------------------------------------------------------------------------------------------------------


def validate(trial: Trial) -> None:
    case = (PLAIN, PARTS)[trial.random.integers(2)]
    inputs, fields = inputs_of(case), trial.fields(*Table.names(case))
    wrong = Table(trial, inputs, fields)
    found = trial.timed(lambda: wrong.table.validate(len(inputs.k_pages)))
    trial.assert_names(Table.faults(fields), found.raise_if_bad)
    trial.assert_names(Table.faults(fields), found.raise_if_bad)  # as often as it is asked
    lens = trial.timed(lambda: wrong.table.seq_lens).get()
    np.testing.assert_array_equal(lens[wrong.healthy], np.array(case.kv_lens)[wrong.healthy])
    pa.status()


KINDS: dict[Callable[[Trial], None], int] = {
    decode: 16,
    planned_decode: 16,
    prefill: 16,
    planned_prefill: 16,
    split: 10,
    from_block_table: 8,
    to_block_table: 6,
    slots: 10,
    append: 8,
    validate: 12,
}
NUM_RIGHT = 4  # right inputs of each kind come first: they compile the kernels, and nothing may be said against them


def run_all() -> int:
    """Every input of every kind; returns how many were not dealt with as they should be."""
    guard = Guard()
    cupy.cuda.set_allocator(guard.allocate)
    pa.status()
    guard.keep()  # the status word of the device
    failures = 0
    for kind, count in KINDS.items():
        for number in range(-NUM_RIGHT, count):
            name = f"{kind.__name__} {number}"
            trial = Trial(np.random.default_rng([NUM_RIGHT + number, *kind.__name__.encode()]), number >= 0)
            try:
                kind(trial)
                trial.assert_inputs_are_unchanged()
                guard.check()
            except (AssertionError, pa.PageTableError):
                failures += 1
                print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
                with suppress(pa.PageTableError):
                    pa.status()
    cupy.cuda.Device().synchronize()
    return failures


def test_nothing_that_a_table_holds_can_hurt() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.gpu.test_safety"],
        cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False,
    )  # fmt: skip
    assert child.returncode == 0, f"{child.stdout[-20000:]}\n{child.stderr[-20000:]}"
    assert child.stdout.splitlines()[-1] == f"{sum(KINDS.values())} inputs were dealt with"


if __name__ == "__main__":
    faulthandler.dump_traceback_later(CHILD_SECONDS - 10, exit=True)  # where it hangs
    if run_all():
        sys.exit(1)
    print(f"{sum(KINDS.values())} inputs were dealt with")
