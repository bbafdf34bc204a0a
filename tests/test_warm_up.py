"""warm_up: what it refuses, and that it covers every recipe a call can ask for."""

from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import recipes
from paged_attn.card import A100, H100, Card
from paged_attn.warm_up import needed_recipes
from tests.cases import Case
from tests.specs import shapes_of, spec_of

MODEL: dict[str, Any] = {
    "num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "page_size": 16, "device": "cpu",
}  # fmt: skip


def test_on_a_cpu_there_is_nothing_to_compile() -> None:
    for op in ("append", "decode", "prefill", "merge"):
        pa.warm_up(op, **MODEL)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"op": "attend"}, ValueError, "op is 'attend', which is none of append, decode, prefill, merge"),
        ({"num_qo_heads": 9}, ValueError, "num_qo_heads=9 is not a multiple of num_kv_heads=2"),
        ({"head_dim": 0}, ValueError, "head_dim is 0"),
        ({"max_batch_size": 2.5}, TypeError, "max_batch_size must be an int"),
        ({"dtype": "int8"}, (TypeError, ValueError), "int8"),
        ({"kv_dtype": "float32"}, NotImplementedError, "kv_dtype is float32 and dtype float16"),
        ({"kv_dtype": "float8_e4m3fn"}, NotImplementedError, "kv_dtype is float8_e4m3fn and dtype float16"),
        ({"kv_dtype": "int9"}, TypeError, "kv_dtype must be one of .*, got 'int9'"),
        ({"soft_cap": 30.0}, TypeError, r"soft_cap must be a bool, got 30.0 \(float\); pass True or False"),
        ({"sinks": np.zeros(8)}, TypeError, r"sinks must be a bool, got an array of shape \(8,\)"),
        ({"device": "cuda:99"}, (ValueError, ImportError), "cuda"),
    ],
)
def test_what_is_wrong_is_named(changed: dict[str, Any], error: Any, message: str) -> None:
    arguments = {"op": "decode", **MODEL, **changed}
    with pytest.raises(error, match=message):
        pa.warm_up(**arguments)


@pytest.mark.parametrize("card", [A100, H100, Card(84, 100 * 1024, 89)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_recipe_of_decode_is_needed_beforehand(card: Card, head_dim: int) -> None:
    """Of batches of any size, up to the most that was said."""
    case = Case("warm", (1,), num_qo_heads=32, num_kv_heads=8, head_dim=head_dim)
    for most in (None, 5):
        builds = {recipe.constants for recipe in needed_recipes("decode", shapes_of(case, most), card)}
        for batch in range(1, 600 if most is None else most + 1):
            for invariant in (False, True):
                assert recipes.decode_recipe(spec_of(case), batch, invariant, card).constants in builds


def test_hopper_takes_its_own_prefill_and_no_other() -> None:
    case = Case("warm", (1,), q_lens=(1,), num_qo_heads=32, num_kv_heads=8, head_dim=128)
    names = [{recipe.kernel for recipe in needed_recipes("prefill", shapes_of(case), card)} for card in (H100, A100)]
    assert {"prefill_hopper", "plan_tiles"} <= names[0] and "prefill" not in names[0]
    assert "prefill" in names[1] and not {"prefill_hopper", "plan_tiles"} & names[1]
