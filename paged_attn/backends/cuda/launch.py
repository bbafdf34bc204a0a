"""Launches of kernels: prepared once a thread, then repeated with other parameters."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import cupy

from ... import compile, lifetimes
from ...compile import Launch, Recipe
from ...recipes import THREADS
from .memory import current_device
from .per_thread import PerThread

MOST_ROW_BLOCKS = 1024

_launches = PerThread()


def prepare(recipe: Recipe, device: str, fields: Mapping[str, Any]) -> Launch:
    """A launch whose parameters are `fields` by name, and zero for the rest.

    A kernel that is compiled and loaded does no harm to a capture that is under way.
    """
    with lifetimes.capture_of_others():
        kernel = compile.kernel(recipe, device)
    return Launch(kernel, recipe.threads, kernel.params(fields), recipe.cluster)


def launch(recipe: Recipe, device: str, grid: int | tuple[int, ...], fields: dict[str, Any]) -> None:
    """Launch a kernel with all the fields of its struct; an array gives its address, None is a null pointer."""
    prepared = _launches.items.get((recipe, device))
    if prepared is None:
        made = prepare(recipe, device, {})
        in_order = operator.itemgetter(*made.params.dtype.names or ())
        prepared = _launches.items[recipe, device] = made, made.writer(), in_order
    made, write, in_order = prepared
    values: list[Any] = []
    for value in in_order(fields):
        kind = type(value)
        if kind is int or kind is float or kind is bool:
            values.append(value)
        elif kind is tuple:
            values += value
        else:
            values.append(0 if value is None else value.data.ptr)
    write(*values)
    stream = cupy.cuda.get_current_stream().ptr
    if isinstance(grid, int):
        made(stream, grid)
    else:
        made(stream, *grid)


def launch_prepared(launch: Launch, stream: int, grid: int) -> None:
    """A prepared launch on a stream of its kernel's device."""
    index = launch.kernel.device_index
    if cupy.cuda.runtime.getDevice() == index:
        launch(stream, grid)
    else:
        with current_device(f"cuda:{index}"):
            launch(stream, grid)


def row_blocks(rows: int, entries: int) -> int:
    """Blocks for the kernels that give every row the same number: some, where rows are few and long."""
    return rows * max(1, min(-(-entries // (rows * 8 * THREADS)), MOST_ROW_BLOCKS // rows))
