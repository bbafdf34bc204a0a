"""Launches of kernels: prepared once a thread, then repeated with other parameters."""

from __future__ import annotations

import operator
from typing import Any

import cupy

from ...compile import Launch, Recipe, prepare
from ...lifetimes import PerThread
from .memory import current_device

_launches = PerThread()


def launch(recipe: Recipe, device: str, grid: int | tuple[int, ...], fields: dict[str, Any]) -> None:
    """Launch a kernel with all the fields of its struct, on the device's current stream.

    grid: blocks; of 0 there is nothing to do. fields: by name; an array gives its address, None is a null pointer, and
    fields that the struct lacks are left out.
    """
    if grid == 0:
        return
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
    stream = cupy.cuda.get_current_stream(made.kernel.device_index).ptr
    launch_prepared(made, stream, *((grid,) if isinstance(grid, int) else grid))


def launch_prepared(launch: Launch, stream: int, *grid: int) -> None:
    """A prepared launch on a stream of its kernel's device."""
    index = launch.kernel.device_index
    if cupy.cuda.runtime.getDevice() == index:
        launch(stream, *grid)
    else:
        with current_device(f"cuda:{index}"):
            launch(stream, *grid)
