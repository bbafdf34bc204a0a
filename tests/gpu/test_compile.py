"""What RawModule builds for this card is what the matrix of tests/nvrtc.py sees without one: the same registers."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from paged_attn import compile as kernels
from tests.nvrtc import Build, compile_build, matrix, registers

cupy = pytest.importorskip("cupy")


def builds_of_this_card() -> list[Build]:
    """Every kernel in every format and feature, those with a head_dim at 128."""
    capability = cupy.cuda.Device().compute_capability if cupy.is_available() else "90"
    arch = "sm_90a" if capability == "90" else f"sm_{capability}"  # as compile.Kernel has it
    return [build for build in matrix((arch,)) if build.constants.get("HEAD_DIM", 128) == 128]


def recipes_of(build: Build) -> list[kernels.Recipe]:
    return [kernels.Recipe(kernel=name, threads=32, constants=build.defines) for name in build.kernels]


@pytest.fixture(scope="module")
def built() -> Iterator[dict[Build, Future[tuple[str, list[kernels.Kernel]]]]]:
    """The log of each build, and its kernels as CuPy has built them: NVRTC works on many at a time."""

    def both(build: Build) -> tuple[str, list[kernels.Kernel]]:
        return compile_build(build), [kernels.kernel(recipe, "cuda:0") for recipe in recipes_of(build)]

    with ThreadPoolExecutor() as pool:
        yield {build: pool.submit(both, build) for build in builds_of_this_card()}


def test_one_nvrtc() -> None:
    """The registers of two NVRTCs need not agree."""
    from cuda.bindings import nvrtc
    from cupy.cuda import nvrtc as nvrtc_of_cupy

    assert nvrtc.nvrtcVersion()[1:] == nvrtc_of_cupy.getVersion()


@pytest.mark.parametrize("build", builds_of_this_card(), ids=str)
def test_cupy_builds_the_same(build: Build, built: dict[Build, Future[tuple[str, list[kernels.Kernel]]]]) -> None:
    log, of_cupy = built[build].result()
    for kernel in of_cupy:
        assert kernel._function.num_regs == registers(log, kernel.name), kernel.name
        assert kernel._function.local_size_bytes == 0, f"{kernel.name} spills"
