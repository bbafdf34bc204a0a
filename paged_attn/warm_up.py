"""Compiling ahead: all that calls of given shapes can need, so that nothing compiles while serving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import compile, recipes
from .card import Card, card_of
from .checks.scalars import as_bool, as_int
from .compile import Recipe
from .interop import any_dtype, as_dtype, resolve_device
from .spec import RUN_ARRAYS, AttentionSpec, Scoring
from .support import check_op, check_supported


def warm_up(
    op: str,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: Any,
    kv_dtype: Any = None,
    page_size: int,
    q_len: int = 1,
    max_batch_size: int | None = None,
    sinks: bool = False,
    soft_cap: bool = False,
    device: Any = None,
) -> None:
    """Compile all kernels that calls of these shapes can need: after it no such call compiles anything.

    The kernels of page tables, caches and plans are included, with and without batch_invariant, for results in dtype
    and in float32. They are compiled in parallel, with a progress bar on a terminal; the next process finds them in
    CuPy's cache on disk. On the CPU there is nothing to compile. Left out is what only arrays of unusual strides need:
    prefill on Hopper over pools that its kernel cannot count in, merges of states not aligned to 16 bytes.

    Parameters
    ----------
    op: "append", "decode", "prefill" or "merge".
    num_qo_heads, num_kv_heads, head_dim, page_size: ints, those of the model and its cache.
    v_head_dim: int, elements of a value. Default None: head_dim.
    dtype: "float16" or "bfloat16", or such a NumPy dtype: that of q, new K and V, and the pool.
    kv_dtype: the number format of the pool. Default None: dtype, and the only one so far.
    q_len: int, queries of each request of a decode. Default 1.
    max_batch_size: int, the most requests of a decode. Default None: any number.
    sinks, soft_cap: bools, whether the model has them. Default False.
    device: "cuda", "cuda:1", "cpu", ... Default None: the current CUDA device where there is one, else the CPU.

    Raises
    ------
    ValueError, TypeError: wrong numbers, dtypes and devices; NotImplementedError: see `supports`; ImportError: CuPy or
    NVRTC is missing.
    """
    check_op(op)
    shapes = Shapes(
        num_qo_heads=as_int(num_qo_heads, "num_qo_heads", minimum=1),
        num_kv_heads=as_int(num_kv_heads, "num_kv_heads", minimum=1),
        head_dim=as_int(head_dim, "head_dim", minimum=1),
        v_head_dim=as_int(head_dim if v_head_dim is None else v_head_dim, "v_head_dim", minimum=1),
        dtype=as_dtype(dtype),
        page_size=as_int(page_size, "page_size", minimum=1),
        q_len=as_int(q_len, "q_len", minimum=1),
        max_batch_size=None if max_batch_size is None else as_int(max_batch_size, "max_batch_size", minimum=1),
        scored_by=("sinks",) if as_bool(sinks, "sinks") else (),
        soft_cap=as_bool(soft_cap, "soft_cap"),
    )
    if num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads={num_qo_heads} is not a multiple of num_kv_heads={num_kv_heads}; pass those of one model"
        )
    if kv_dtype is not None and any_dtype(kv_dtype, "kv_dtype") != shapes.dtype:
        raise NotImplementedError(
            f"kv_dtype is {any_dtype(kv_dtype)} and dtype {shapes.dtype}, and pools have the dtype of q so far; leave "
            f"kv_dtype out"
        )
    resolved = resolve_device(device)
    check_supported(op, resolved, shapes.dtype, shapes.head_dim, shapes.v_head_dim)
    if resolved != "cpu":
        compile_all(needed_recipes(op, shapes, card_of(resolved)), resolved)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the calls of a model have, by the arguments of warm_up."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: np.dtype
    page_size: int
    q_len: int = 1
    max_batch_size: int | None = None
    scored_by: tuple[str, ...] = ()  # names of RUN_ARRAYS
    soft_cap: bool = False

    def spec(self, op: str) -> AttentionSpec:
        """Of a call of decode or prefill: what recipes read of it."""
        return AttentionSpec(
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            page_size=self.page_size,
            num_pages=1,
            dtype=self.dtype,
            layout="NHD",
            device="cuda:0",
            scoring=Scoring(logits_soft_cap=float(self.soft_cap)),
            q_len=self.q_len if op == "decode" else None,
        )


def needed_recipes(op: str, shapes: Shapes, card: Card) -> Iterator[Recipe]:
    """What calls of these shapes can need, but for prefill on Hopper with arrays that only the portable kernel takes
    (recipes.HopperPrefillRecipe.accepts)."""
    yield from recipes.TABLES
    if op != "merge":
        yield recipes.append_recipe(shapes.num_kv_heads, shapes.head_dim, shapes.v_head_dim)
    rules = [RUN_ARRAYS[name] for name in shapes.scored_by]
    attending: list[Recipe] = []
    if op == "merge":
        attending = list(recipes.merge_recipes(shapes.num_qo_heads, shapes.v_head_dim, shapes.dtype))
        rules = [rule for rule in rules if rule.is_once]
    elif op == "decode":
        yield from (recipes.PLAN_REQUESTS, recipes.PLAN_SPLITS)
        attending = [*recipes.decode_recipes(shapes.spec(op), shapes.max_batch_size, card)]
    elif op == "prefill":
        yield recipes.PLAN_REQUESTS
        in_order = [recipes.prefill_recipes(shapes.spec(op), card, is_long=is_long) for is_long in (False, True)]
        attending = [recipe for preferred, *others in in_order for recipe in (preferred, *others[:-1])]
        if isinstance(attending[0], recipes.HopperPrefillRecipe):
            yield recipes.PLAN_TILES
    yield from attending
    constants = [rule.constant for rule in rules]
    yield from (recipes.with_constants(recipe, constants) for recipe in attending if constants)


def compile_all(needed: Iterator[Recipe], device: str) -> None:
    """Compile in parallel; each file once for each set of constants, then all its kernels."""
    from rich.console import Console
    from rich.progress import Progress

    builds: dict[Any, dict[Recipe, None]] = {}
    for recipe in needed:
        builds.setdefault((compile.kernel_files()[recipe.kernel], recipe.constants), {})[recipe] = None

    def build(recipes: dict[Recipe, None]) -> None:
        for recipe in recipes:
            compile.kernel(recipe, device)

    console = Console(stderr=True)
    with (
        ThreadPoolExecutor(min(len(builds), os.cpu_count() or 1)) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("paged_attn: compiling", total=len(builds))
        for done in as_completed([pool.submit(build, each) for each in builds.values()]):
            done.result()
            progress.advance(task)
