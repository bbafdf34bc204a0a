"""What help() and an editor show of the public functions, and what a type checker refuses."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import paged_attn as pa
from paged_attn import parallel
from paged_attn.spec import Scoring

ATTENTION = (pa.decode, pa.prefill, pa.single_decode, pa.single_prefill)
PLANS = (
    pa.BatchDecodeWithPagedKVCache.plan, pa.BatchPrefillWithPagedKVCache.plan, pa.BatchDecodeWithPagedKVCache.run,
)  # fmt: skip
CLASSES = (
    pa.BatchDecodeWithPagedKVCache, pa.BatchPrefillWithPagedKVCache, pa.PagedKV, pa.PageTable, pa.PagedKVCache,
)  # fmt: skip
METHODS = [
    getattr(kind, name)
    for kind, names in (
        (pa.PagedKVCache, "seq_len fork truncate free reserve write append page_table"),
        (pa.PageTable, "empty from_block_table to_block_table split slots validate"),
        (pa.PagedKV, "combined to_layout"),
    )
    for name in names.split()
]
PARALLEL = [getattr(parallel, name) for name in parallel.__all__]
PARALLEL += [
    parallel.BatchDecodeWithPagedKVCache.plan, parallel.BatchPrefillWithPagedKVCache.plan,
    parallel.BatchDecodeWithPagedKVCache.run,
]  # fmt: skip
FUNCTIONS = (
    *METHODS,
    *PARALLEL,
    *ATTENTION, *PLANS, *CLASSES, pa.append, pa.merge_state, pa.merge_states, pa.supports, pa.status, pa.warm_up,
)  # fmt: skip
SHARED = {"sm_scale", "causal", "window_left", "logits_soft_cap", "sinks", "out", "lse", "return_lse"}


def arguments(function: Callable[..., Any]) -> dict[str, str]:
    """What the section Parameters (or Attributes) of a docstring says of each argument, on one line."""
    text = inspect.getdoc(function) or ""
    *_, section = re.split(r"^(?:Parameters|Attributes)\n-+\n", text, flags=re.M)
    if section != text:
        section, *_ = re.split(r"\n\n|\nRaises\n", section)
    found = {}
    for entry in re.split(r"\n(?=\S)", section):
        names, _, text = entry.partition(": ")
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: f"{function.__module__}.{function.__qualname__}")
def test_every_argument_is_documented_with_its_default(function: Callable[..., Any]) -> None:
    said = arguments(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        assert said.get(name), f"{function.__qualname__} does not say what {name} is"
        if parameter.default is not inspect.Parameter.empty:
            assert "Default" in said[name], f"{function.__qualname__} does not say the default of {name}"
            default = {"e": '"e"', "decode": '"decode"'}.get(parameter.default, str(parameter.default))
            assert default in said[name], (name, default, said[name])


@pytest.mark.parametrize("function", (*ATTENTION, *PLANS), ids=lambda function: function.__qualname__)
def test_the_same_argument_is_documented_in_the_same_words(function: Callable[..., Any]) -> None:
    """Those of Scoring for what scores are, those of prefill for all else."""
    source = arguments(pa.prefill) | arguments(Scoring)
    said = arguments(function)
    for name in SHARED & set(inspect.signature(function).parameters):
        assert said[name] == source[name], name


def test_what_messages_and_docstrings_name_exists() -> None:
    """Plan classes, and errors of pools and tables."""
    for path in sorted(Path(pa.__file__).parent.rglob("*.py")):
        named = set(re.findall(r"\b(?:Batch[A-Z]\w+|(?:Layout|Page|Table|OutOf)\w*Error)\b", path.read_text()))
        unknown = {name for name in named if not hasattr(pa, name)}
        assert not unknown, f"{path.name} names {', '.join(unknown)}"


GOOD = """
import jax
import numpy as np
import paged_attn as pa
from typing import Any


class CupyLike:
    shape: tuple[int, ...] = ()
    dtype: Any = None

    def __dlpack__(self, stream: Any = None, max_version: Any = None) -> Any:
        return None


def calls(x: "np.ndarray[Any, Any]", y: CupyLike, z: jax.Array, table: pa.PageTable) -> None:
    for array in (x, y, z):
        kv = pa.PagedKV(array, array, layout="NHD")
        pa.decode(array, kv, table, out=array, sinks=array, return_lse=True)
        pa.prefill(array, array, kv, table, causal=False)
        pa.append(kv, array, array, array)
        pa.merge_states(array, array, base=2)
        pa.BatchDecodeWithPagedKVCache().run(array, kv, lse=array)
"""
BAD = (
    'pa.decode("nonsense", kv, table)',
    "pa.decode(array, kv, table, out=3)",
    "pa.decode(array, array, table)",
    "pa.decode(array, kv, table, 0.5)",
    "pa.prefill(array, [0, 1], kv, table)",
    "pa.append(kv, [1], array, array)",
    'pa.decode(array, kv, table, sm_scale="1")',
    "pa.merge_state(array, array, array, None)",
    "pa.PagedKV(array, array)",
    'pa.BatchDecodeWithPagedKVCache().plan(kv, table, "8")',
)


def test_a_type_checker_takes_arrays_of_any_library_and_refuses_all_else(tmp_path: Path) -> None:
    head = "import numpy as np\nimport paged_attn as pa\nfrom typing import Any\n\n\n"
    head += 'def calls(array: "np.ndarray[Any, Any]", kv: pa.PagedKV, table: pa.PageTable) -> None:\n'
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(head + "".join(f"    {call}\n" for call in BAD))
    first_line = head.count("\n") + 1
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += ["--cache-dir", str(tmp_path / "cache"), "good.py", "bad.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    refused = {int(line) for line in re.findall(r"^bad\.py:(\d+): error", result.stdout, flags=re.M)}
    assert not re.findall(r"^good\.py.*error.*", result.stdout, flags=re.M), result.stdout
    assert refused == set(range(first_line, first_line + len(BAD))), result.stdout
