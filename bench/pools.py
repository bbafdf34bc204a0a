"""Merging partial results, and appending new tokens: inputs, the calls on them, and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import DTYPES, LSE_TOLERANCE, OUT_TOLERANCE, AppendCase, MergeCase, assert_close

from .workload import random_normal, to_host

CHECKED_ROWS = 64


@dataclass(frozen=True)
class Merge:
    """States to be merged: v [rows, num_states, heads, dim], s float32 [rows, num_states, heads] to base 2."""

    case: MergeCase
    v: Any
    s: Any

    @classmethod
    def build(cls, case: MergeCase, xp: ModuleType) -> Merge:
        shape = (case.rows, case.num_states, case.num_heads)
        s = np.random.default_rng(1).standard_normal(shape, np.float32) * 4
        return cls(case, random_normal(xp, (*shape, case.head_dim), DTYPES[case.dtype], seed=0), xp.asarray(s))

    @property
    def read_bytes(self) -> int:
        return self.v.nbytes + self.s.nbytes

    def run(self, library: Any = pa) -> Callable[[], Any]:
        """The library's call with arrays bound; it returns (out, lse)."""
        if self.case.num_states == 2:
            parts = [part.copy() for part in (self.v[:, 0], self.s[:, 0], self.v[:, 1], self.s[:, 1])]
            out, lse = library.merge_state(*parts, base=2)
            return partial(library.merge_state, *parts, base=2, out=out, lse=lse)
        out, lse = library.merge_states(self.v, self.s, base=2)
        return partial(library.merge_states, self.v, self.s, base=2, out=out, lse=lse)

    def check(self, out: Any, lse: Any = None) -> None:
        """AssertionError if the first, the last or another of some rows is wrong."""
        expected_out, expected_lse = self._expected
        assert_close(
            self._checked_rows(out), expected_out, None if lse is None else self._checked_rows(lse), expected_lse,
            tolerance=OUT_TOLERANCE[self.case.dtype], lse_tolerance=LSE_TOLERANCE,
        )  # fmt: skip

    @cached_property
    def _expected(self) -> tuple[np.ndarray, np.ndarray]:
        return pa.merge_states(self._checked_rows(self.v).astype(np.float64), self._checked_rows(self.s), base=2)

    def _checked_rows(self, array: Any) -> np.ndarray:
        rows = np.unique(np.linspace(0, self.case.rows - 1, CHECKED_ROWS).astype(int)).tolist()
        return np.stack([to_host(array[row]) for row in rows])


@dataclass(frozen=True)
class Append:
    """New tokens for sequences that have the same number of old ones.

    k, v [tokens, num_kv_heads, head_dim]; slots int64 [tokens]; batch_indices, positions int32 [tokens]: the same slots
    as a request of `table` and a position in it, for peers that take these.
    """

    case: AppendCase
    kv: pa.PagedKV
    table: pa.PageTable
    k: Any
    v: Any
    slots: Any
    batch_indices: Any
    positions: Any

    @classmethod
    def build(cls, case: AppendCase, xp: ModuleType, old_tokens: int = 1000) -> Append:
        new_tokens = case.tokens // case.batch_size
        kv_len = old_tokens + new_tokens
        pages = -(-kv_len // case.page_size)
        random = np.random.default_rng(0)
        indptr = np.arange(case.batch_size + 1, dtype=np.int32) * pages
        indices = random.permutation(indptr[-1]).astype(np.int32)
        last_page_len = np.full(case.batch_size, kv_len - (pages - 1) * case.page_size, np.int32)
        table = pa.PageTable(*map(xp.asarray, (indptr, indices, last_page_len)), page_size=case.page_size)
        batch_indices = np.repeat(np.arange(case.batch_size, dtype=np.int32), new_tokens)
        positions = np.tile(np.arange(old_tokens, kv_len, dtype=np.int32), case.batch_size)
        slots = indices[indptr[batch_indices] + positions // case.page_size].astype(np.int64) * case.page_size
        axes = (case.page_size, case.num_kv_heads) if case.layout == "NHD" else (case.num_kv_heads, case.page_size)
        dtype, shape = DTYPES[case.dtype], (case.tokens, case.num_kv_heads, case.head_dim)
        storage = xp.zeros((2, len(indices), *axes, case.head_dim), np.uint16).view(dtype)
        return cls(
            case=case,
            kv=pa.PagedKV(storage[0], storage[1], layout=case.layout),
            table=table,
            k=random_normal(xp, shape, dtype, 1),
            v=random_normal(xp, shape, dtype, 2),
            slots=xp.asarray(slots + positions % case.page_size),
            batch_indices=xp.asarray(batch_indices),
            positions=xp.asarray(positions),
        )

    def run(self, library: Any = pa) -> Callable[[], Any]:
        """The library's call with arrays bound."""
        kv = library.PagedKV(self.kv.k_pages, self.kv.v_pages, layout=self.case.layout)
        return partial(library.append, kv, self.slots, self.k, self.v)

    def check(self, _: Any = None) -> None:
        """AssertionError unless the pool holds the new tokens and zeros elsewhere. It then holds zeros only."""
        for name, pages, tokens in (("k", self.kv.k_pages, self.k), ("v", self.kv.v_pages, self.v)):
            bits = pages.view(np.uint16)
            by_token = bits if self.case.layout == "NHD" else bits.swapaxes(1, 2)
            written = by_token[self.slots // self.case.page_size, self.slots % self.case.page_size]
            wrong = int((written != tokens.view(np.uint16)).any(axis=(1, 2)).sum())
            assert not wrong, f"{wrong} of {self.case.tokens} tokens of {name} are not what was appended"
            beside = int((bits != 0).sum()) - int((written != 0).sum())
            assert not beside, f"{beside} elements of {name} were written beside the slots"
            bits[...] = 0
