"""``python -m paged_attn doctor``: what is installed, which kernels compile for the card, and whether they are right.

Three sections of probes. What a probe raises becomes a finding with its reason, so that one broken part hides no other.
The GPU path is usable where no finding is bad; JAX, and whatever can only be looked at on a card, is a note.
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
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

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
from paged_attn.interop import resolve_device
from paged_attn.support import OPS
from paged_attn.warm_up import Shapes, needed_recipes

OUT_TOLERANCE = {np.float16: 2e-3, ml_dtypes.bfloat16: 1e-2}  # ||error|| / ||reference|| of one check
HEAD_DIM, NUM_QO_HEADS, NUM_KV_HEADS, PAGE_SIZE, NUM_PAGES = 128, 8, 2, 16, 12  # of the checks
CARDS = (A100, H100)  # what kernels are compiled for where there is no card
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class Verdict(StrEnum):
    GOOD = "ok"
    NOTE = "note"
    BAD = "failed"


STYLES = {Verdict.GOOD: "green", Verdict.NOTE: "dim", Verdict.BAD: "bold red"}


class Finding(NamedTuple):
    """One line. `command` installs what is missing."""

    verdict: Verdict
    text: str
    command: str = ""
    name: str = ""  # empty: the probe's


Probe = Callable[[], Finding | list[Finding]]


def run(options: argparse.Namespace) -> int:
    """Look, compile, check and print; the exit status is 0 where the GPU path is usable, else 1."""
    console = Console(highlight=False, markup=False)
    findings: list[Finding] = []
    for title, probes in (("found", found()), ("kernels", kernels()), ("checks", checks())):
        lines: list[Finding] = []
        with console.status(f"{title} ...") as status:
            for name, probe in probes.items():
                status.update(f"{title}: {name} ...")
                lines += attempt(name, probe)
        show(console, title, lines)
        findings += lines
    conclude(console, findings)
    return int(any(finding.verdict is Verdict.BAD for finding in findings))


def attempt(name: str, probe: Probe) -> list[Finding]:
    """What a probe finds; what it raises is found, too."""
    try:
        findings = probe()
    except Exception as error:
        findings = Finding(Verdict.BAD, reason(error))
    in_list = findings if isinstance(findings, list) else [findings]
    return [finding._replace(name=finding.name or name) for finding in in_list]


def reason(error: Exception) -> str:
    """One line of an error: of a compiler's log, the first that speaks of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return f"{type(error).__name__}: {line}"


# -- 1. what is there --------------------------------------------------------------------------------------------------


class Driver(NamedTuple):
    cuda: tuple[int, int]  # the newest CUDA that it runs
    cards: list[str]  # described


def found() -> dict[str, Probe]:
    return {
        "paged_attn": find_paged_attn,
        "Python": lambda: Finding(Verdict.GOOD, f"{platform.python_version()}, {sys.executable}"),
        "numpy": lambda: Finding(Verdict.GOOD, np.__version__),
        "ml_dtypes": lambda: Finding(Verdict.GOOD, ml_dtypes.__version__),
        "NVIDIA driver": find_driver,
        "CuPy": find_cupy,
        "CUDA runtime": find_runtime,
        "NVRTC": find_nvrtc,
        "GPU support": find_support,
        "JAX": find_jax,
    }


def find_paged_attn() -> Finding:
    folder, count = Path(pa.__file__).parent, len(compile.kernel_files())
    text = f"{pa.__version__} in {folder}, {count} kernels in {compile.kernel_dir()}"
    return Finding(Verdict.GOOD if count else Verdict.BAD, text)


def find_driver() -> list[Finding]:
    try:
        cuda, cards = read_driver()
    except OSError as error:
        return [Finding(Verdict.BAD, f"none ({error}); install NVIDIA's driver, which pip cannot do")]
    findings = [Finding(Verdict.GOOD, f"for CUDA {dotted(cuda)} and earlier")]
    if not cards:
        text = "the driver sees none; nvidia-smi lists them, and CUDA_VISIBLE_DEVICES can hide them"
        return [*findings, Finding(Verdict.BAD, text, name="card")]
    return findings + [Finding(Verdict.GOOD, card, name=f"card {i}") for i, card in enumerate(cards)]


def read_driver() -> Driver:
    """The driver and its cards, by the driver's own library: CuPy may be what is missing. OSError without a driver."""
    library = ctypes.CDLL("libcuda.so.1")

    def check(function: str, code: int) -> None:
        if code:
            raise RuntimeError(f"{function} of the driver fails with CUDA error {code}")

    def ask(function: str, *arguments: Any) -> int:
        """The int that a function writes into its first argument."""
        answer = ctypes.c_int()
        check(function, getattr(library, function)(ctypes.byref(answer), *arguments))
        return answer.value

    version, code, cards = ask("cuDriverGetVersion"), library.cuInit(0), []
    if code != NO_DEVICE:
        check("cuInit", code)
        for i in range(ask("cuDeviceGetCount")):
            device, name, memory = ask("cuDeviceGet", i), ctypes.create_string_buffer(128), ctypes.c_size_t()
            check("cuDeviceGetName", library.cuDeviceGetName(name, len(name), device))
            check("cuDeviceTotalMem", library.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
            capability = dotted(ask("cuDeviceGetAttribute", attribute, device) for attribute in (75, 76))
            size = f"{memory.value / 2**30:.0f} GiB"
            cards.append(f"{name.value.decode()}, compute capability {capability}, {size}")
    return Driver(major_minor(version), cards)


def find_cupy() -> Finding:
    wheels, major = cupy_wheels(), cuda_major()
    if len(wheels) > 1:
        remove = f"{pip('uninstall')} -y cupy-cuda12x cupy-cuda13x"
        text = "the wheels for CUDA 12 and for CUDA 13 are both installed, and overwrite each other"
        return Finding(Verdict.BAD, text, f"{remove} && {pip('install', CUPY[major], TOOLKIT[major])}")
    try:
        import cupy
    except ImportError as error:
        return Finding(Verdict.BAD, f"none ({error})", pip("install", CUPY[major], TOOLKIT[major]))
    except Exception as error:  # of any type: a cache folder that cannot be made raises OSError
        text = f"installed, but it cannot be imported ({reason(error)}); CUPY_CACHE_DIR names its cache folder"
        return Finding(Verdict.BAD, text)
    version = tuple(int(part) for part in cupy.__version__.split(".")[:2])
    if version < (14, 0) or version == (14, 1):
        text = f"{cupy.__version__}, and paged_attn needs {CUPY[major]}"
        return Finding(Verdict.BAD, text, pip("install", CUPY[major]))
    return Finding(Verdict.GOOD, f"{cupy.__version__}{f' for CUDA {wheels[0]}' if wheels else ''}")


def find_runtime() -> Finding:
    try:
        from cupy.cuda import runtime
    except Exception:  # find_cupy says which
        return Finding(Verdict.NOTE, "not looked for: CuPy loads it")
    try:
        version = major_minor(runtime.runtimeGetVersion())
    except Exception as error:
        return Finding(Verdict.BAD, f"none ({reason(error)})", pip("install", TOOLKIT[cuda_major()]))
    newest = driver_cuda()
    if newest and newest[0] < version[0]:
        major, wheel = cuda_major(by_driver=True), distribution_name(CUPY[version[0]])
        command = f"{pip('uninstall')} -y {wheel} && {pip('install', CUPY[major], TOOLKIT[major])}"
        text = f"{dotted(version)}, but the driver is for CUDA {dotted(newest)} and earlier"
        return Finding(Verdict.BAD, text, command)
    return Finding(Verdict.GOOD, dotted(version))


def find_nvrtc() -> Finding:
    command = pip("install", TOOLKIT[cuda_major()])
    try:
        version = nvrtc_version()
    except ImportError:
        text = "not looked for: CuPy loads it, or cuda.bindings where there is no card"
        return Finding(Verdict.NOTE, text, compiler_command())
    except Exception as error:
        return Finding(Verdict.BAD, f"none ({reason(error)})", command)
    if version < compile.MIN_NVRTC:
        text = f"{dotted(version)}, and the kernels need {dotted(compile.MIN_NVRTC)} or later"
        return Finding(Verdict.BAD, text, command)
    return Finding(Verdict.GOOD, dotted(version))


def nvrtc_version() -> tuple[int, ...]:
    """Of the NVRTC that CuPy finds, and without CuPy of the one that cuda.bindings finds."""
    try:
        from cupy.cuda import nvrtc
    except Exception:
        from cuda.bindings import nvrtc

        return tuple(nvrtc.nvrtcVersion()[1:])
    return tuple(nvrtc.getVersion())


def find_support() -> Finding:
    try:
        import cupy  # noqa: F401 (without it nothing can be asked)
    except Exception:
        return Finding(Verdict.NOTE, "not asked for: CuPy knows the card")
    if support := pa.supports("decode", device="cuda"):
        return Finding(Verdict.GOOD, "the current card can run the kernels")
    return Finding(Verdict.BAD, support.reason)


def find_jax() -> Finding:
    on_gpu = on_card()
    command = pip("install", f"jax[cuda{cuda_major(by_driver=True)}]" if on_gpu else "jax")
    try:
        import jax
    except ImportError as error:
        return Finding(Verdict.NOTE, f"none ({error}); only JAX arrays need it", command)
    if on_gpu and not any(installed(f"jax-cuda{major}-plugin") for major in CUPY):
        return Finding(Verdict.NOTE, f"{jax.__version__}, on the CPU only", command)
    return Finding(Verdict.GOOD, jax.__version__)


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, where there is a driver that answers."""
    try:
        return read_driver().cuda
    except (OSError, RuntimeError):
        return None


def cuda_major(by_driver: bool = False) -> int:
    """12 or 13, whose wheels fit: those of the CuPy that is installed, else of the driver, else 12."""
    wheels = cupy_wheels()
    if len(wheels) == 1 and not by_driver:
        return wheels[0]
    newest = driver_cuda()
    return 13 if newest and newest[0] >= 13 else 12


def cupy_wheels() -> list[int]:
    """The versions of CUDA whose CuPy is installed."""
    return [major for major, requirement in CUPY.items() if installed(requirement)]


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


def major_minor(version: int) -> tuple[int, int]:
    """(12, 9) of CUDA's 12090."""
    return version // 1000, version % 1000 // 10


def dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def on_card() -> bool:
    """Whether the current device can run the kernels; find_support says why not."""
    try:
        return bool(pa.supports("decode", device="cuda"))
    except Exception:
        return False


# -- 2. what compiles --------------------------------------------------------------------------------------------------


def kernels() -> dict[str, Probe]:
    """A probe a .cu file: on a card its kernels are built as a launch would, elsewhere for CARDS."""
    files = sorted(path.name for path in compile.kernel_dir().glob("*.cu"))
    return {file: functools.partial(compile_file, file) for file in files}


def compile_file(file: str) -> Finding:
    start, device = time.perf_counter(), resolve_device("cuda") if on_card() else ""
    if not device:
        try:
            from cuda.bindings import nvrtc

            nvrtc.nvrtcVersion()
        except Exception as error:
            text = f"not checked: there is no usable card, and nothing that compiles without one ({reason(error)})"
            return Finding(Verdict.NOTE, text, compiler_command())
    architectures, names = [], set()
    for card in (card_of(device),) if device else CARDS:
        arch, needed = card.arch or f"sm_{card.compute_capability}", typical_recipes(file, card)
        if device:
            for recipe in needed:
                compile.kernel(recipe, device)
        else:
            for constants in {recipe.constants for recipe in needed}:  # one text holds all kernels of a file
                compile_without_card(nvrtc, file, compile.options(arch, **dict(constants)))
        architectures += [arch] if needed else []
        names |= {recipe.kernel for recipe in needed}
    if not names:
        return Finding(Verdict.NOTE, "not needed: other kernels serve this card")
    seconds = time.perf_counter() - start
    text = f"compiles for {' and '.join(architectures)} in {seconds:.1f} s: {', '.join(sorted(names))}"
    return Finding(Verdict.GOOD if device else Verdict.NOTE, text)


def typical_recipes(file: str, card: Card) -> list[Recipe]:
    """What the checks below, or any model with their shapes, need of a file on a card."""
    models = [
        Shapes(
            num_qo_heads=NUM_QO_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM,
            dtype=np.dtype(dtype), page_size=PAGE_SIZE, max_batch_size=3,
        )
        for dtype in OUT_TOLERANCE
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

    def __init__(self, xp: ModuleType, dtype: Any) -> None:
        random = np.random.default_rng(0)

        def normal(*shape: int, dtype: Any = dtype) -> Any:
            return xp.asarray(random.standard_normal(shape, np.float32).astype(dtype))

        def ints(*values: Any) -> Any:
            return xp.asarray(np.array(values, np.int32))

        self.dtype, self.device = dtype, "cpu" if xp is np else "cuda"
        self.ints, self.zeros = ints, functools.partial(xp.zeros, dtype=dtype)
        self.pool = (NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.kv = pa.PagedKV(normal(*self.pool), normal(*self.pool), layout="NHD")
        pages, last = (7, 2, 11, 0, 4, 9, 3, 6), (6, 0, 1)
        self.table = pa.PageTable(ints(0, 5, 5, 8), ints(*pages), ints(*last), page_size=PAGE_SIZE)
        self.q = normal(3, NUM_QO_HEADS, HEAD_DIM)
        self.rows, self.qo_indptr = normal(40, NUM_QO_HEADS, HEAD_DIM), ints(0, 20, 25, 40)
        self.v, self.s = normal(5, 3, NUM_QO_HEADS, HEAD_DIM), normal(5, 3, NUM_QO_HEADS, dtype=np.float32)
        self.tokens = normal(2, 60, NUM_KV_HEADS, HEAD_DIM)


def check_append(batch: Batch) -> list[Any]:
    pages = [batch.zeros(batch.pool) for _ in range(2)]
    slots = np.random.default_rng(1).permutation(NUM_PAGES * PAGE_SIZE)[:60]
    slots[7] = -1
    pa.append(pa.PagedKV(*pages, layout="NHD"), batch.ints(*slots), *batch.tokens)
    return pages


def check_tables(batch: Batch) -> list[Any]:
    table = batch.table
    table.validate(NUM_PAGES).raise_if_bad()
    split, block_table = table.split(2), table.to_block_table(6)
    again = pa.PageTable.from_block_table(block_table, table.seq_lens, page_size=PAGE_SIZE)
    return [
        table.seq_lens, block_table, table.slots(batch.ints(0, 2, 0), batch.ints(69, 32, 15)),
        split.indptr, split.indices, split.last_page_len, split.page_offset, split.total_len,
        again.indptr, again.indices[:8], again.last_page_len,
    ]  # fmt: skip


def check_cache(batch: Batch) -> list[Any]:
    """Two sequences, of which one forks inside a page and both sides write: the page is copied."""
    cache = pa.PagedKVCache(*batch.pool, layout="HND", dtype=batch.dtype, device=batch.device)
    first, second = cache.new_sequence(), cache.new_sequence()
    k, v = batch.tokens
    cache.append([first, second], [20, 5], k[:25], v[:25])
    fork = cache.fork(first)
    cache.append([fork, first, second], [1, 18, 3], k[25:47], v[25:47])
    table = cache.page_table([second, fork, first])
    out = pa.decode(batch.q, cache.layers[0], table)
    return [table.indptr, table.indices[: 1 + 2 + 3], table.last_page_len, out]


CHECKS: dict[str, Callable[[Batch], Iterable[Any]]] = {
    "append": check_append,
    "decode": lambda batch: pa.decode(batch.q, batch.kv, batch.table, return_lse=True),
    "prefill": lambda batch: pa.prefill(batch.rows, batch.qo_indptr, batch.kv, batch.table, return_lse=True),
    "merge_states": lambda batch: pa.merge_states(batch.v, batch.s),
    "merge_state": lambda batch: pa.merge_state(batch.v[:, 0], batch.s[:, 0], batch.v[:, 1], batch.s[:, 1]),
    "page tables": check_tables,
    "cache": check_cache,
}


def checks() -> dict[str, Probe]:
    """Each public function on the card against NumPy; without a card, that it runs on NumPy."""
    probes: dict[str, Probe] = {name: functools.partial(run_check, check) for name, check in CHECKS.items()}
    return probes | ({"status": check_status} if on_card() else {})


def run_check(check: Callable[[Batch], Iterable[Any]]) -> Finding:
    expected = {dtype: check(Batch(np, dtype)) for dtype in OUT_TOLERANCE}
    if not on_card():
        return Finding(Verdict.NOTE, "runs on NumPy; there is no usable card to compare with")
    import cupy

    is_good, texts = True, []
    for dtype, limit in OUT_TOLERANCE.items():
        actual = [array.get() for array in check(Batch(cupy, dtype))]
        error = max(map(difference, actual, expected[dtype]))
        is_good &= error <= limit  # a NaN is not
        texts.append(f"{error:.1e} of {limit:.0e} ({np.dtype(dtype)})")
    verdict, text = (Verdict.GOOD, "agrees with") if is_good else (Verdict.BAD, "differs from")
    return Finding(verdict, f"{text} NumPy; relative error {', '.join(texts)}")


def check_status() -> Finding:
    pa.status("cuda")
    return Finding(Verdict.GOOD, "the kernels met no fault in what they read")


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; infinite for integers, shapes and infinities that differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    exact = ~np.isfinite(b) | (expected.dtype.kind == "i")
    if (a[exact] != b[exact]).any():
        return float("inf")
    return float(np.linalg.norm(a[~exact] - b[~exact]) / (np.linalg.norm(b[~exact]) or 1.0))


# -- what a person sees ------------------------------------------------------------------------------------------------


def show(console: Console, title: str, findings: list[Finding]) -> None:
    """One section: a table in a terminal, a line a finding elsewhere."""
    if not console.is_terminal:
        console.print(title)
        for verdict, text, _, name in findings:
            console.print(f"  {verdict:6}  {name:17}  {text}", soft_wrap=True)
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for verdict, text, _, name in findings:
        table.add_row(Text(name, no_wrap=True), Text(verdict, STYLES[verdict]), Text(text, overflow="fold"))
    console.print(table)


def conclude(console: Console, findings: list[Finding]) -> None:
    """The commands that install what is missing, each once, and the answer for NumPy and for the GPU."""
    bad = [finding.name for finding in findings if finding.verdict is Verdict.BAD]
    if bad and CHECKS.keys() <= {finding.name for finding in findings} - set(bad):
        text = "NumPy is fully usable: every operation ran on this CPU. What is missing is for a GPU only."
        console.print(Text(text, "bold green"), soft_wrap=True)
    for command in dict.fromkeys(finding.command for finding in findings if finding.command):
        names = ", ".join(finding.name for finding in findings if finding.command == command)
        console.print(f"to install what is missing for {names}:\n  {command}", soft_wrap=True)
    answer = f"not usable, because of: {', '.join(bad)}" if bad else "usable"
    console.print(Text(f"the GPU path is {answer}", "bold red" if bad else "bold green"), soft_wrap=True)
