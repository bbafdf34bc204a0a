"""What the compiler makes of the Hopper prefill: products in long bursts, and no memory in place of registers."""

import re
import subprocess
from pathlib import Path

import pytest
from cuda.pathfinder import find_nvidia_binary_utility

from paged_attn import compile as kernels
from tests.nvrtc import Build, compile_cubin, matrix

BUILDS = [build for build in matrix(("sm_90a",)) if build.file == "prefill_hopper" and build.constants["BFLOAT16"]]
FIRST_PART = 28  # exponentials before the first sum, as in prefill_hopper.cu
WAITS = 5  # wgmma_wait: behind the first scores, and twice each in the loop and at the end of a tile


def faults(source: str, build: Build, folder: Path) -> list[str]:
    """What is wrong with the instructions of a build."""
    _, cubin = compile_cubin(source, build.arch, build.constants)
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    nvdisasm = find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm, 'nvdisasm is missing; install it with pip install -e ".[test]"'
    text = subprocess.run([nvdisasm, "-c", file], text=True, capture_output=True, check=True).stdout
    # One a line, without addresses and predicates.
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?\s*(\S[^;]*?)\s*;", text, re.MULTILINE)
    names = [instruction.split()[0].split(".")[0] for instruction in instructions]

    found = [f"{name}: a spilled register" for name in names if name in ("LDL", "STL")]
    # Q K^T stands in three places, P V in two. A wait in between would serialise them.
    head_dim = build.constants["HEAD_DIM"]
    block = 64 if head_dim > 128 else 128
    right = 3 * (head_dim // 16) + 2 * (block // 16)
    if names.count("HGMMA") != right:
        found.append(f"{names.count('HGMMA')} products, not {right}")
    waits = sum(instruction.startswith("WARPGROUP.DEPBAR") for instruction in instructions)
    if waits != WAITS:
        found.append(f"{waits} waits for products, not {WAITS}")
    # Exponentials before the first sum, which is what the fence is for: a basic block that ends before its sleep.
    if "NANOSLEEP" in names:
        fence = names.index("NANOSLEEP") - 1
        begin = max(i for i in range(fence) if names[i] == "BRA")
        before = names[begin:fence]
        if before.count("MUFU") < FIRST_PART or before.count("FADD") > FIRST_PART // 4:
            found.append(f"{before.count('MUFU')} exponentials and {before.count('FADD')} sums before the fence")
    elif head_dim == 128 and not build.constants["GATHER"]:
        found.append("no fence")
    # What warps give up has to cover what others ask for, or these would wait for ever.
    asked = [int(count, 16) for count in re.findall(r"^USETMAXREG.*\b(0x\w+)$", "\n".join(instructions), re.MULTILINE)]
    if len(asked) != 2 or 128 * min(asked) + 256 * max(asked) > 384 * 168:
        found.append(f"warps ask for {asked} registers")
    return found


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_products_come_in_bursts(build: Build, tmp_path: Path) -> None:
    assert not faults(kernels.load_source(build.file), build, tmp_path)


def test_a_wait_too_many_a_fence_too_few_and_registers_too_many_are_seen(tmp_path: Path) -> None:
    (build, *_) = BUILDS
    source = kernels.load_source(build.file)
    burst = "\n            queries.multiply(s, k_matrix(k_ring.slot));\n"
    assert source.count(burst) == 1
    assert faults(source.replace(burst, burst + "wgmma_wait<0>();"), build, tmp_path)
    fenced = next(b for b in BUILDS if b.constants["HEAD_DIM"] == 128 and not b.constants["GATHER"])
    assert source.count("schedule_fence(block);") == 1
    assert faults(source.replace("schedule_fence(block);", ""), fenced, tmp_path)
    with pytest.raises(ValueError, match="168 a thread at launch"):
        faults(source.replace("PRODUCER_REGISTERS = 40", "PRODUCER_REGISTERS = 48"), build, tmp_path)
