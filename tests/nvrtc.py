"""Every kernel through NVRTC without a GPU: with which constants, for which cards, and what ptxas may say of it.

One row of the matrix is one compilation: a file of kernels/, which may hold several kernels, with one set of constants
for one architecture. Layouts, windows, positions, page and group sizes are run-time values of the kernels; the soft cap
and sinks are constants. Texts without constants are compiled once an architecture.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paged_attn import compile as kernels
from paged_attn import recipes
from paged_attn.card import H100, Card
from paged_attn.compile import Recipe
from tests.cases import DTYPES, Case
from tests.specs import decode_recipe, spec_of

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
HEAD_DIMS = (64, 80, 128, 256)
MIXED_DIMS = ((192, 128), (64, 128))  # of K and of V, in append and prefill
OTHER_HEAD_DIMS = (16, 32, 96, 112)  # on an H100 only, as are V_HEAD_DIMs that differ from HEAD_DIM

# What CuPy adds to compile.options() for every kernel, beside the architecture.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")

# The most registers that a thread of each kernel may take on any card: one number, or one for each (HEAD_DIM, COLUMNS)
# of decode, with V_HEAD_DIM where that is another, and each HEAD_DIM of the prefills. A thread can have 255, and 65536
# are for all threads of an SM:
#   blocks of 256   40: six of them on an SM   64: four   128: two   255: one
#   blocks of 1024  64: one                    blocks of 128   168: three   255: two
REGISTERS: dict[str, int | dict[Any, int]] = {
    "append": 40,
    "block_table_pages": 40,
    "block_table_rows": 64,
    "build_table": 40,
    "check_table": 40,
    "compare_checksums": 40,
    "copy_pages": 40,
    "decode": {
        (16, 8): 128, (32, 8): 128, (64, 8): 128, (80, 8): 128, (96, 8): 128, (112, 8): 128, (128, 8): 128,
        (64, 16): 160, (96, 16): 200, (80, 16): 184, (112, 16): 208, (128, 16): 128, (64, 24): 200, (64, 32): 240,
        (256, 8): 240, (192, 8, 128): 240, (64, 8, 128): 128, (64, 16, 128): 200,
    },
    "exchange": 128,
    "merge_state": 40,
    "merge_states": 64,
    "plan_requests": 64,
    "plan_splits": 64,
    "plan_tiles": 64,
    "prefill": {16: 168, 32: 168, 64: 255, 80: 255, 96: 255, 112: 255, 128: 255, 192: 255, 256: 255},
    "prefill_hopper": dict.fromkeys((64, 80, 96, 112, 128, 256), 168),  # at launch; warps then trade them
    "seq_lens": 40,
    "split_pages": 40,
    "split_rows": 64,
    "table_checksum": 64,
    "table_slots": 40,
    "to_block_table": 40,
    "update_page_lists": 40,
}  # fmt: skip


def register_limit(kernel: str, constants: Mapping[str, Any]) -> int:
    limit = REGISTERS[kernel]
    if isinstance(limit, int):
        return limit
    head_dim = constants["HEAD_DIM"]
    if "COLUMNS" not in constants:
        return limit[head_dim]
    v_head_dim = constants["V_HEAD_DIM"]
    return limit[(head_dim, constants["COLUMNS"], v_head_dim)[: 2 if v_head_dim == head_dim else 3]]


@dataclass(frozen=True)
class Build:
    """One compilation. It serves all kernels of its file."""

    file: str  # without .cu
    arch: str
    defines: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        shown = (f"{name}={value}" for name, value in self.defines if name not in ("SHARED_BYTES", "TILE_ROWS"))
        return "-".join((self.file, *shown, self.arch))

    @property
    def constants(self) -> dict[str, Any]:
        return dict(self.defines)

    @property
    def kernels(self) -> tuple[str, ...]:
        return kernels_of(self.file)


def kernels_of(file: str) -> tuple[str, ...]:
    return tuple(name for name, path in kernels.kernel_files().items() if path.stem == file)


@functools.cache
def variants() -> dict[str, list[dict[str, int]]]:
    """The sets of constants with which each file is compiled: those of recipes for a choice of shapes."""
    dtypes = ("float16", "bfloat16")
    # All pairs of these three, in half the builds of all combinations.
    features = [
        {"dtype": dtype, "logits_soft_cap": soft_cap, "sinks": (dtype == "bfloat16") != (soft_cap > 0)}
        for dtype in dtypes
        for soft_cap in (0.0, 30.0)
    ]
    made: list[Recipe] = [*recipes.TABLES, recipes.PLAN_REQUESTS, recipes.PLAN_SPLITS, recipes.PLAN_TILES]
    for head_dim in (*HEAD_DIMS, *OTHER_HEAD_DIMS):
        made.append(recipes.append_recipe(8, head_dim, head_dim))
        for dtype in (np.dtype(DTYPES[name]) for name in dtypes):
            merges = [*recipes.merge_recipes(8, head_dim, dtype)]
            merges.append(recipes.merge_recipe("merge_states", 8, head_dim, 1, dtype, dtype))
            for recipe in merges:
                constants = dict(recipe.constants)
                made.append(_with_feature(recipe, sinks=constants["OUT_FLOAT32"] != constants["BFLOAT16"]))
            made += (recipes.exchange_recipe(head_dim, v, dtype) for v in (recipes.FLOAT32, dtype))
        for feature in features:
            made += _prefill(H100, head_dim, **feature)
    for head_dim, v_dim in MIXED_DIMS:
        made.append(recipes.append_recipe(8, head_dim, v_dim))
        made += _prefill(H100, head_dim, v_dim=v_dim, dtype="bfloat16", sinks=True)
    for key in _keys("decode"):
        for feature in features:
            made += _decode(*key, **feature)
    files: dict[str, dict[tuple[tuple[str, int], ...], None]] = {}
    for recipe in made:
        files.setdefault(kernels.kernel_files()[recipe.kernel].stem, {})[recipe.constants] = None
    return {file: [dict(constants) for constants in sets] for file, sets in sorted(files.items())}


def _keys(kernel: str) -> list[Any]:
    limits = REGISTERS[kernel]
    assert isinstance(limits, dict)
    return list(limits)


def _decode(head_dim: int, columns: int, v_dim: int | None = None, **fields: Any) -> list[Recipe]:
    """CTAs that have an SM for themselves, with one block of columns and with two, that share one, and that are many;
    those of batch-invariant plans; and those of a card with little shared memory."""
    made = (
        decode_recipe(rows, head_dim, num_pairs, batch_invariant=batch_invariant, card=card, v_dim=v_dim, **fields)
        for rows in (columns, 2 * columns)
        for num_pairs in (1, recipes.MANY_PAIRS - 1, recipes.MANY_PAIRS)
        for batch_invariant in (False, True)
        for card in (H100, Card(84, 100 * 1024, 89))
    )
    return [_with_feature(recipe, **fields) for recipe in made if recipe.columns == columns]


def _prefill(card: Card, head_dim: int, **fields: Any) -> Iterator[Recipe]:
    """What kernels/prefill*.cu are compiled for: pages that TMA takes and such that it does not."""
    for page_size in (16, 1):
        for is_long in (False, True):
            case = Case("recipe", (1,), q_lens=(1,), head_dim=head_dim, page_size=page_size, **fields)
            for recipe in recipes.prefill_recipes(spec_of(case), card, is_long=is_long):
                yield _with_feature(recipe, **fields)


def _with_feature(recipe: Recipe, *, sinks: bool = False, **others: Any) -> Recipe:
    return recipes.with_constants(recipe, ("SINKS",)) if sinks else recipe


def matrix(architectures: tuple[str, ...] = ARCHITECTURES) -> list[Build]:
    """Every build, a kernel named *_hopper on sm_90a alone."""
    rows = []
    for file, sets in variants().items():
        for constants in sets:
            head_dim = constants.get("HEAD_DIM")
            on_hopper = file.endswith("_hopper") or head_dim in OTHER_HEAD_DIMS
            on_hopper = on_hopper or constants.get("V_HEAD_DIM", head_dim) != head_dim
            for arch in architectures:
                if arch == "sm_90a" or not on_hopper:
                    rows.append(Build(file, arch, tuple(constants.items())))
    return rows


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_text(source: str, arch: str, constants: Mapping[str, Any]) -> str:
    """The log of compile_cubin."""
    return compile_cubin(source, arch, constants)[0]


def compile_cubin(source: str, arch: str, constants: Mapping[str, Any]) -> tuple[str, bytes]:
    """Compiles a text as CuPy does: the log, with ptxas's report, and the cubin. ValueError with the messages."""
    from cuda.bindings import nvrtc

    def check(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC: {result[0]}")
        return result[1] if len(result) > 1 else None

    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    # What a cache of the driver's holds is not compiled again, and ptxas does not report on it.
    options = (*kernels.options(arch, **constants), *CUPY_OPTIONS, "--ptxas-options=-v", "--no-cache")
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = bytes(check(nvrtc.nvrtcGetProgramLogSize(program)))
    check(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode().strip("\0 ")
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        check(nvrtc.nvrtcDestroyProgram(program))
        raise ValueError(text)
    cubin = bytes(check(nvrtc.nvrtcGetCUBINSize(program)))
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    check(nvrtc.nvrtcDestroyProgram(program))
    return text, cubin


def compile_build(build: Build) -> str:
    """The log of a build, whose kernels' structs the compiler has found to be what params_dtype says."""
    source = kernels.load_source(f"{build.file}.cu")
    return compile_text(source + "".join(map(offset_assertions, build.kernels)), build.arch, build.constants)


def offset_assertions(name: str) -> str:
    """What the compiler itself must think of the kernel's struct."""
    source = kernels.load_source(name)
    struct = kernels.params_name(source, name)
    dtype = kernels.params_dtype(source, struct)
    assert dtype.fields is not None
    checks = [f"sizeof({struct}) == {dtype.itemsize}"]
    for field, (field_dtype, offset, *_) in dtype.fields.items():
        checks.append(f"__INTADDR__(&(({struct}*)0)->{field}) == {offset}")  # NVRTC's own offsetof
        checks.append(f"sizeof((({struct}*)0)->{field}) == {field_dtype.itemsize}")
    return "".join(f'static_assert({check}, "params_dtype");\n' for check in checks)


def registers(log: str, kernel: str) -> int:
    """The registers of a thread, by ptxas's report."""
    return int(_report(log, kernel)[1])


def faults(log: str, kernel: str, limit: int) -> list[str]:
    """What is wrong with a kernel by ptxas's report: memory used in place of registers, too many of them, a warning."""
    memory, used = _report(log, kernel)
    found = []
    if memory != "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads":
        found.append(f"{kernel}: {memory}")
    if int(used) > limit:
        found.append(f"{kernel} uses {used} registers, more than its limit of {limit}")
    # C7510 to C7512: wgmma that waits for the one before. It comes as a remark, not as a warning.
    found += [line.strip() for line in log.splitlines() if re.search(r"\bwarning\b|\bC751[0-2]\b|serialized", line)]
    return found


def _report(log: str, kernel: str) -> tuple[str, str]:
    report = re.search(
        rf"entry function '{kernel}' for .*?(\d+ bytes stack.*?)\n.*?Used (\d+) registers", log, re.DOTALL
    )
    assert report, f"ptxas does not speak of {kernel}:\n{log}"
    return report[1].strip(), report[2]
