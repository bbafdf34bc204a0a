"""100 corrupted inputs for every operation through the CUDA backend, with the shim as its card (tests/gpu/fuzz.py)."""

import pytest

from paged_attn import compile as kernels
from tests import child

INPUTS = 100
GROUPS = {
    "decode": (("decode", "decode_once", "partials", "merge_states", "merge_state"), {"plan_requests", "decode"}),
    "prefill": (("prefill", "prefill_once"), {"plan_requests", "prefill"}),
    "tables": (
        ("validate", "split", "seq_lens", "from_block_table", "to_block_table", "slots"),
        {"check_table", "split_rows", "split_pages", "seq_lens", "to_block_table", "table_slots"},
    ),
    "pages": (
        ("append", "update_table", "copy_pages"), {"append", "update_page_lists", "build_table", "copy_pages"}
    ),
}  # fmt: skip


def fuzz(*arguments: object) -> dict[str, dict[str, int]]:
    return child.run("tests.simt.fuzz", "--head-dim", 16, *arguments, seconds=240)


@pytest.mark.parametrize("group", GROUPS)
def test_corrupted_inputs_do_no_harm(group: str) -> None:
    operations, launched = GROUPS[group]
    said = fuzz("--rounds", INPUTS, "--operations", *operations)
    assert said["inputs"] == dict.fromkeys(operations, INPUTS)
    assert launched <= set(said["launches"]) and min(said["launches"].values()) >= INPUTS
    for operation in set(operations) - {"seq_lens", "merge_states", "merge_state"}:  # they have no rule to break
        assert said["with_a_fault"][operation] > INPUTS / 3


def test_every_portable_kernel_meets_corrupted_inputs() -> None:
    others = ("prefill_hopper.cu", "tiles.cu", "exchange.cu", "lengths.cu")  # the last two take no number as a place
    portable = {name for name, path in kernels.kernel_files().items() if path.name not in others}
    assert set(fuzz("--rounds", 1)["launches"]) == portable
