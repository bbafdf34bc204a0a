"""Launches of kernels by name, each prepared once a thread and then repeated."""

from __future__ import annotations

import operator
from typing import Any

import cupy

from ... import compile
from .memory import current_device
from .per_thread import PerThread

THREADS = 256
SCAN_THREADS = 1024  # the one block of kernels that scan over a batch
SCAN_BYTES = 256  # its shared memory (table_rows.cuh)
MOST_ROW_BLOCKS = 1024

prepared_launches = PerThread()


def launch(
    name: str,
    device: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    fields: dict[str, Any],
    *,
    shared_bytes: int = 0,
    **constants: Any,
) -> None:
    """Launch kernel `name` with the fields of its struct; an array gives its address, None is a null pointer."""
    key = name, device, block, shared_bytes, *constants.items()
    prepared = prepared_launches.items.get(key)
    if prepared is None:
        kernel = compile.kernel(name, device, shared_bytes=shared_bytes, **constants)
        launch = compile.Launch(kernel, block, kernel.params())
        in_order = operator.itemgetter(*launch.params.dtype.names or ())
        prepared = prepared_launches.items[key] = launch, launch.writer(), in_order
    launch, write, in_order = prepared
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
        launch(stream, grid)
    else:
        launch(stream, *grid)


def launch_prepared(launch: compile.Launch, stream: int, grid: int) -> None:
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
