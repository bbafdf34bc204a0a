"""The way from kernels/*.cu to a function: text, struct, options; and every kernel through NVRTC, without a GPU."""

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from paged_attn import planner

# What CuPy adds to the options of every kernel, beside the architecture.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
ARCHITECTURES = ("sm_80", "sm_90a")


def decode(q_len: int, group_size: int, head_dim: int, registers: int) -> tuple[dict[str, Any], int]:
    shape = planner.decode_shape(q_len, group_size, head_dim)
    return {"HEAD_DIM": head_dim, "COLUMNS": shape.columns, "SHARED_BYTES": shape.shared_bytes}, registers


def prefill(head_dim: int, registers: int) -> tuple[dict[str, Any], int]:
    shape = planner.prefill_shape(head_dim)
    return {"HEAD_DIM": head_dim, "TILE_ROWS": shape.tile_rows, "SHARED_BYTES": shape.shared_bytes}, registers


def merge(head_dim: int, vector: int, v_float32: int, out_float32: int) -> tuple[dict[str, Any], int]:
    return {"HEAD_DIM": head_dim, "VEC": vector, "V_FLOAT32": v_float32, "OUT_FLOAT32": out_float32}, 128


# Every kernel: the constants it is compiled with, and the most registers a thread may take (255: the hardware's limit).
VARIANTS: dict[str, list[tuple[dict[str, Any], int]]] = {
    "append": [({"HEAD_DIM": head_dim}, 40) for head_dim in (16, 80, 128, 256)],
    "block_table_pages": [({}, 40)],
    "block_table_rows": [({}, 64)],
    "build_table": [({}, 40)],
    "check_table": [({}, 40)],
    "copy_pages": [({}, 40)],
    "decode": [
        decode(1, 4, 128, 128),
        decode(1, 16, 128, 255),
        decode(1, 32, 64, 255),
        decode(1, 1, 16, 128),
        decode(1, 4, 96, 128),
        decode(1, 4, 256, 255),
    ],
    "merge_state": [merge(128, 8, 0, 0), merge(128, 4, 1, 0), merge(128, 4, 1, 1), merge(80, 1, 0, 0)],
    "merge_states": [merge(128, 8, 0, 0), merge(128, 4, 1, 0), merge(128, 4, 1, 1), merge(80, 1, 0, 0)],
    "plan_requests": [({}, 64)],
    "prefill": [prefill(128, 255), prefill(64, 255), prefill(80, 255), prefill(16, 255), prefill(256, 255)],
    "seq_lens": [({}, 40)],
    "split_pages": [({}, 40)],
    "split_rows": [({}, 64)],
    "table_slots": [({}, 40)],
    "to_block_table": [({}, 40)],
    "update_page_lists": [({}, 40)],
}
# The kernels that compute with 16-bit numbers, and those that know a soft cap. Both kinds of both are met once.
SIXTEEN_BIT = ("decode", "merge_state", "merge_states", "prefill")
SOFT_CAP = ("decode", "prefill")


def nvrtc_log(source: str, options: tuple[str, ...]) -> str:
    """Compiles with NVRTC; ptxas's report. Fails with the compiler's messages."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

    def check(result: tuple[Any, ...]) -> Any:
        assert result[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS, result
        return result[1] if len(result) > 1 else None

    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    arguments = [option.encode() for option in options]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
    log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
    check(nvrtc.nvrtcGetProgramLog(program, log))
    check(nvrtc.nvrtcDestroyProgram(program))
    text = log.decode().strip("\0 ")
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
    return text


def variants() -> list[Any]:
    rows = []
    for name, table in VARIANTS.items():
        for constants, registers in table:
            for flag in (0, 1) if name in SIXTEEN_BIT else (None,):
                kind = {} if flag is None else {"BFLOAT16": flag}
                if name in SOFT_CAP:
                    kind["SOFT_CAP"] = flag
                label = ",".join(f"{key}={value}" for key, value in (constants | kind).items() if key != "SHARED_BYTES")
                for arch in ARCHITECTURES:
                    rows.append(pytest.param(name, arch, constants | kind, registers, id=f"{name}-{label}-{arch}"))
    return rows


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


def test_every_kernel_has_its_variants_and_limits() -> None:
    assert sorted(VARIANTS) == sorted(kernels.kernel_files()), "bring VARIANTS in line with kernels/*.cu"


@pytest.mark.parametrize(("name", "arch", "defines", "registers"), variants())
def test_kernel_compiles_without_spills(name: str, arch: str, defines: dict[str, Any], registers: int) -> None:
    source = kernels.load_source(name) + offset_assertions(name)
    log = nvrtc_log(source, (*kernels.options(arch, **defines), *CUPY_OPTIONS, "--ptxas-options=-v"))
    report = re.search(rf"entry function '{name}' for '{arch}'(.*?)Used (\d+) registers", log, re.DOTALL)
    assert report, log
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report[1], report[0]
    assert int(report[2]) <= registers, f"{name} uses {report[2]} registers, more than its limit of {registers}"
    assert "warning" not in log, log


def test_options() -> None:
    assert kernels.options(None) == ("-std=c++17",)
    assert kernels.options("sm_90a", HEAD_DIM=128, BFLOAT16=True) == (
        "-std=c++17",
        "-arch=sm_90a",
        "-DBFLOAT16=1",
        "-DHEAD_DIM=128",
    )


# --- the text --------------------------------------------------------------------------------------------------------


def test_flattened_text_has_every_line_under_its_own_file_and_number() -> None:
    for kernel in kernels.kernel_files():
        seen: dict[str, set[int]] = {}
        file, number = "", 0
        for line in kernels.load_source(kernel).splitlines():
            if directive := re.fullmatch(r'#line (\d+) "(.*)"', line):
                file, number = directive[2], int(directive[1])
                continue
            original = (kernels.kernel_dir() / file).read_text(encoding="utf-8").splitlines()[number - 1]
            assert line == ("" if original.strip() == "#pragma once" else original)
            assert number not in seen.setdefault(file, set()), "a header comes once"
            seen[file].add(number)
            number += 1
        for file, numbers in seen.items():
            lines = (kernels.kernel_dir() / file).read_text(encoding="utf-8").splitlines()
            missing = [line for i, line in enumerate(lines, start=1) if i not in numbers]
            assert all(line.startswith('#include "') for line in missing)


def test_an_unknown_kernel_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"there is no kernel 'dekode' in .*; pass one of append, .*decode"):
        kernels.load_source("dekode")


def test_kernels_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "paged_attn"
    package.mkdir()
    monkeypatch.setattr(kernels, "__file__", str(package / "compile.py"))
    assert kernels.kernel_dir() == tmp_path / "kernels"
    (package / "kernels").mkdir()
    assert kernels.kernel_dir() == package / "kernels"


# --- the struct ------------------------------------------------------------------------------------------------------

STRUCTS = """
struct Pair { u32 a; int b; };  // 8 bytes
struct __align__(16) Wide {
    u64 x;   /* one; two */
    Pair pair;
    float y;
};
struct Unknown { short s; };
struct Params {
    const float4* __restrict__ q;  // [n]; a comment with a semicolon
    int n;
    Wide wide;
    Pair pairs[3];
    float scale[2];
    u32 flag;
    i64 big;
};
extern "C" __global__ void twice(const __grid_constant__ Params p) {}
"""


def test_params_dtype_has_the_offsets_of_c() -> None:
    dtype = kernels.params_dtype(STRUCTS, "Params")
    assert dtype.fields is not None
    offsets = {name: field[1] for name, field in dtype.fields.items()}
    assert offsets == {"q": 0, "n": 8, "wide": 16, "pairs": 48, "scale": 72, "flag": 80, "big": 88}
    assert dtype.itemsize == 96
    assert dtype["wide"].itemsize == 32
    assert kernels.params_name(STRUCTS, "twice") == "Params"


def test_a_struct_that_cannot_be_read_says_why() -> None:
    with pytest.raises(ValueError, match=r"struct Unknown: 'short s' is not one field of type pointer, int, u32"):
        kernels.params_dtype(STRUCTS, "Unknown")
    with pytest.raises(ValueError, match="'int a, b' is not one field"):
        kernels.params_dtype("struct Two { int a, b; };", "Two")
    with pytest.raises(ValueError, match="the text has no struct Missing"):
        kernels.params_dtype(STRUCTS, "Missing")
    with pytest.raises(ValueError, match="the text has no kernel thrice"):
        kernels.params_name(STRUCTS, "thrice")


def test_fill_by_name() -> None:
    params = np.zeros((), kernels.params_dtype(STRUCTS, "Params"))
    q = np.zeros(4, np.float32)
    kernels.fill(
        params, {"q": q, "n": True, "wide": {"x": 2**63, "pair": (7, -8)}, "scale": (0.5, 2), "big": np.int64(-1)}
    )
    assert params["q"] == q.ctypes.data
    assert params["n"] == 1
    assert params["wide"].item() == (2**63, (7, -8), 0.0)
    assert params["scale"].tolist() == [0.5, 2.0]
    assert params["big"] == -1
    kernels.fill(params, {"q": None})
    assert params["q"] == 0
    with pytest.raises(ValueError, match="lens"):
        kernels.fill(params, {"lens": 3})


# --- division --------------------------------------------------------------------------------------------------------


def divide(n: np.ndarray, divisor: int) -> np.ndarray:
    """`divide` of page_table.cuh."""
    by, multiplier, shift = kernels.fast_divide(divisor)
    assert by == divisor
    assert 0 <= multiplier < 2**32
    assert 0 <= shift < 32
    wide = n.astype(np.uint64)
    return (wide * np.uint64(multiplier) >> np.uint64(32) if multiplier else wide) >> np.uint64(shift)


def divisors() -> list[int]:
    powers = [2**k + d for k in range(31) for d in (-1, 0, 1)]
    spread = np.random.default_rng(0).integers(1, 2**31, 300).tolist()
    return sorted({d for d in (*range(1, 1025), *powers, *spread, 2**31 - 1) if 1 <= d < 2**31})


def test_fast_divide_is_exact() -> None:
    random = np.random.default_rng(1).integers(0, 2**31, 2000)
    for divisor in divisors():
        # A wrong multiplier shows first just below and at multiples of the divisor, and most at the largest n.
        multiples = np.arange(1, 1001) * divisor
        last = (2**31 - 1) // divisor * divisor
        n = np.concatenate([random, multiples - 1, multiples, last - np.arange(4), 2**31 - 1 - np.arange(4)])
        n = n[(n >= 0) & (n < 2**31)]
        np.testing.assert_array_equal(divide(n, divisor), n // divisor, err_msg=f"divisor {divisor}")


@pytest.mark.parametrize("divisor", [0, -1, 2**31])
def test_fast_divide_refuses_other_divisors(divisor: int) -> None:
    with pytest.raises(ValueError, match=rf"divisor is {divisor}, which is not in \[1, 2\*\*31\)"):
        kernels.fast_divide(divisor)


# --- launching, with a driver that only takes notes ------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What cuLaunchKernelEx was given: (grid, block, shared_bytes, stream, function, bytes of the parameters)."""
    driver = pytest.importorskip("cuda.bindings.driver")
    notes: list[tuple[Any, ...]] = []

    def launch(config_address: int, function: int, arguments: int, extra: None) -> int:
        config = driver.CUlaunchConfig(config_address)  # the driver's own reading of the struct
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        params = ctypes.string_at(address, kernels.params_dtype(STRUCTS, "Params").itemsize)
        notes.append((grid, block, config.sharedMemBytes, int(config.hStream), function, params))
        assert config.numAttrs == 0
        assert extra is None
        return 0

    monkeypatch.setattr(kernels, "_launch_function", lambda: launch)
    return notes


def compiled() -> kernels.Kernel:
    """A kernel as a GPU would have it."""
    kernel = object.__new__(kernels.Kernel)
    kernel.name = "twice"
    kernel.dtype = kernels.params_dtype(STRUCTS, "Params")
    kernel.shared_bytes = 1000
    kernel.function_pointer = 0xF00
    kernel.device_index = 0
    return kernel


def test_a_launch_is_prepared_once_and_repeated(launches: list[tuple[Any, ...]]) -> None:
    kernel = compiled()
    launch = kernels.Launch(kernel, (32, 4), kernel.params({"n": 5}))
    first = launch.params.tobytes()
    launch(0xABC, 7)
    launch.params["n"] = 6
    launch(0xDEF, 8, 9, 10)
    assert launches == [
        ((7, 1, 1), (32, 4, 1), 1000, 0xABC, 0xF00, first),
        ((8, 9, 10), (32, 4, 1), 1000, 0xDEF, 0xF00, launch.params.tobytes()),
    ]
    assert first != launch.params.tobytes()


def test_launching_once(launches: list[tuple[Any, ...]]) -> None:
    kernel = compiled()
    params = kernel.params({"n": 5})
    kernel.launch((3, 2), 64, params, stream=0xABC)
    assert launches == [((3, 2, 1), (64, 1, 1), 1000, 0xABC, 0xF00, params.tobytes())]


def test_a_launch_takes_the_kernels_own_parameters_only() -> None:
    with pytest.raises(ValueError, match="pass what the kernel's own params"):
        kernels.Launch(compiled(), 32, np.zeros((), "i4"))
