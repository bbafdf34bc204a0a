"""What ranks say of the step that they plan, and what they must say alike.

A statement is JSON of what is static, and behind it, where the table is on the host, the lengths: total_len, the rank
that holds the first page of each sequence, and qo_indptr. Ranks that agree make the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..errors import LayoutMismatchError
from ..holders import TableArrays
from ..spec import AttentionSpec

_OF_A_POOL = ("layout", "page_size", "num_kv_heads")  # LayoutMismatchError where these differ
_FAILED = "failed"


def static_statement(spec: AttentionSpec, table: TableArrays, **options: Any) -> bytes:
    """What is the same from step to step. options: of the plan, by name."""
    dtypes = {"dtype": spec.dtype.name, "is_table_on_host": table.device == "cpu"}
    shapes = ("layout", "page_size", "num_kv_heads", "num_qo_heads", "head_dim", "v_head_dim", "q_len")
    said = {name: getattr(spec, name) for name in shapes} | dtypes | spec.scoring._asdict() | options
    return json.dumps(said | {"batch_size": table.batch_size}).encode()


def lengths_statement(table: TableArrays, qo_indptr: Any, rank: int, num_ranks: int) -> bytes:
    """What the host knows of a step's lengths, int32: nothing of a table on the device."""
    total_len = table.total_len
    if table.device != "cpu" or total_len is None:  # None: a rank by itself
        return b""
    first = np.where(total_len > 0, (rank - table.page_offset) % num_ranks, 0)
    qo_indptr = qo_indptr if isinstance(qo_indptr, np.ndarray) else np.zeros(0)
    return b"".join(array.astype(np.int32).tobytes() for array in (total_len, first, qo_indptr))


def failure(error: Exception) -> bytes:
    """The statement of a rank that cannot plan."""
    return json.dumps({_FAILED: f"{type(error).__name__}: {error}"}).encode()


SEPARATOR = b"\n"  # between JSON, which has none here, and lengths


def check_agreement(statements: list[bytes]) -> None:
    """Statements of all ranks, in rank order: ValueError on every rank that sees them, which says who said what."""
    if len(set(statements)) == 1 and not statements[0].startswith(f'{{"{_FAILED}"'.encode()):
        return
    heads, lengths = zip(*(statement.partition(SEPARATOR)[::2] for statement in statements), strict=True)
    said = [json.loads(head) for head in heads]
    for rank, words in enumerate(said):
        if _FAILED in words:
            raise ValueError(f"rank {rank} cannot plan this step, and so no rank does: {words[_FAILED]}")
    for name in said[0]:
        values = [words.get(name) for words in said]
        if len(set(map(str, values))) > 1:
            error = LayoutMismatchError if name in _OF_A_POOL else ValueError
            raise error(f"{name} differs between ranks: {_who_said_what(values)}; plan the same step on every rank")
    _check_lengths([np.frombuffer(part, np.int32) for part in lengths], said[0]["batch_size"])


def _check_lengths(lengths: list[np.ndarray], batch_size: int) -> None:
    """total_len [batch], first rank [batch], and qo_indptr of each rank."""
    num_ranks = len(lengths)
    total_len = np.stack([array[:batch_size] for array in lengths])  # [num_ranks, batch]
    if (differing := np.flatnonzero((total_len != total_len[0]).any(axis=0))).size:
        request = differing[0]
        raise ValueError(
            f"total_len[{request}] differs between ranks: {_who_said_what(total_len[:, request])}; make the same "
            f"appends, forks and truncations on every rank"
        )
    offset = (np.arange(num_ranks)[:, None] - np.stack([x[batch_size : 2 * batch_size] for x in lengths])) % num_ranks
    is_twice = (np.sort(offset, axis=0) != np.arange(num_ranks)[:, None]).any(axis=0) & (total_len[0] > 0)
    if is_twice.any():
        request = int(is_twice.argmax())
        raise ValueError(
            f"a page of request {request} belongs to two ranks: page_offset[{request}] % num_ranks: "
            f"{_who_said_what(offset[:, request])}; each rank has an offset of its own, (rank - first) % {num_ranks}, "
            f"where `first` is the rank that holds the first page"
        )
    for rank, array in enumerate(lengths):
        if not np.array_equal(array[2 * batch_size :], lengths[0][2 * batch_size :]):
            raise ValueError(
                f"qo_indptr differs between ranks: rank 0 said {lengths[0][2 * batch_size :]}, rank {rank} "
                f"{array[2 * batch_size :]}; every rank has all queries"
            )


def _who_said_what(values: Any) -> str:
    """ "ranks 0, 2 said NHD, rank 1 said HND"."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(f"rank{'s' * (len(who) > 1)} {', '.join(who)} said {value}" for value, who in ranks.items())
