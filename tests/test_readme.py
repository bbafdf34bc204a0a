"""Every Python block of the README runs as it stands; those that import CuPy run on a GPU."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paged_attn as pa

README = Path(__file__).parents[1] / "README.md"


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line number, code) of each fenced Python block."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def run(line: int, code: str) -> dict[str, Any]:
    """The names that a block defines; a traceback shows the README's own lines."""
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile("\n" * line + code, README, "exec"), names)
    return names


BLOCKS = python_blocks(README.read_text())
PARAMS = [
    pytest.param(line, code, id=f"line{line}", marks=[pytest.mark.gpu] if "import cupy" in code else [])
    for line, code in BLOCKS
]


@pytest.mark.parametrize("line, code", PARAMS)
def test_block_runs(line: int, code: str) -> None:
    run(line, code)


@pytest.mark.parametrize("line, code", [param for param in PARAMS if "return_lse=True" in param.values[1]])
def test_the_ten_lines_attend(line: int, code: str) -> None:
    """Each sequence of the first examples, alone and over contiguous K and V, gives what the README's call gives."""
    names = run(line, code)
    q, k, v, out, lse = (names[name] for name in ("q", "k", "v", "out", "lse"))
    assert type(out) is type(q) and out.shape == q.shape and out.dtype == q.dtype
    for i, tokens in enumerate((slice(0, 70), slice(70, 100))):
        expected, expected_lse = pa.single_decode(q[i], k[tokens], v[tokens], layout="NHD", return_lse=True)
        for actual, wanted, tolerance in ((out[i], expected, 1e-2), (lse[i], expected_lse, 1e-4)):
            actual, wanted = (np.array(x.tolist()) for x in (actual, wanted))
            assert np.linalg.norm(actual - wanted) <= tolerance * np.linalg.norm(wanted)


def test_the_readme_shows_all_three_libraries() -> None:
    first_lines = [code.splitlines()[0] for _, code in BLOCKS[:3]]
    assert first_lines == ["import cupy as cp", "import jax", "import numpy as np"]


def test_a_broken_block_fails_with_its_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(*python_blocks("text\n\n```python\nx = 1\ny = x / 0\n```\n")[0])
    assert caught.traceback[-1].lineno + 1 == 5


def test_markdown_that_is_no_python_is_left_alone() -> None:
    assert python_blocks("```bash\nrm x\n```\n```python\nx\n```\n") == [(4, "x\n")]
