"""Runs a kernel of ``kernels/`` on NumPy arrays, without a GPU: its text is compiled by g++ with ``simt.h`` in front.

    from tests.simt.driver import launch

    k_pages = np.zeros((num_pages, page_size, heads, dim), np.uint16)       # 16-bit numbers travel as their bits
    launch(
        "append",                                # the name of the extern "C" __global__ function
        grid=(num_blocks, 1, 1),                 # or just num_blocks
        block=(256, 1, 1),                       # or just 256
        params={                                 # fields of the kernel's struct; those left out are 0 / null
            "k_pages": k_pages,                  # an array gives its address, and must be kept alive only by the call
            "num_tokens": 17,
            "page_size": fast_divide(16),        # a nested struct: a tuple in its fields' order, or a dict
            "kv_strides": {"page": 64},
        },
        shared_bytes=0,                          # dynamic shared memory
        BFLOAT16=0,                              # the -D constants
    )

A wrong kernel raises ``SimtError`` with the block and thread: a collective that a part of its threads does not reach,
two collectives that meet, a misaligned or out-of-range shared address. Run it with ``reverse=True`` too: the threads
then take their turns in the opposite order, which shows many a missing barrier.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from paged_attn import compile as kernels
from tests import private_cache

_SHIM = Path(__file__).with_name("simt.h")
_COMPILER = ("g++", "-std=c++17", "-O2", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-w")
_ENTRY = """
#line 1 "entry"
extern "C" const char* simt_message() { return simt::message; }
extern "C" int simt_launch(const void* params, const unsigned* grid, const unsigned* block, unsigned bytes,
                           int reverse) {
    return simt::launch([](const void* p) { KERNEL(*(const PARAMS*)p); }, params, grid, block, bytes, reverse);
}
extern "C" unsigned simt_params_bytes() { return sizeof(PARAMS); }
"""


class SimtError(RuntimeError):
    """A kernel broke a rule of CUDA's collectives or of its shared memory."""


@cache
def _shim_text() -> str:
    """simt.h and the twins that it includes."""
    return "".join(path.read_text() for path in (_SHIM, *sorted(_SHIM.with_name("twins").glob("*.h"))))


@cache
def build(source: str, kernel: str, defines: tuple[tuple[str, Any], ...], instance: int = 0) -> ctypes.CDLL:
    """The shared library of ``kernel`` in ``source`` (a flattened text). Each instance has globals of its own."""
    if shutil.which(_COMPILER[0]) is None:  # a failure even where the library stands in the cache
        raise SimtError(f"{_COMPILER[0]} is not on the PATH, and the kernels' tests need it; apt-get install g++")
    entry = _ENTRY.replace("KERNEL", kernel).replace("PARAMS", kernels.params_name(source, kernel))
    command = (*_COMPILER, *kernels.define_options(dict(defines)), "-include", str(_SHIM))
    text = source + entry
    key = hashlib.sha256("\0".join((text, _shim_text(), *command)).encode()).hexdigest()[:24]
    cache_folder = private_cache.folder("simt")
    library = cache_folder / f"{kernel}-{key}.so"

    def compile_to(path: Path) -> None:
        result = subprocess.run(
            (*command, "-x", "c++", "-", "-o", str(path)), input=text, text=True, capture_output=True
        )
        if result.returncode:
            raise SimtError(f"g++ does not compile kernel {kernel}:\n{result.stderr}")

    _make(library, compile_to)
    if instance:  # a file of its own is loaded apart
        first, library = library, library.with_stem(f"{library.stem}-{instance}")
        _make(library, partial(shutil.copy, first))
    loaded = ctypes.CDLL(str(library))
    loaded.simt_message.restype = ctypes.c_char_p
    return loaded


def _make(file: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there as a whole or not at all, whoever else makes it."""
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            unfinished = Path(folder) / file.name
            write(unfinished)
            unfinished.replace(file)


def launch(
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    params: Mapping[str, Any] | np.ndarray,
    shared_bytes: int = 0,
    *,
    source: str | None = None,
    reverse: bool = False,
    instance: int = 0,
    **defines: Any,
) -> None:
    """Runs ``kernel`` to its end. ``source`` is its text, by default that of the file in kernels/ that defines it.

    Launches that run at the same time, in threads, need instances of their own.
    """
    text = kernels.load_source(kernel) if source is None else source
    library = build(text, kernel, tuple(sorted(defines.items())), instance)
    dtype = kernels.params_dtype(text, kernels.params_name(text, kernel))
    if dtype.itemsize != library.simt_params_bytes():
        raise SimtError(f"{kernel}: params_dtype has {dtype.itemsize} bytes, g++ {library.simt_params_bytes()}")
    packed = params
    if isinstance(params, Mapping):
        packed = np.zeros((), dtype)
        kernels.fill(packed, params)
    error = library.simt_launch(
        ctypes.c_void_p(packed.ctypes.data), _extent(grid), _extent(block), shared_bytes, reverse
    )
    if error:
        raise SimtError(f"{kernel}: {library.simt_message().decode()}")


def _extent(extent: int | tuple[int, ...]) -> ctypes.Array[ctypes.c_uint]:
    sizes = (extent,) if isinstance(extent, int) else tuple(extent)
    return (ctypes.c_uint * 3)(*sizes, *(1,) * (3 - len(sizes)))
