"""What a communicator is: ranks that exchange their partial results of attention, and merge them.

Each rank attends to the keys it holds, which gives a state (v, s) a row and head, as merge_states takes it. A Merge is
made once for a shape, since it holds buffers that do not move; a call of it is a step of one layer, on CuPy's current
stream of each rank's device. One thread at a time is in a communicator, and all ranks make the same calls in order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from .. import backends
from ..checks import scalars
from ..holders import TableArrays
from ..interop import FLOAT32

T = TypeVar("T")


@dataclass(frozen=True)
class MergeShape:
    """What a Merge is made for; the same on every rank."""

    rows: int  # the most rows of a step: a call of the Merge has as many or fewer
    heads: int  # query heads of the model
    dim: int  # of v, v_head_dim
    partial_dtype: np.dtype  # of v: float32, or the model's dtype
    out_dtype: np.dtype  # of the merged results
    shard: str | None  # None: every rank gets all heads; "heads": rank r gets the r-th of num_ranks equal parts


class Lengths:
    """Checksums of the lengths of a step, on GPUs: of total_len, and of the rank that holds the first page of each
    sequence. They are the same on all ranks. Where tables are on the host, ranks compare them there, and these are 0.

    checksums: uint64 [1] of each rank of this process, on its device; zeros where none are given.
    """

    def __init__(self, ranks: Ranks, checksums: list[Any] | None = None) -> None:
        self.ranks = ranks
        self.checksums = checksums or [backends.of(x).zeros((1,), np.dtype(np.uint64), x) for x in ranks.devices]

    def update(self, tables: list[TableArrays]) -> None:
        """Once a step: the checksums of these tables, one for each rank of this process."""
        for rank, table, checksum in zip(self.ranks.ranks, tables, self.checksums, strict=True):
            backends.of(f"cuda:{checksum.device.id}").table_checksum(table, rank, self.ranks.num_ranks, checksum)

    def status(self) -> None:
        """ValueError where those of the last step differ, if the merges do not say it."""


class Merge:
    """Partial results in, merged results out, for one MergeShape.

    Attributes
    ----------
    way: str, how states travel: "all-gather", "all-to-all by heads", "peer memory", ...
    bytes_a_step: int, what a rank sends to all others together in a step of shape.rows rows.
    """

    way: str
    bytes_a_step: int

    def __init__(self, ranks: Ranks, shape: MergeShape) -> None:
        self.ranks, self.shape = ranks, shape
        self._own: list[tuple[Any, Any]] = []  # of shape.rows rows, made by the first `states`

    def states(self, rows: int) -> list[tuple[Any, Any]]:
        """Where each rank of this process writes its partial results: v [rows, heads, dim] and float32 s [rows, heads],
        in buffers that stay where they are. A row that saw no key has s = -inf, whatever its v."""
        if not self._own:
            shape = self.shape.rows, self.shape.heads
            self._own = [
                (backend.empty((*shape, self.shape.dim), self.shape.partial_dtype, device),
                 backend.empty(shape, FLOAT32, device))
                for device in self.ranks.devices
                for backend in [backends.of(device)]
            ]  # fmt: skip
        return [(v[:rows], s[:rows]) for v, s in self._own]

    def __call__(
        self,
        states: list[tuple[Any, Any]],
        outs: list[Any],
        lses: list[Any],
        sinks: list[Any | None],
        checksums: list[Any | None],
    ) -> None:
        """Exchange and merge, in rank order, so that the bits depend on nothing but the states. All lists have one
        entry for each rank of this process.

        states: what states(rows) returned, written.
        outs: out_dtype [rows, heads, dim] to write; for shard="heads" [rows, heads / num_ranks, dim].
        lses: float32, outs without its last axis, to write.
        sinks: float32 [heads], natural logarithms, which count once; or None.
        checksums: uint64 [1], Lengths.checksums, for an exchange that compares them by itself; None on the CPU.
        """
        raise NotImplementedError

    def status(self) -> None:
        """Raise what a device recorded since the merge was made: TimeoutError, or ValueError where ranks disagree."""


class Ranks:
    """Ranks of which some live in this process: a context manager, which closes itself.

    Attributes
    ----------
    num_ranks: int, ranks of all processes.
    ranks: tuple of ints, those that live in this process, in order.
    devices: tuple of "cpu" or "cuda:<i>", one for each of `ranks`.
    timeout: float, seconds that a rank is waited for.
    """

    num_ranks: int
    ranks: tuple[int, ...]
    devices: tuple[str, ...]
    timeout: float

    def __init__(self, num_ranks: int, ranks: tuple[int, ...], devices: tuple[str, ...], timeout: float) -> None:
        self.num_ranks, self.ranks, self.devices = num_ranks, ranks, devices
        self.timeout = scalars.as_float(timeout, "timeout", minimum=1e-3, rule="pass seconds")
        self.is_closed = False
        self._kept: dict[Hashable, Any] = {}

    def all_gather_bytes(self, messages: list[bytes]) -> list[bytes]:
        """One message of each rank of this process, of any length, becomes one of each rank of all, in rank order.

        TimeoutError where a rank does not come within `timeout`; the communicator is then of no more use.
        """
        raise NotImplementedError

    def prepare(self, shape: MergeShape) -> Merge:
        """A Merge for steps of this shape. Every rank calls it, with the same shape."""
        raise NotImplementedError

    def check_usable(self) -> None:
        """Raise where the communicator is of no more use: RuntimeError if it is closed, TimeoutError if a rank is
        lost."""
        if self.is_closed:
            raise RuntimeError(f"the communicator is closed; make another one ({self!r})")

    def lengths(self) -> Lengths:
        """For the steps of one plan."""
        return Lengths(self)

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What one-shot calls keep from call to call, made where there is none."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def status(self) -> None:
        """Raise what went wrong, in one-shot calls too, as status() of a plan does."""
        for plan in self._kept.values():
            plan.status()

    def close(self) -> None:
        """Give back what the ranks hold. TimeoutError where work that is under way waits for a rank that does not come.
        Nothing happens the second time."""
        self._kept.clear()
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except TimeoutError:
            if error is None:  # else that one is why the ranks do not meet
                raise

    def __repr__(self) -> str:
        here = ", ".join(f"{rank} on {device}" for rank, device in zip(self.ranks, self.devices, strict=True))
        return f"{type(self).__name__}(num_ranks={self.num_ranks}, ranks here: {here})"
