"""The types of one attention call: what it computes (AttentionSpec) and the arrays of one run (RunArrays).

checks/ makes them of what a caller passes, and backends read them. Nothing here checks or computes anything.

A new variant of scores is written in four places:
    1. its keyword in attention.py (and in warm_up.py, where kernels are compiled for it)
    2. here, a number as a field of Scoring (checks/calls.py checks it; a -D constant, if any, in Scoring.constants), or
       an array as a field of RunArrays and a row of RUN_ARRAYS: checks, signatures, addresses and -D constants follow
    3. what it means, in backends/reference.py
    4. what kernels do, in kernels/scores.cuh: a field of its struct Scoring of the same name, and its code
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .interop import FLOAT32

ALIGNMENT = 16  # bytes that kernels load at once


class Scoring(NamedTuple):
    """What turns the product of a query and a key into the weight of a token.

    For the query of head h at position p and the key k[x] of the token at position x:

        score[x]  = sm_scale * <q, k[x]>                     in natural-log units
        score[x]  = c * tanh(score[x] / c)                   with logits_soft_cap = c > 0
        score[x]  = -inf                                     where the query does not see x
        weight[x] = exp(score[x]) / sum(exp(score))          the sum includes exp(sinks[h]) where there are sinks

    Scores may be up to 2**23 in size (in decode they, and <q, k>, up to 2**127).

    Attributes
    ----------
    sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
    causal: bool, whether a query sees no later position; query i of n is at total_len - n + i. Default True.
    window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
    logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
    """

    sm_scale: float | None = None
    causal: bool = True
    window_left: int = -1
    logits_soft_cap: float = 0.0

    def constants(self) -> dict[str, bool]:
        """What kernels are compiled for: -D constants of kernels/scores.cuh."""
        return {"SOFT_CAP": self.logits_soft_cap > 0}


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention call computes, checked: the numbers from which a backend makes its kernels and buffers."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int  # of q and K
    v_head_dim: int  # of V and out
    page_size: int
    num_pages: int
    dtype: np.dtype  # of q, K, V and the pool
    layout: str  # "NHD" or "HND"
    device: str  # "cpu" or "cuda:<i>"
    scoring: Scoring  # with sm_scale as a number
    q_len: int | None  # decode: queries a request; prefill: None

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads

    def out_shape(self, q_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of out for a q of q_shape: the one place where head_dim becomes v_head_dim."""
        return (*q_shape[:-1], self.v_head_dim)


# -- the arrays of a run ---------------------------------------------------------------------------------------------


class RunArrays(NamedTuple):
    """The arrays of one run beside the pool, None where an optional one is not given.

    A backend gets q, out and lse as rows: a decode's [batch, q_len, ...] is [batch * q_len, ...] there, and `out`
    always is an array.
    """

    q: Any  # [rows, num_qo_heads, head_dim]
    out: Any  # [rows, num_qo_heads, v_head_dim]
    lse: Any = None  # [rows, num_qo_heads]
    sinks: Any = None  # [num_qo_heads]

    def with_rows(self, change: Callable[[Any], Any]) -> "RunArrays":
        """The same with those that have rows changed."""
        by_row = (rule.has_rows for rule in RUN_ARRAYS.values())
        return RunArrays(*[change(x) if rows and x is not None else x for x, rows in zip(self, by_row, strict=True)])

    def scored_by(self, *, is_once: bool) -> dict[str, Any]:
        """The given ones of those that change scores, by name: that count once a row, or for each key."""
        named = zip(self, RUN_ARRAYS.items(), strict=True)
        rules = {name: (x, rule) for x, (name, rule) in named if rule.constant and x is not None}
        return {name: x for name, (x, rule) in rules.items() if rule.is_once is is_once}

    def constants(self) -> tuple[str, ...]:
        """What kernels are compiled for beside Scoring.constants."""
        rules = zip(self, RUN_ARRAYS.values(), strict=True)
        return tuple(rule.constant for array, rule in rules if rule.constant and array is not None)


@dataclass(frozen=True)
class RunArray:
    """What checks and launches know of one of them. All but q are C-contiguous, and None where a call lacks them."""

    shape: Callable[[AttentionSpec, tuple[int, ...]], tuple[int, ...]]  # by the spec and the shape of q
    why: str  # where the shape comes from, for messages
    dtypes: tuple[np.dtype | None, ...]  # None: that of the pool
    alignment: int = 4  # bytes: the address of the first element on a GPU is a multiple of it
    is_written: bool = False
    has_rows: bool = True  # its first axis is that of q
    constant: str = ""  # the -D constant of kernels/scores.cuh that is 1 where the array is given
    is_once: bool = False  # counts once a row, so that of partial results merge_states takes it


RUN_ARRAYS = {
    "q": RunArray(
        shape=lambda spec, q_shape: (*q_shape[:-2], spec.num_qo_heads, spec.head_dim),
        why="[rows, num_qo_heads, head_dim]",
        dtypes=(None,),
        alignment=ALIGNMENT,
    ),
    "out": RunArray(
        shape=lambda spec, q_shape: spec.out_shape(q_shape),
        why="as q gives it",
        dtypes=(None, FLOAT32),
        alignment=ALIGNMENT,
        is_written=True,
    ),
    "lse": RunArray(
        shape=lambda spec, q_shape: q_shape[:-1],
        why="as q without its last axis",
        dtypes=(FLOAT32,),
        is_written=True,
    ),
    "sinks": RunArray(
        shape=lambda spec, q_shape: (spec.num_qo_heads,),
        why="one for each query head",
        dtypes=(FLOAT32,),
        has_rows=False,
        constant="SINKS",
        is_once=True,
    ),
}
"""A row for each field of RunArrays, in the order of the fields."""
