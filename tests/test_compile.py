"""The way from kernels/*.cu to a function: text, struct, options; and every kernel through NVRTC, without a GPU."""

import ctypes
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from tests.nvrtc import (
    ARCHITECTURES,
    HEAD_DIMS,
    REGISTERS,
    Build,
    compile_build,
    compile_text,
    faults,
    matrix,
    register_limit,
)


@pytest.mark.parametrize("build", matrix(), ids=str)
def test_kernels_compile_within_their_limits(build: Build) -> None:
    log = compile_build(build)
    found = [fault for name in build.kernels for fault in faults(log, name, register_limit(name, build.constants))]
    assert not found, "\n".join(found)


def test_the_matrix_has_every_kernel() -> None:
    """Each for every card (one named *_hopper for sm_90a), in every head_dim, format and feature that it knows."""
    assert sorted(REGISTERS) == sorted(kernels.kernel_files()), "bring tests/nvrtc.py in line with kernels/"
    builds = matrix()
    for file in {path.stem for path in kernels.kernel_files().values()}:
        text = (kernels.kernel_dir() / f"{file}.cu").read_text(encoding="utf-8")
        on_hopper, limits = file.endswith("_hopper"), REGISTERS.get(file)
        head_dims = tuple(limits) if on_hopper and isinstance(limits, dict) else HEAD_DIMS
        axes = {"HEAD_DIM": head_dims, "SOFT_CAP": (0, 1), "BFLOAT16": (0, 1)}
        known = [name for name in axes if name in text or (name == "BFLOAT16" and "mma.cuh" in text)]
        wanted = set(itertools.product(*(axes[name] for name in known)))
        for arch in {build.arch for build in builds} | set(ARCHITECTURES):
            sets = [build.constants for build in builds if (build.file, build.arch) == (file, arch)]
            if on_hopper and arch != "sm_90a":
                assert not sets
            else:
                missing = wanted - {tuple(constants[name] for name in known) for constants in sets}
                assert not missing, f"bring variants() of tests/nvrtc.py in line with {file}.cu: {known} = {missing}"


PROBE = """
struct Params { float* out; int n; };
extern "C" __global__ void __launch_bounds__(%d) probe(const __grid_constant__ Params p) { %s }
"""
# Accumulators that are read while a wgmma writes them: ptxas has to wait for each.
WGMMA = """
    float c[4] = {};
    for (int i = 0; i < p.n; ++i) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(i + 5ll), "l"(i + 7ll));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        c[0] *= 2.f;
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = c[i];
"""
ARRAY = "float x[64]; for (int i = 0; i < 64; ++i) x[i * p.n & 63] = p.out[i]; p.out[0] = x[p.n] + x[p.n / 2];"


def sums(count: int) -> str:
    """A body that keeps `count` numbers alive at once."""
    loads = "".join(f"const float x{i} = p.out[threadIdx.x + {i} * p.n];" for i in range(count))
    return loads + "".join(f"p.out[threadIdx.x * p.n + {i}] = x{i} * x{(i + 1) % count};" for i in range(count))


@pytest.mark.parametrize(
    ("threads", "body", "message"),
    [
        (256, "p.out[threadIdx.x] = p.n;", None),
        (1024, sums(150), r"probe: .* [1-9]\d* bytes spill stores"),
        (256, ARRAY, r"probe: 256 bytes stack"),
        (512, sums(100), r"probe uses \d+ registers, more than its limit of 64"),
        (128, WGMMA, r"C751[0-2].*serialized"),
    ],
    ids=["right", "spill", "stack frame", "registers", "serialised wgmma"],
)
def test_what_ptxas_must_not_say(threads: int, body: str, message: str | None) -> None:
    found = faults(compile_text(PROBE.replace("%d", str(threads)).replace("%s", body), "sm_90a", {}), "probe", 64)
    assert re.search(message, "\n".join(found)) if message else not found, found


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
    with pytest.raises(ValueError, match=r"struct Pick: '#if SINKS' is among its fields.*; keep every field"):
        kernels.params_dtype("struct Pick {\n int a;\n#if SINKS\n float* sinks;\n#endif\n};", "Pick")
    with pytest.raises(ValueError, match="struct Missing: it is not in the text"):
        kernels.params_dtype(STRUCTS, "Missing")
    with pytest.raises(ValueError, match="the text has no kernel thrice"):
        kernels.params_name(STRUCTS, "thrice")


def test_a_struct_under_if_is_refused_and_one_of_the_device_may_hold_what_it_likes() -> None:
    """What the preprocessor takes away is there for the host: all fields behind it would move on the GPU alone."""
    either = "#if SINKS\nstruct P { int n; float* sinks; };\n#else\nstruct P { int n; };\n#endif\n"
    with pytest.raises(ValueError, match=r"struct P: the text defines it more than once.*own name"):
        kernels.params_dtype(either, "P")
    with pytest.raises(ValueError, match=r"struct Q: 'P part' is not one field"):
        kernels.params_dtype(either + "struct Q { P part; };", "Q")
    device = "struct Results {\n#if TMA\n u32 place;\n#endif\n float2 x;\n};\n" + either + "struct Q { int n; };"
    assert kernels.params_dtype(device, "Q").names == ("n",)


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
    """What cuLaunchKernelEx was given: (grid, block, shared_bytes, stream, function, bytes of the parameters), and the
    blocks of a cluster where they were asked for."""
    driver = pytest.importorskip("cuda.bindings.driver")
    notes: list[tuple[Any, ...]] = []

    def launch(config_address: int, function: int, arguments: int, extra: None) -> int:
        config = driver.CUlaunchConfig(config_address)  # the driver's own reading of the struct
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        params = ctypes.string_at(address, kernels.params_dtype(STRUCTS, "Params").itemsize)
        clusters = []
        if config.numAttrs:
            attribute = driver.CUlaunchAttribute(kernels._LaunchConfig.from_address(config_address).attributes)
            assert attribute.id == driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster = attribute.value.clusterDim
            clusters = [(cluster.x, cluster.y, cluster.z)]
        notes.append((grid, block, config.sharedMemBytes, int(config.hStream), function, params, *clusters))
        assert config.numAttrs == len(clusters)
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


def test_a_writer_steps_over_what_pads_a_nested_struct(launches: list[tuple[Any, ...]]) -> None:
    kernel = compiled()
    source = "struct Odd { u64 x; int y; }; struct Params { int a; Odd odd; int b; u64 c; };"
    kernel.dtype = kernels.params_dtype(source, "Params")
    launch = kernels.Launch(kernel, 32, kernel.params())
    launch.writer()(1, 2, 3, 4, 5)
    assert launch.params.item() == (1, (2, 3), 4, 5)
    launch.writer("odd", "b")(6, 7, 8)
    assert launch.params.item() == (1, (6, 7), 8, 5)


def test_a_launch_in_clusters(launches: list[tuple[Any, ...]]) -> None:
    kernel = compiled()
    launch = kernels.Launch(kernel, 32, kernel.params(), cluster=2)
    launch(0xABC, 8)
    launch(0xABC, 6)
    assert [(grid, cluster) for grid, *_, cluster in launches] == [((8, 1, 1), (2, 1, 1)), ((6, 1, 1), (2, 1, 1))]


def test_a_launch_takes_the_kernels_own_parameters_only() -> None:
    with pytest.raises(ValueError, match="pass what the kernel's own params"):
        kernels.Launch(compiled(), 32, np.zeros((), "i4"))
