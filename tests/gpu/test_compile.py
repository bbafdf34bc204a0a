"""What RawModule builds for this card is what the matrix of tests/nvrtc.py sees without one: the same registers."""

import pytest

from paged_attn import compile as kernels
from tests.nvrtc import Build, compile_build, matrix, registers

cupy = pytest.importorskip("cupy")


def builds_of_this_card() -> list[Build]:
    """Every kernel in every format and feature, those with a head_dim at 128."""
    capability = cupy.cuda.Device().compute_capability if cupy.is_available() else "90"
    arch = "sm_90a" if capability == "90" else f"sm_{capability}"  # as compile.Kernel has it
    return [build for build in matrix((arch,)) if build.constants.get("HEAD_DIM", 128) == 128]


def test_one_nvrtc() -> None:
    """The registers of two NVRTCs need not agree."""
    from cuda.bindings import nvrtc
    from cupy.cuda import nvrtc as nvrtc_of_cupy

    assert nvrtc.nvrtcVersion()[1:] == nvrtc_of_cupy.getVersion()


@pytest.mark.parametrize("build", builds_of_this_card(), ids=str)
def test_cupy_builds_the_same(build: Build) -> None:
    log = compile_build(build)
    for name in build.kernels:
        function = kernels.kernel(name, "cuda:0", **build.constants)._function
        assert function.num_regs == registers(log, name), name
        assert function.local_size_bytes == 0, f"{name} spills"
