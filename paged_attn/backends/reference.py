"""The reference backend: NumPy, one request at a time, and the definition of every result.

    scores[i, x] = sm_scale * <q[i], k[x]>          c * tanh(scores / c) where there is a soft cap c
    lse[i]       = log (sum_x exp(scores[i, x]) + exp(sink))      over the tokens x that query i sees (kv_limits)
    out[i]       = sum_x exp(scores[i, x] - lse[i]) * v[x]        the sink of the head, where there are sinks

All of it in float32 (in float64 for a float64 q). A query that sees no token has out = 0 and lse = -inf (the sink,
where there is one), and what a query does not see never reaches it, be it inf or NaN. Whatever numpy.errstate the
caller has set, inf and NaN of the data go their IEEE way. Arguments come checked, values of host tables included.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks.tables import check_table_values
from ..errors import PageTableError
from ..holders import KVPages, TableArrays
from ..ragged import ranges
from ..spec import AttentionSpec, RunArrays

SCORES_AT_ONCE = 1 << 24  # a long prefill is done in blocks of queries, so that its scores stay under 64 MB


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> np.ndarray:
    return np.empty(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> np.ndarray:
    return np.zeros(shape, dtype)


def uploader(device: str) -> Callable[[np.ndarray], np.ndarray]:
    """What brings host arrays to the device: nothing has to be done."""
    return np.asarray


def to_backend(array: np.ndarray, device: str) -> np.ndarray:
    """Host metadata is where this backend wants it."""
    return array


# -- positions: the only two functions that know about them ------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What attention knows of one request; the same record as in page_table.cuh."""

    page_ids: np.ndarray
    kv_len: int  # tokens that these pages hold
    total_len: int  # length of the whole sequence, from which masks count
    page_offset: int  # position of its first page, in pages
    page_stride: int
    page_size: int
    first_query: int  # its query rows are first_query ... first_query + num_queries - 1
    num_queries: int


def tokens_before(position: np.ndarray, request: Request) -> np.ndarray:
    """How many of the request's tokens are stored before `position` in the whole sequence (int64, any shape)."""
    page, slot = np.divmod(np.maximum(position, 0), request.page_size)
    behind = page - request.page_offset
    whole = -(-behind // request.page_stride)  # local pages that lie wholly before `page`
    tokens = whole * request.page_size + np.where(whole * request.page_stride == behind, slot, 0)
    return np.where(behind < 0, 0, np.minimum(tokens, request.kv_len))


def kv_limits(request: Request, *, causal: bool, window_left: int) -> tuple[np.ndarray, np.ndarray]:
    """The local tokens [begin, end) that each query of the request sees: two int64 arrays [num_queries]."""
    position = request.total_len - request.num_queries + np.arange(request.num_queries, dtype=np.int64)
    end = tokens_before(position + 1 if causal else np.full_like(position, request.total_len), request)
    begin = tokens_before(position - window_left, request) if window_left >= 0 else np.zeros_like(position)
    return np.minimum(begin, end), end


# -- tables ------------------------------------------------------------------------------------------------------------


def seq_lens(table: TableArrays) -> np.ndarray:
    """Tokens that the table's pages hold, int32 [batch]: a request without pages has none."""
    pages = np.diff(table.indptr)
    return np.where(pages > 0, (pages - 1) * table.page_size + table.last_page_len, 0).astype(np.int32)


def split_table(table: TableArrays, num_chunks: int, out: TableArrays) -> None:
    """Row c*batch + i of `out` is chunk c of request i: pages [c*n // num_chunks, (c+1)*n // num_chunks) of its n."""
    pages = np.diff(table.indptr).astype(np.int64)
    chunk = np.arange(num_chunks, dtype=np.int64)[:, None]
    first = chunk * pages // num_chunks  # [num_chunks, batch], as all below
    counts = (chunk + 1) * pages // num_chunks - first
    holds_last = (counts > 0) & (first + counts == pages)
    last_page_len = np.where(holds_last, table.last_page_len, np.where(counts > 0, table.page_size, 0))
    page_offset = first * table.page_stride + (0 if table.page_offset is None else table.page_offset)
    total_len = np.broadcast_to(seq_lens(table) if table.total_len is None else table.total_len, counts.shape)
    indptr = _indptr(counts.ravel())
    per_row = {"last_page_len": last_page_len, "page_offset": page_offset, "total_len": total_len}
    _write_rows(out, indptr, {name: array.ravel() for name, array in per_row.items()})
    out.indices[: indptr[-1]] = table.indices[ranges((table.indptr[:-1] + first).ravel(), counts.ravel())]


def from_block_table(block_table: np.ndarray, seq_lens: np.ndarray, page_size: int, out: TableArrays) -> None:
    """Write the CSR form of block_table int32 [batch, max_pages_per_seq] with seq_lens int32 [batch] into `out`."""
    counts = -(-seq_lens.astype(np.int64) // page_size)
    indptr = _indptr(counts)
    out.indices[: indptr[-1]] = block_table[np.arange(block_table.shape[1]) < counts[:, None]]
    _write_rows(out, indptr, {"last_page_len": np.where(counts > 0, seq_lens - (counts - 1) * page_size, 0)})


def to_block_table(table: TableArrays, max_pages_per_seq: int) -> np.ndarray:
    """The dense form: int32 [batch, max_pages_per_seq], -1 where there is no page."""
    pages = np.diff(table.indptr)
    block_table = np.full((pages.size, max_pages_per_seq), -1, np.int32)
    block_table[np.arange(max_pages_per_seq) < pages[:, None]] = table.indices[table.indptr[0] : table.indptr[-1]]
    return block_table


def table_slots(table: TableArrays, batch_indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Slot (page*page_size + offset, int64 [n]) of each position of its request; -1 where the table lacks that page."""
    page, slot = np.divmod(positions.astype(np.int64), table.page_size)
    behind = page - (0 if table.page_offset is None else table.page_offset[batch_indices])
    local = behind // table.page_stride
    entry = table.indptr[batch_indices] + local
    held = (behind >= 0) & (local * table.page_stride == behind) & (entry < table.indptr[batch_indices + 1])
    slots = np.full(page.shape, -1, np.int64)
    slots[held] = table.indices[entry[held]].astype(np.int64) * table.page_size + slot[held]
    return slots


def check_table(table: TableArrays, num_pages: int) -> PageTableError | None:
    """Check the table in full; what is wrong with it is kept for raise_word."""
    try:
        check_table_values(table, num_pages)
    except PageTableError as fault:
        return fault
    return None


def raise_word(word: PageTableError | None) -> None:
    if word is not None:
        raise word


def raise_device_status(device: str) -> None:
    """A CPU has nothing to report late: every value is checked before it is used."""


def update_table(
    page_lists: np.ndarray,
    update_index: np.ndarray,
    update_value: np.ndarray,
    starts: np.ndarray,
    indptr: np.ndarray,
    per_row: dict[str, np.ndarray],
    out: Any,
) -> None:
    """Change entries of the arena of page ids, then gather the batch's pages from it into `out`.

    Those of request i are at starts[i], starts[i] + page_stride, ...; per_row: what `out` gets of each request, by the
    name of its array there.
    """
    page_lists[update_index] = update_value
    counts = np.diff(indptr)
    steps = ranges(np.zeros_like(starts), counts) * out.page_stride
    out.indices[: indptr[-1]] = page_lists[np.repeat(starts, counts) + steps]
    _write_rows(out, indptr, per_row)


def _indptr(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _write_rows(out: Any, indptr: np.ndarray, per_row: dict[str, np.ndarray]) -> None:
    """Rows of `out` past the batch have no page, and 0 in the arrays per_row."""
    out.indptr[: indptr.size] = indptr
    out.indptr[indptr.size :] = indptr[-1]
    for name, values in per_row.items():
        array = getattr(out, name)
        array[: values.size] = values
        array[values.size :] = 0


# -- the pool ----------------------------------------------------------------------------------------------------------


def append(kv: KVPages, slots: np.ndarray, k: np.ndarray, v: np.ndarray, signature: Any) -> None:
    """Write k, v [tokens, num_kv_heads, head_dim] to slots [tokens]; a slot outside the pool is skipped.

    signature: by which the other backend knows a repetition.
    """
    valid = (slots >= 0) & (slots < kv.num_pages * kv.page_size)
    page, offset = np.divmod(slots[valid], kv.page_size)
    for pages, tokens in ((kv.k_pages, k), (kv.v_pages, v)):
        _by_token(pages, kv)[page, offset] = tokens[valid]


def copy_pages(storage: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
    """storage[:, target] = storage[:, source] for all layers of storage [num_layers, num_pages, K and V of a page]."""
    storage[:, target] = storage[:, source]


def _by_token(pages: np.ndarray, kv: KVPages) -> np.ndarray:
    """View of the pool as [page, slot, head, dim], whatever its layout."""
    return pages if kv.layout == "NHD" else pages.swapaxes(1, 2)


# -- attention ---------------------------------------------------------------------------------------------------------


class Plan:
    """A copy of one step's metadata, as requests; run() reads nothing else of it.

    A request's result depends on that request alone, so every plan here is batch invariant.
    """

    def __init__(self, device: str, **options: Any) -> None:
        """options: capacities and wishes, which only the other backend needs to know."""
        self._requests: list[Request] = []

    def update(self, spec: AttentionSpec, table: TableArrays, qo_indptr: np.ndarray | None) -> None:
        """Take over a step's table."""
        batch_size, indptr = table.batch_size, table.indptr
        if qo_indptr is None:
            assert spec.q_len is not None
            qo_indptr = np.arange(batch_size + 1) * spec.q_len
        page_ids, kv_lens = table.indices.copy(), seq_lens(table)
        total_lens = kv_lens if table.total_len is None else table.total_len
        page_offsets = np.zeros_like(kv_lens) if table.page_offset is None else table.page_offset
        self._requests = [
            Request(
                page_ids=page_ids[indptr[i] : indptr[i + 1]],
                kv_len=int(kv_lens[i]),
                total_len=int(total_lens[i]),
                page_offset=int(page_offsets[i]),
                page_stride=table.page_stride,
                page_size=table.page_size,
                first_query=int(qo_indptr[i]),
                num_queries=int(qo_indptr[i + 1] - qo_indptr[i]),
            )
            for i in range(batch_size)
        ]

    @np.errstate(all="ignore")
    def run(self, spec: AttentionSpec, arrays: RunArrays, kv: KVPages, addresses: Any, signature: Any) -> None:
        """Rows past the batch become out = 0, lse = -inf. addresses and signature: for the other backend."""
        out, lse = arrays.out, arrays.lse
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
        for request in self._requests:
            for rows, tokens, begin, end in _blocks(spec, request):
                k, v = (_gather(pages, kv, request, tokens) for pages in (kv.k_pages, kv.v_pages))
                seen = begin - tokens.start, end - tokens.start
                block_out, block_lse = _attend(spec, arrays.q[rows], k, v, *seen, arrays.sinks)
                out[rows] = block_out  # a result past float16's range is inf, as on a GPU
                if lse is not None:
                    lse[rows] = block_lse

    def raise_status(self) -> None:
        """Nothing to raise: see raise_device_status."""


def _blocks(spec: AttentionSpec, request: Request) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """Query rows, the local tokens that one of them at least sees, and their limits, block by block."""
    begin, end = kv_limits(request, causal=spec.scoring.causal, window_left=spec.scoring.window_left)
    step = max(1, SCORES_AT_ONCE // (spec.num_qo_heads * max(request.kv_len, 1)))
    for first in range(0, request.num_queries, step):
        last = min(first + step, request.num_queries)
        tokens = slice(int(begin[first]), int(end[last - 1]))  # limits grow from query to query
        rows = slice(request.first_query + first, request.first_query + last)
        yield rows, tokens, begin[first:last], end[first:last]


def _gather(pages: np.ndarray, kv: KVPages, request: Request, tokens: slice) -> np.ndarray:
    """The request's local tokens [tokens.start, tokens.stop) as [tokens, head, dim]; no other page is read."""
    first_page = tokens.start // kv.page_size
    page_ids = request.page_ids[first_page : -(-tokens.stop // kv.page_size)]
    dense = _by_token(pages, kv)[page_ids].reshape(-1, kv.num_kv_heads, pages.shape[-1])
    return dense[tokens.start - first_page * kv.page_size : tokens.stop - first_page * kv.page_size]


def _attend(
    spec: AttentionSpec,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    sinks: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """q [n, qo heads, dim] over k, v [t, kv heads, dim], of which query i sees [begin[i], end[i]) -> out, lse."""
    compute = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    n, num_tokens, group, num_kv_heads = len(q), len(k), spec.group_size, spec.num_kv_heads
    q, k, v = q.astype(compute), k.astype(compute), v.astype(compute)
    q = q.reshape(n, num_kv_heads, group, spec.head_dim).transpose(1, 2, 0, 3)  # [kv head, group, n, dim]
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)  # [kv head, t, dim]
    scores = q.reshape(num_kv_heads, group * n, spec.head_dim) @ k.swapaxes(1, 2)
    scores = scores.reshape(num_kv_heads, group, n, num_tokens) * spec.scoring.sm_scale
    if (soft_cap := spec.scoring.logits_soft_cap) > 0:
        scores = soft_cap * np.tanh(scores / soft_cap)
    token = np.arange(num_tokens)
    seen = (token >= begin[:, None]) & (token < end[:, None])  # [n, t]
    if sinks is not None:
        sinks = sinks.astype(compute).reshape(num_kv_heads, group, 1, 1)
    shift, weights, total = _exponentials(np.where(seen, scores, -np.inf), sinks, axis=-1)
    weighted = _weighted_sum(weights.reshape(num_kv_heads, group * n, num_tokens), seen, v)
    out = weighted.reshape(num_kv_heads, group, n, spec.v_head_dim) / np.where(total == 0, 1, total)
    lse = (shift + np.log(total)).squeeze(-1)
    return (
        out.transpose(2, 0, 1, 3).reshape(n, spec.num_qo_heads, spec.v_head_dim),
        lse.transpose(2, 0, 1).reshape(n, spec.num_qo_heads),
    )


def _weighted_sum(weights: np.ndarray, seen: np.ndarray, v: np.ndarray) -> np.ndarray:
    """sum_x weights[h, i, x] * v[h, x] over the tokens x that row i sees, row after row of a group seeing seen [n, t]:
    weights [heads, group * n, t], v [heads, t, dim] -> [heads, group * n, dim]. The weight of a token that is not seen
    is 0, but 0 * inf would be NaN."""
    finite = np.isfinite(v)
    if finite.all():
        return weights @ v
    seen = np.tile(seen, (weights.shape[1] // len(seen), 1))

    def meets(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Whether a token that `rows` [(heads,) group * n, t] mark is one that `values` [heads, t, dim] mark."""
        return rows.astype(v.dtype) @ values.astype(v.dtype) > 0

    counts = seen & (weights != 0)  # a NaN of a score, too
    sums = weights @ np.where(finite, v, 0)
    sums += np.where(meets(counts, v == np.inf), np.inf, 0)
    sums += np.where(meets(counts, v == -np.inf), -np.inf, 0)  # inf - inf is NaN
    sums[meets(seen, np.isnan(v)) | meets(seen & (weights == 0), np.isinf(v))] = np.nan
    return sums


def _exponentials(scores: np.ndarray, sinks: np.ndarray | None, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A shift m, exp(scores - m), and the sum of these and exp(sinks - m) along `axis` (kept). m is the largest score
    or sink of a row; 0 where all are -inf, and so all exponentials are 0."""
    row_max = scores.max(axis=axis, keepdims=True, initial=-np.inf)
    if sinks is not None:
        row_max = np.maximum(row_max, np.where(sinks == np.inf, -np.inf, sinks))  # exp(inf - inf) would be NaN
    shift = np.where(row_max == -np.inf, 0, row_max)
    weights = np.exp(scores - shift)
    total = weights.sum(axis=axis, keepdims=True)
    return shift, weights, total if sinks is None else total + np.exp(sinks - shift)


# -- merging -----------------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def merge_states(
    v: np.ndarray, s: np.ndarray, out: np.ndarray, lse: np.ndarray, base: float, sinks: np.ndarray | None = None
) -> None:
    """v [rows, num_states, heads, dim], s [rows, num_states, heads] (log to `base`) -> out, lse without that axis.

    A state whose s is -inf or +inf saw no key: its v is not looked at.
    """
    compute = np.dtype(np.float64 if v.dtype == np.float64 else np.float32)
    unit = math.log(base)
    empty = np.isinf(s)
    shift, weights, total = _exponentials(np.where(empty, -np.inf, s.astype(compute) * unit), sinks, axis=1)
    weighted = (weights[..., None] * np.where(empty[..., None], 0, v.astype(compute))).sum(axis=1)
    out[...] = weighted / np.where(total == 0, 1, total).squeeze(1)[..., None]
    lse[...] = (shift + np.log(total)).squeeze(1) / unit


def merge_state(
    v_a: np.ndarray, s_a: np.ndarray, v_b: np.ndarray, s_b: np.ndarray, out: np.ndarray, lse: np.ndarray, base: float
) -> None:
    """merge_states of two: v [rows, heads, dim], s [rows, heads]. out and lse may be v_a and s_a."""
    merge_states(np.stack([v_a, v_b], axis=1), np.stack([s_a, s_b], axis=1), out, lse, base)
