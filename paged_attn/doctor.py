"""``python -m paged_attn doctor``: what is installed, which kernels compile for the card, and whether they are right.

Three sections of findings. What a probe raises becomes a finding with its reason, so that one broken part hides no
other. The GPU path is usable where no finding is bad; JAX, and whatever can only be looked at on a card, is a note.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import paged_attn as pa
from paged_attn import compile, install
from paged_attn.card import A100, H100, Card, card_of
from paged_attn.compile import Recipe
from paged_attn.install import BINDINGS, CUPY, TOOLKIT
from paged_attn.support import OPS
from paged_attn.warm_up import Shapes, needed_recipes

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
OUT_TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}  # ||error|| / ||reference|| of one check
HEAD_DIM, NUM_QO_HEADS, NUM_KV_HEADS = 128, 8, 2
CARDS = (A100, H100)  # what kernels are compiled for where there is no card
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class Verdict(StrEnum):
    GOOD = "ok"
    NOTE = "note"
    BAD = "failed"


STYLES = {Verdict.GOOD: "green", Verdict.NOTE: "dim", Verdict.BAD: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line. `command` installs what is missing."""

    name: str
    verdict: Verdict
    text: str
    command: str = ""


Probe = Callable[[], list[Finding]]
Say = Callable[[str], None]  # gets the name of what is looked at next


def in_silence(name: str) -> None:
    """A Say that says nothing."""


def run(options: argparse.Namespace) -> int:
    """Look, compile, check and print; the exit status is 0 where the GPU path is usable, else 1."""
    console = Console(highlight=False, markup=False)
    findings: list[Finding] = []
    for title, section in (("found", found), ("kernels", kernels), ("checks", checks)):
        lines = watch(console, title, section)
        show(console, title, lines)
        findings += lines
    conclude(console, findings)
    return int(any(finding.verdict is Verdict.BAD for finding in findings))


def watch(console: Console, title: str, section: Callable[[Say], Iterable[Finding]]) -> list[Finding]:
    """The findings of a section; a terminal shows meanwhile what is looked at."""
    with console.status(f"{title} ...") as status:
        return list(section(lambda name: status.update(f"{title}: {name} ...")))


def attempt(name: str, probe: Probe) -> list[Finding]:
    """What a probe finds; what it raises is found, too."""
    try:
        return probe()
    except Exception as error:
        return [Finding(name, Verdict.BAD, reason(error))]


def reason(error: Exception) -> str:
    """One line of an error: of a compiler's log, the first that speaks of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return f"{type(error).__name__}: {line}"


# -- 1. what is there --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundCard:
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    cuda: tuple[int, int]  # the newest CUDA that it runs
    cards: tuple[FoundCard, ...]


def found(say: Say = in_silence) -> Iterator[Finding]:
    probes: dict[str, Probe] = {
        "paged_attn": find_paged_attn,
        "Python": find_python,
        "numpy": functools.partial(find_module, np),
        "ml_dtypes": functools.partial(find_module, ml_dtypes),
        "NVIDIA driver": find_driver,
        "CuPy": find_cupy,
        "CUDA runtime": find_runtime,
        "NVRTC": find_nvrtc,
        "GPU support": find_support,
        "JAX": find_jax,
    }
    for name, probe in probes.items():
        say(name)
        yield from attempt(name, probe)


def find_paged_attn() -> list[Finding]:
    folder, count = Path(pa.__file__).parent, len(compile.kernel_files())
    verdict = Verdict.GOOD if count else Verdict.BAD
    return [Finding("paged_attn", verdict, f"{pa.__version__} in {folder}, {count} kernels in {compile.kernel_dir()}")]


def find_python() -> list[Finding]:
    return [Finding("Python", Verdict.GOOD, f"{platform.python_version()}, {sys.executable}")]


def find_module(module: ModuleType) -> list[Finding]:
    return [Finding(module.__name__, Verdict.GOOD, module.__version__)]


def find_driver() -> list[Finding]:
    try:
        driver = read_driver()
    except OSError as error:
        text = f"none ({error}); install NVIDIA's driver, which pip cannot do"
        return [Finding("NVIDIA driver", Verdict.BAD, text)]
    findings = [Finding("NVIDIA driver", Verdict.GOOD, f"for CUDA {dotted(driver.cuda)} and earlier")]
    if not driver.cards:
        text = "the driver sees none; nvidia-smi lists them, and CUDA_VISIBLE_DEVICES can hide them"
        return [*findings, Finding("card", Verdict.BAD, text)]
    for i, card in enumerate(driver.cards):
        size = f"{card.memory_bytes / 2**30:.0f} GiB"
        text = f"{card.name}, compute capability {dotted(card.compute_capability)}, {size}"
        findings.append(Finding(f"card {i}", Verdict.GOOD, text))
    return findings


def read_driver() -> Driver:
    """The driver and its cards, by the driver's own library: CuPy may be what is missing. OSError without a driver."""
    library = ctypes.CDLL("libcuda.so.1")

    def ask(function: str, *arguments: Any) -> int:
        """The int that a function writes into its first argument."""
        answer = ctypes.c_int()
        check(function, getattr(library, function)(ctypes.byref(answer), *arguments))
        return answer.value

    def check(function: str, code: int) -> None:
        if code:
            raise RuntimeError(f"{function} of the driver fails with CUDA error {code}")

    version = ask("cuDriverGetVersion")
    code = library.cuInit(0)
    if code != NO_DEVICE:
        check("cuInit", code)
    cards = []
    for i in range(0 if code else ask("cuDeviceGetCount")):
        device, name, memory = ask("cuDeviceGet", i), ctypes.create_string_buffer(128), ctypes.c_size_t()
        check("cuDeviceGetName", library.cuDeviceGetName(name, len(name), device))
        check("cuDeviceTotalMem", library.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
        major, minor = (ask("cuDeviceGetAttribute", attribute, device) for attribute in (75, 76))
        cards.append(FoundCard(name.value.decode(), (major, minor), memory.value))
    return Driver((version // 1000, version % 1000 // 10), tuple(cards))


def find_cupy() -> list[Finding]:
    wheels = [major for major, requirement in CUPY.items() if installed(requirement)]
    major = cuda_major()
    if len(wheels) > 1:
        remove = f"{pip('uninstall')} -y cupy-cuda12x cupy-cuda13x"
        text = "the wheels for CUDA 12 and for CUDA 13 are both installed, and overwrite each other"
        return [Finding("CuPy", Verdict.BAD, text, f"{remove} && {pip('install', CUPY[major], TOOLKIT[major])}")]
    try:
        import cupy
    except ImportError as error:
        return [Finding("CuPy", Verdict.BAD, f"none ({error})", pip("install", CUPY[major], TOOLKIT[major]))]
    except Exception as error:  # of any type: a cache folder that cannot be made raises OSError
        text = f"installed, but it cannot be imported ({reason(error)}); CUPY_CACHE_DIR names its cache folder"
        return [Finding("CuPy", Verdict.BAD, text)]
    version = tuple(int(part) for part in cupy.__version__.split(".")[:2])
    if version < (14, 0) or version == (14, 1):
        text = f"{cupy.__version__}, and paged_attn needs {CUPY[major]}"
        return [Finding("CuPy", Verdict.BAD, text, pip("install", CUPY[major]))]
    return [Finding("CuPy", Verdict.GOOD, f"{cupy.__version__}{f' for CUDA {wheels[0]}' if wheels else ''}")]


def find_runtime() -> list[Finding]:
    try:
        from cupy.cuda import runtime
    except Exception:  # find_cupy says which
        return [Finding("CUDA runtime", Verdict.NOTE, "not looked for: CuPy loads it")]
    try:
        number = runtime.runtimeGetVersion()
    except Exception as error:
        return [Finding("CUDA runtime", Verdict.BAD, f"none ({reason(error)})", pip("install", TOOLKIT[cuda_major()]))]
    version, newest = (number // 1000, number % 1000 // 10), driver_cuda()
    if newest and newest[0] < version[0]:
        major, wheel = cuda_major(by_driver=True), distribution_name(CUPY[version[0]])
        command = f"{pip('uninstall')} -y {wheel} && {pip('install', CUPY[major], TOOLKIT[major])}"
        text = f"{dotted(version)}, but the driver is for CUDA {dotted(newest)} and earlier"
        return [Finding("CUDA runtime", Verdict.BAD, text, command)]
    return [Finding("CUDA runtime", Verdict.GOOD, dotted(version))]


def find_nvrtc() -> list[Finding]:
    command = pip("install", TOOLKIT[cuda_major()])
    try:
        version = nvrtc_version()
    except ImportError:
        text = "not looked for: CuPy loads it, or cuda.bindings where there is no card"
        return [Finding("NVRTC", Verdict.NOTE, text, compiler_command())]
    except Exception as error:
        return [Finding("NVRTC", Verdict.BAD, f"none ({reason(error)})", command)]
    if version < compile.MIN_NVRTC:
        text = f"{dotted(version)}, and the kernels need {dotted(compile.MIN_NVRTC)} or later"
        return [Finding("NVRTC", Verdict.BAD, text, command)]
    return [Finding("NVRTC", Verdict.GOOD, dotted(version))]


def nvrtc_version() -> tuple[int, ...]:
    """Of the NVRTC that CuPy finds, and without CuPy of the one that cuda.bindings finds."""
    try:
        from cupy.cuda import nvrtc
    except Exception:
        from cuda.bindings import nvrtc

        _, *version = nvrtc.nvrtcVersion()
        return tuple(version)
    return tuple(nvrtc.getVersion())


def find_support() -> list[Finding]:
    try:
        import cupy  # noqa: F401 (without it nothing can be asked)
    except Exception:
        return [Finding("GPU support", Verdict.NOTE, "not asked for: CuPy knows the card")]
    support = pa.supports("decode", device="cuda")
    text = "the current card can run the kernels" if support else support.reason
    return [Finding("GPU support", Verdict.GOOD if support else Verdict.BAD, text)]


def find_jax() -> list[Finding]:
    on_gpu = on_card()
    command = pip("install", f"jax[cuda{cuda_major(by_driver=True)}]" if on_gpu else "jax")
    try:
        import jax
    except ImportError as error:
        return [Finding("JAX", Verdict.NOTE, f"none ({error}); only JAX arrays need it", command)]
    if on_gpu and not any(installed(f"jax-cuda{major}-plugin") for major in CUPY):
        return [Finding("JAX", Verdict.NOTE, f"{jax.__version__}, on the CPU only", command)]
    return [Finding("JAX", Verdict.GOOD, jax.__version__)]


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, where there is a driver that answers."""
    try:
        return read_driver().cuda
    except (OSError, RuntimeError):
        return None


def cuda_major(by_driver: bool = False) -> int:
    """12 or 13, whose wheels fit: those of the CuPy that is installed, else of the driver, else 12."""
    wheels = [major for major, requirement in CUPY.items() if installed(requirement)]
    if len(wheels) == 1 and not by_driver:
        return wheels[0]
    newest = driver_cuda()
    return 13 if newest and newest[0] >= 13 else 12


def distribution_name(requirement: str) -> str:
    """The name in "name[extra]>=1.2"."""
    return requirement.partition(">")[0].partition("[")[0]


def installed(requirement: str) -> bool:
    try:
        importlib.metadata.version(distribution_name(requirement))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pip(action: str, *requirements: str) -> str:
    """A command for the Python that runs this, whatever `pip` the shell would find."""
    return install.pip(action, *requirements, command=f"{shlex.quote(sys.executable)} -m pip")


def compiler_command() -> str:
    """The command that installs what compiles the kernels without CuPy and without a card."""
    major = cuda_major()
    return pip("install", BINDINGS[major], TOOLKIT[major])


def dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def on_card() -> bool:
    """Whether the current device can run the kernels; find_support says why not."""
    try:
        return bool(pa.supports("decode", device="cuda"))
    except Exception:
        return False


# -- 2. what compiles --------------------------------------------------------------------------------------------------


def kernels(say: Say = in_silence) -> Iterator[Finding]:
    """One finding a .cu file: on a card its kernels are built as a launch would, elsewhere for CARDS."""
    try:
        files = sorted({path.name for path in compile.kernel_files().values()})
    except Exception as error:
        yield Finding("kernels/*.cu", Verdict.BAD, reason(error))
        return
    for file in files:
        say(f"compiling {file}")
        yield from attempt(file, functools.partial(compile_family, file))


def compile_family(file: str) -> list[Finding]:
    if on_card():
        return [compile_for_card(file)]
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        text = "not checked: there is no usable card, and no cuda.bindings, which compiles without one"
        return [Finding(file, Verdict.NOTE, text, compiler_command())]
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:
        text = f"not checked: there is no usable card, and no NVRTC ({reason(error)})"
        return [Finding(file, Verdict.NOTE, text, compiler_command())]
    start, architectures, names = time.perf_counter(), [], set()
    for card in CARDS:
        needed = typical_recipes(file, card)
        arch = card.arch or f"sm_{card.compute_capability}"
        for constants in {recipe.constants for recipe in needed}:  # one text holds all kernels of a file
            compile_without_card(nvrtc, file, compile.options(arch, **dict(constants)))
        architectures += [arch] if needed else []
        names |= {recipe.kernel for recipe in needed}
    seconds = time.perf_counter() - start
    text = f"compiles for {' and '.join(architectures)} in {seconds:.1f} s: {', '.join(sorted(names))}"
    return [Finding(file, Verdict.NOTE, text)]


def compile_for_card(file: str) -> Finding:
    import cupy

    start, gpu = time.perf_counter(), cupy.cuda.Device()
    device = f"cuda:{gpu.id}"
    needed = typical_recipes(file, card_of(device))
    if not needed:
        return Finding(file, Verdict.NOTE, "not needed: other kernels serve this card")
    for recipe in needed:
        compile.kernel(recipe, device)
    capability, seconds = int(gpu.compute_capability) / 10, time.perf_counter() - start
    names = ", ".join(sorted({recipe.kernel for recipe in needed}))
    return Finding(file, Verdict.GOOD, f"ready for compute capability {capability} in {seconds:.1f} s: {names}")


def typical_recipes(file: str, card: Card) -> list[Recipe]:
    """What the checks below, or any model with their shapes, need of a file on a card."""
    models = [
        Shapes(
            num_qo_heads=NUM_QO_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM,
            dtype=dtype, page_size=Batch.page_size, max_batch_size=3,
        )
        for dtype in DTYPES
    ]  # fmt: skip
    needed = (recipe for op in OPS for model in models for recipe in needed_recipes(op, model, card))
    return [recipe for recipe in dict.fromkeys(needed) if compile.kernel_files()[recipe.kernel].name == file]


def compile_without_card(nvrtc: Any, file: str, options: tuple[str, ...]) -> None:
    """RuntimeError with the compiler's messages where the file does not compile."""
    arguments = [option.encode() for option in (*options, "-ftz=true", "--device-as-default-execution-space")]
    _, program = nvrtc.nvrtcCreateProgram(compile.load_source(file).encode(), file.encode(), 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode().strip("\0 ") or str(result))
    nvrtc.nvrtcDestroyProgram(program)


# -- 3. what is right --------------------------------------------------------------------------------------------------


class Batch:
    """Three short requests, one of them empty, in the arrays of `xp` (numpy or cupy); the same numbers in both."""

    kv_lens = (70, 0, 33)
    page_size = 16
    num_pages = 12

    def __init__(self, xp: ModuleType, dtype: np.dtype[Any]) -> None:
        random = np.random.default_rng(0)

        def normal(*shape: int, dtype: Any = dtype) -> Any:
            return xp.asarray(random.standard_normal(shape, np.float32).astype(dtype))

        def ints(*values: int) -> Any:
            return xp.asarray(np.array(values, np.int32))

        self.xp, self.dtype = xp, dtype
        self.device = "cpu" if xp is np else "cuda"
        self.pool = (self.num_pages, self.page_size, NUM_KV_HEADS, HEAD_DIM)
        self.kv = pa.PagedKV(normal(*self.pool), normal(*self.pool), layout="NHD")
        pages, last = (7, 2, 11, 0, 4, 9, 3, 6), (6, 0, 1)
        self.table = pa.PageTable(ints(0, 5, 5, 8), ints(*pages), ints(*last), page_size=self.page_size)
        self.q = normal(3, NUM_QO_HEADS, HEAD_DIM)
        self.rows = normal(40, NUM_QO_HEADS, HEAD_DIM)
        self.qo_indptr = ints(0, 20, 25, 40)
        self.states = normal(5, 3, NUM_QO_HEADS, HEAD_DIM)
        self.lse = normal(5, 3, NUM_QO_HEADS, dtype=np.float32)
        self.tokens = normal(2, 60, NUM_KV_HEADS, HEAD_DIM)


def check_append(batch: Batch) -> list[Any]:
    pages = [batch.xp.zeros(batch.pool, batch.dtype) for _ in range(2)]
    slots = np.random.default_rng(1).permutation(batch.num_pages * batch.page_size)[:60]
    slots[7] = -1
    pa.append(pa.PagedKV(*pages, layout="NHD"), batch.xp.asarray(slots), *batch.tokens)
    return pages


def check_decode(batch: Batch) -> list[Any]:
    return list(pa.decode(batch.q, batch.kv, batch.table, return_lse=True))


def check_prefill(batch: Batch) -> list[Any]:
    return list(pa.prefill(batch.rows, batch.qo_indptr, batch.kv, batch.table, return_lse=True))


def check_merge(batch: Batch) -> list[Any]:
    v, s = batch.states, batch.lse
    return [*pa.merge_states(v, s), *pa.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])]


def check_tables(batch: Batch) -> list[Any]:
    table, xp = batch.table, batch.xp
    table.validate(batch.num_pages).raise_if_bad()
    split = table.split(2)
    block_table = table.to_block_table(6)
    again = pa.PageTable.from_block_table(block_table, table.seq_lens, page_size=batch.page_size)
    tokens = xp.asarray(np.array([[0, 2, 0], [69, 32, 15]], np.int32))
    return [
        table.seq_lens, block_table, table.slots(*tokens),
        split.indptr, split.indices, split.last_page_len, split.page_offset, split.total_len,
        again.indptr, again.indices[:8], again.last_page_len,
    ]  # fmt: skip


def check_cache(batch: Batch) -> list[Any]:
    """Two sequences, of which one forks inside a page and both sides write: the page is copied."""
    sizes = (batch.num_pages, batch.page_size, NUM_KV_HEADS, HEAD_DIM)
    cache = pa.PagedKVCache(*sizes, layout="HND", dtype=batch.dtype, device=batch.device)
    first, second = cache.new_sequence(), cache.new_sequence()
    k, v = batch.tokens
    cache.append([first, second], [20, 5], k[:25], v[:25])
    fork = cache.fork(first)
    cache.append([fork, first, second], [1, 18, 3], k[25:47], v[25:47])
    table = cache.page_table([second, fork, first])
    out = pa.decode(batch.q, cache.layers[0], table)
    return [table.indptr, table.indices[: 1 + 2 + 3], table.last_page_len, out]


CHECKS = {
    "append": check_append,
    "decode": check_decode,
    "prefill": check_prefill,
    "merge": check_merge,
    "page tables": check_tables,
    "cache": check_cache,
}


def checks(say: Say = in_silence) -> Iterator[Finding]:
    """Each public function on the card against NumPy; without a card, that it runs on NumPy."""
    for name, check in CHECKS.items():
        say(name)
        yield from attempt(name, functools.partial(run_check, name, check))
    if on_card():
        yield from attempt("status", check_status)


def run_check(name: str, check: Callable[[Batch], list[Any]]) -> list[Finding]:
    expected = {dtype: check(Batch(np, dtype)) for dtype in DTYPES}
    if not on_card():
        return [Finding(name, Verdict.NOTE, "runs on NumPy; there is no usable card to compare with")]
    import cupy

    errors = {}
    for dtype in DTYPES:
        actual = [array.get() for array in check(Batch(cupy, dtype))]
        errors[dtype.name] = max(map(difference, actual, expected[dtype]))
    text = ", ".join(f"{error:.1e} ({dtype})" for dtype, error in errors.items())
    if all(error <= OUT_TOLERANCE[dtype] for dtype, error in errors.items()):  # a NaN is not
        return [Finding(name, Verdict.GOOD, f"agrees with NumPy; relative error {text}")]
    limits = ", ".join(f"{limit:.0e} ({dtype})" for dtype, limit in OUT_TOLERANCE.items())
    return [Finding(name, Verdict.BAD, f"differs from NumPy; relative error {text}, more than {limits}")]


def check_status() -> list[Finding]:
    pa.status("cuda")
    return [Finding("status", Verdict.GOOD, "the kernels met no fault in what they read")]


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; infinite for integers, shapes and infinities that differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.dtype.kind == "i":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite]):
        return float("inf")
    return float(np.linalg.norm(a[finite] - b[finite]) / np.linalg.norm(b[finite]))


# -- what a person sees ------------------------------------------------------------------------------------------------


def show(console: Console, title: str, findings: list[Finding]) -> None:
    """One section: a table in a terminal, a line a finding elsewhere."""
    if not console.is_terminal:
        console.print(title)
        for finding in findings:
            console.print(f"  {finding.verdict:6}  {finding.name:17}  {finding.text}", soft_wrap=True)
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for column in ("name", "verdict", "text"):
        table.add_column(column, overflow="fold", no_wrap=column != "text")
    for finding in findings:
        table.add_row(finding.name, Text(finding.verdict, STYLES[finding.verdict]), Text(finding.text))
    console.print(table)


def conclude(console: Console, findings: list[Finding]) -> None:
    """The commands that install what is missing, each once, and the answer for NumPy and for the GPU."""
    bad = [finding.name for finding in findings if finding.verdict is Verdict.BAD]
    if bad and CHECKS.keys() <= {finding.name for finding in findings} - set(bad):
        text = "NumPy is fully usable: every operation ran on this CPU. What is missing is for a GPU only."
        console.print(Text(text, "bold green"), soft_wrap=True)
    commands: dict[str, list[str]] = {}
    for finding in findings:
        if finding.command:
            commands.setdefault(finding.command, []).append(finding.name)
    for command, names in commands.items():
        console.print(f"to install what is missing for {', '.join(names)}:\n  {command}", soft_wrap=True)
    answer = f"not usable, because of: {', '.join(bad)}" if bad else "usable"
    console.print(Text(f"the GPU path is {answer}", "bold red" if bad else "bold green"), soft_wrap=True)
