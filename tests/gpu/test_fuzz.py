"""1,000 corrupted inputs on the card: no hang, no fault, canaries intact, a culprit named (what they are: fuzz.py)."""

from collections import Counter

from paged_attn import compile as kernels
from tests import child

INPUTS = 1000
OPERATIONS = 16
HEAD_DIMS = (48, 128)  # one that portable kernels alone know, and one that every kernel knows


def test_corrupted_inputs_do_no_harm() -> None:
    rounds = -(-INPUTS // (OPERATIONS * len(HEAD_DIMS)))
    launches, inputs, with_a_fault = Counter[str](), Counter[str](), 0
    for seed, head_dim in enumerate(HEAD_DIMS):
        arguments = ("--rounds", rounds, "--seed", seed, "--head-dim", head_dim)
        said = child.run("tests.gpu.fuzz", *arguments, seconds=100)
        launches.update(said["launches"])
        inputs.update(said["inputs"])
        with_a_fault += sum(said["with_a_fault"].values())
    assert len(inputs) == OPERATIONS and inputs.total() >= INPUTS
    assert with_a_fault > INPUTS / 2
    others = ("prefill_hopper.cu", "exchange.cu", "lengths.cu")  # the last two take no number as a place
    wanted = {name for name, path in kernels.kernel_files().items() if path.name not in others}
    assert wanted <= set(launches), "a kernel has not met a corrupted input"
