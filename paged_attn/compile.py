"""From ``kernels/*.cu`` to a function that can be launched.

A kernel is known by the name of its ``extern "C" __global__`` function. The text of its file is flattened (quoted
includes are put in place), compiled by CuPy's own ``RawModule`` for a ``Recipe``, and launched with one struct of
parameters, which is filled by name.
CuPy and the driver are imported inside functions only.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import install
from .card import card_of
from .lifetimes import capture_of_others

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^;{]*?\)\s*)?(\w+)\s*\(')
_ALIGNMENT = r"(?:__align__|alignas)\s*\(\s*(\d+)\s*\)"
_STRUCT = re.compile(rf"\bstruct\s+(?:{_ALIGNMENT}\s*)?(\w+)\s*\{{([^{{}}]*)\}}\s*;")
_FIELD = re.compile(r"(?:const\s+)?([\w ]+?)\s*(\*?)\s*(?:__restrict__\s*)?\b(\w+)\s*(?:\[\s*(\d+)\s*\])?")
_SCALARS = {"int": "i", "u32": "I", "u64": "Q", "i64": "q", "float": "f"}  # codes of numpy and of struct

MIN_NVRTC = (12, 9)
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


# --- 1. the text -----------------------------------------------------------------------------------------------------


def kernel_dir() -> Path:
    """The folder of the CUDA sources: ``paged_attn/kernels`` in a wheel, ``../kernels`` in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


@cache
def kernel_files() -> dict[str, Path]:
    """Every kernel by the name of its function, with the ``.cu`` file that defines it."""
    files: dict[str, Path] = {}
    for path in sorted(kernel_dir().glob("*.cu")):
        for name in _KERNEL.findall(_COMMENT.sub("", path.read_text(encoding="utf-8"))):
            if files.setdefault(name, path) != path:
                raise ValueError(
                    f"kernel {name} is defined in {files[name].name} and in {path.name}; rename one of them"
                )
    return files


@cache
def load_source(name: str) -> str:
    """The text of the file that defines kernel ``name`` (or of the file ``name``), with its quoted includes in place.

    Each header comes once, where it is first included; ``#line`` directives keep a compiler's messages true. One text
    holds everything because CuPy's disk cache does not look into headers. Raises ValueError for an unknown kernel.
    """
    if name.endswith((".cu", ".cuh")):
        return _flatten(kernel_dir() / name, set())
    if name not in kernel_files():
        raise ValueError(f"there is no kernel {name!r} in {kernel_dir()}; pass one of {', '.join(kernel_files())}")
    return _flatten(kernel_files()[name], set())


def _flatten(path: Path, seen: set[Path]) -> str:
    seen.add(path)
    parts = [f'#line 1 "{path.name}"\n']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if include := _INCLUDE.match(line):
            header = path.parent / include[1]
            if header not in seen:
                parts.append(_flatten(header, seen))
            parts.append(f'#line {number + 1} "{path.name}"\n')
        else:
            parts.append("\n" if line.strip() == "#pragma once" else f"{line}\n")
    return "".join(parts)


def define_options(defines: Mapping[str, Any]) -> tuple[str, ...]:
    """``-DNAME=value`` by name; True and False are 1 and 0."""
    return tuple(f"-D{name}={int(value)}" for name, value in sorted(defines.items()))


def options(arch: str | None, **defines: Any) -> tuple[str, ...]:
    """NVRTC's options for a kernel, on a GPU and in the tests that only compile.

    ``arch`` ("sm_90a") is for architectures that CuPy does not name by itself: it adds ``-arch=sm_90`` on an H100, and
    NVRTC then compiles for sm_90a. CuPy adds ``-ftz=true`` and ``--device-as-default-execution-space``, too.
    """
    return ("-std=c++17", *((f"-arch={arch}",) if arch else ()), *define_options(defines))


# --- 2. the struct of parameters -------------------------------------------------------------------------------------


def params_name(source: str, kernel: str) -> str:
    """The name of the struct that ``kernel`` takes, in ``void kernel(const __grid_constant__ KernelParams p)``."""
    parameter = r"\(\s*const\s+__grid_constant__\s+(\w+)\s+\w+\s*\)"
    declaration = re.search(rf"\b{kernel}\s*{parameter}", _COMMENT.sub("", source))
    if declaration is None:
        raise ValueError(f"the text has no kernel {kernel}(const __grid_constant__ <struct> p)")
    return declaration[1]


@cache
def params_dtype(source: str, struct: str) -> np.dtype[np.void]:
    """The dtype of ``struct`` in a kernel's flattened text, with the offsets that the CUDA compiler gives it.

    A field is a pointer (u8), an int, u32, u64, i64, float, an earlier struct, or an array of one of these, with one
    declarator a line, and no preprocessor directive. Raises ValueError for anything else, and for a struct that the
    text does not have.
    """
    known = {kind: (np.dtype(code), np.dtype(code).itemsize) for kind, code in _SCALARS.items()}
    faults: dict[str, Exception] = {}  # not of structs that live on the device only
    for alignment, name, body in _STRUCT.findall(_COMMENT.sub("", source)):
        try:
            if name in known or name in faults:
                raise ValueError("the text defines it more than once, maybe under #if; give each its own name")
            known[name] = _struct_layout(body, int(alignment or 1), known)
        except ValueError as error:
            known.pop(name, None)
            faults[name] = error
    if struct not in known:
        raise ValueError(f"struct {struct}: {faults.get(struct, 'it is not in the text')}")
    return known[struct][0]


_Layout = tuple[np.dtype[Any], int]  # a type's dtype and alignment


def _struct_layout(body: str, alignment: int, known: Mapping[str, _Layout]) -> _Layout:
    """The layout of a struct with these fields, aligned to `alignment` at least."""
    if directive := re.search(r"#.*", body):
        raise ValueError(
            f"{directive[0].strip()!r} is among its fields, and the host would not know which of them the compiler "
            f"sees; keep every field in every build"
        )
    fields: dict[str, list[Any]] = {"names": [], "formats": [], "offsets": []}
    end = 0
    for declaration in filter(None, map(str.strip, body.split(";"))):
        field = _FIELD.fullmatch(declaration)
        if field is None or not (field[2] or field[1] in known):
            types = ", ".join(_SCALARS)
            raise ValueError(f"{declaration!r} is not one field of type pointer, {types} or an earlier struct")
        dtype, field_alignment = known["u64" if field[2] else field[1]]
        begin = -(-end // field_alignment) * field_alignment
        end = begin + dtype.itemsize * int(field[4] or 1)
        alignment = max(alignment, field_alignment)
        fields["names"].append(field[3])
        fields["formats"].append((dtype, int(field[4])) if field[4] else dtype)
        fields["offsets"].append(begin)
    itemsize = -(-end // alignment) * alignment
    return np.dtype({**fields, "itemsize": itemsize}), alignment  # type: ignore[call-overload]


def fill(params: Any, values: Mapping[str, Any]) -> None:
    """Writes ``values`` into a structured array by the names of its fields.

    An array gives its address and None a null pointer; a nested struct takes a dict, or a tuple in the order of its
    fields. Raises ValueError for an unknown field.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            fill(params[name], value)
        elif value is None:
            params[name] = 0
        elif isinstance(value, np.ndarray):
            params[name] = value.ctypes.data
        elif hasattr(value, "__cuda_array_interface__"):
            params[name] = value.data.ptr
        else:
            params[name] = value


def fast_divide(divisor: int) -> tuple[int, int, int]:
    """``(divisor, multiplier, shift)``, the fields of ``FastDivide``: n // divisor for every 0 <= n < 2**31.

    With 2**(bits - 1) < divisor < 2**bits the multiplier is the least integer above 2**(31 + bits) / divisor. It is
    too large by less than 1, which adds less than n / 2**(31 + bits) < 1 / divisor to a quotient: never a whole step.
    """
    if not 1 <= divisor < 2**31:
        raise ValueError(f"divisor is {divisor}, which is not in [1, 2**31)")
    bits = (divisor - 1).bit_length()
    if divisor == 1 << bits:
        return divisor, 0, bits
    return divisor, (1 << (31 + bits)) // divisor + 1, bits - 1


# --- 3. the function and its launches --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a kernel is compiled and launched: all but its parameters, the grid and the stream."""

    kernel: str
    constants: tuple[tuple[str, int], ...] = ()  # -D
    threads: int | tuple[int, ...]  # of a block
    shared_bytes: int = 0  # dynamic shared memory of a block
    cluster: int = 1  # neighbouring blocks that start together

    @property
    def num_threads(self) -> int:
        return int(np.prod(self.threads))


class _LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute`` of cuda.h; ``value`` is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16))


_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: value is (x, y, z) in blocks


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        *((f"{extent}_{axis}", ctypes.c_uint) for extent in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def _launch_function() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return function


class Launch:
    """A launch that is prepared once and repeated: only ``params``, the grid and the stream change.

    ``params`` is a structured array; the kernel gets what is stored there when the launch is called.
    ``cluster`` is the number of neighbouring blocks that start together on one part of the card (above 1: compute
    capability 9.0 and later); it divides the grid.
    """

    def __init__(
        self, kernel: Kernel, block: int | tuple[int, ...], params: np.ndarray[Any, Any], cluster: int = 1
    ) -> None:
        if params.dtype != kernel.dtype or params.ndim or not params.flags.c_contiguous:
            raise ValueError(f"params has dtype {params.dtype}; pass what the kernel's own params() gives")
        self.kernel = kernel
        self.params = params
        extents = (block,) if isinstance(block, int) else block
        self._config = _LaunchConfig(1, 1, 1, *(*extents, 1, 1)[:3], kernel.shared_bytes)
        if cluster > 1:
            self._cluster = _LaunchAttribute(_CLUSTER_DIMENSION, 0, (cluster, 1, 1))
            self._config.attributes, self._config.num_attributes = ctypes.addressof(self._cluster), 1
        self._arguments = (ctypes.c_void_p * 1)(params.ctypes.data)
        self._launch = _launch_function()
        self._configured_for: tuple[int, ...] | None = None  # the stream and the grid written to the config
        # Plain addresses are the cheapest arguments that ctypes knows.
        self._config_address = ctypes.addressof(self._config)
        self._arguments_address = ctypes.addressof(self._arguments)

    def writer(self, first: str | None = None, last: str | None = None) -> Callable[..., None]:
        """A function that writes the fields from `first` to `last` (None: all) in one go, in the struct's order.

        It takes one int or float a field, and those of a nested struct one by one. Addresses are ints.
        """
        fields, names = self.params.dtype.fields or {}, list(self.params.dtype.names or ())
        names = names[names.index(first) if first else 0 : names.index(last) + 1 if last else None]
        codes, begin = "=", fields[names[0]][1]
        end = begin
        for field, offset, *_ in (fields[name] for name in names):
            for part, inside, *_ in (field.fields or {"": (field, 0)}).values():
                codes += "x" * (offset + inside - end) + part.char
                end = offset + inside + part.itemsize
        record = struct.Struct(codes)
        return functools.partial(record.pack_into, self.params.reshape(1).view(np.uint8).data, begin)

    def __call__(self, stream: int, grid_x: int, grid_y: int = 1, grid_z: int = 1) -> None:
        """Launches on ``stream`` (its address, ``cupy.cuda.Stream.ptr``). The kernel's device is the current one."""
        wanted = stream, grid_x, grid_y, grid_z
        if wanted != self._configured_for:  # the fields of a ctypes structure are slow
            config = self._config
            config.stream, config.grid_x, config.grid_y, config.grid_z = wanted
            self._configured_for = wanted
        error = self._launch(self._config_address, self.kernel.function_pointer, self._arguments_address, None)
        if error:
            self._recover(error)

    def _recover(self, error: int) -> None:
        from cupy.cuda import driver, runtime

        if error == _INVALID_CONTEXT:  # a thread that has not used CUDA so far: CuPy would make the context current
            runtime.setDevice(self.kernel.device_index)
            error = self._launch(self._config_address, self.kernel.function_pointer, self._arguments_address, None)
        if error:
            raise driver.CUDADriverError(error)


class Kernel:
    """One compiled kernel on one device. Made by :func:`kernel`.

    ``dtype`` is that of its parameters, ``function_pointer`` the driver's ``CUfunction``.
    """

    def __init__(self, name: str, device: str, shared_bytes: int, constants: tuple[tuple[str, int], ...]) -> None:
        source = load_source(name)
        self.name = name
        self.device_index = int(device.removeprefix("cuda:"))
        self.shared_bytes = shared_bytes
        self.dtype = params_dtype(source, params_name(source, name))
        module = _module(kernel_files()[name], device, constants)
        with _device(device), capture_of_others():  # which a module that is loaded does not disturb
            self._function = module.get_function(name)  # keeps the module loaded
            if shared_bytes > 48 * 1024:  # what a launch gets without asking
                self._function.max_dynamic_shared_size_bytes = shared_bytes
            self.function_pointer: int = self._function.kernel.ptr

    def params(self, values: Mapping[str, Any] | None = None) -> np.ndarray[Any, Any]:
        """A fresh structured array of the kernel's parameters, ``values`` filled in by name and the rest zero."""
        params = np.zeros((), self.dtype)
        fill(params, values or {})
        return params


@cache
def _module(path: Path, device: str, constants: tuple[tuple[str, int], ...]) -> Any:
    """A file of kernels, compiled once a device and set of constants."""
    import cupy

    _check_nvrtc()
    with _device(device):
        given = options(card_of(device).arch, **dict(constants))
        return cupy.RawModule(code=load_source(path.name), options=given)


def kernel(recipe: Recipe, device: str) -> Kernel:
    """The kernel of a recipe compiled for ``device`` ("cuda:0"); the same object every time.

    Raises ImportError where CuPy or an NVRTC of 12.9 or later is missing, with the command that installs it.
    """
    return _kernel(recipe.kernel, device, recipe.shared_bytes, recipe.constants)


_kernel = cache(Kernel)


def prepare(recipe: Recipe, device: str, fields: Mapping[str, Any]) -> Launch:
    """A launch whose parameters are `fields` by name, and zero for the rest."""
    made = kernel(recipe, device)
    return Launch(made, recipe.threads, made.params(fields), recipe.cluster)


def _device(device: str) -> Any:
    import cupy

    return cupy.cuda.Device(int(device.removeprefix("cuda:")))


@cache
def _check_nvrtc() -> None:
    from cupy.cuda import nvrtc

    try:
        version = nvrtc.getVersion()
    except RuntimeError as error:  # CuPy is there, but no libnvrtc
        raise ImportError(f"CuPy finds no NVRTC, which compiles the kernels; {_hint()}") from error
    if version < MIN_NVRTC:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, MIN_NVRTC))
        raise ImportError(f"the kernels need NVRTC {needed} or later and CuPy finds {found}; {_hint()}")


def _hint() -> str:
    return f"install it with {install.for_cuda(install.TOOLKIT, where='beside cupy-cuda{}x')}"
