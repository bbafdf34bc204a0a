"""Every Python block of the README runs as it stands; those that import CuPy run on a GPU, those of ranks in two
processes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests.parallel.test_mpi import MPIEXEC
from tests.parallel.test_sockets import free_address

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
SERVERS = [code for _, code in BLOCKS if "Ranks(" in code]  # of PeerRanks, of MpiRanks
PARAMS = [
    pytest.param(line, code, id=f"line{line}", marks=[pytest.mark.gpu] if "import cupy" in code else [])
    for line, code in BLOCKS
    if code not in SERVERS
]


def assert_attends(out: Any, lse: Any, q: Any, k: Any, v: Any) -> None:
    """As one request does over contiguous K and V. lse may be None."""
    expected, expected_lse = pa.single_decode(q, k, v, layout="NHD", return_lse=True)
    for actual, wanted, tolerance in ((out, expected, 1e-2), (lse, expected_lse, 1e-4)):
        if actual is not None:
            actual, wanted = (np.array(x.tolist()) for x in (actual, wanted))
            assert np.linalg.norm(actual - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("line, code", PARAMS)
def test_block_runs(line: int, code: str) -> None:
    run(line, code)


BATCHES = [param for param in PARAMS if "[70, 30]" in param.values[1]]


@pytest.mark.parametrize("line, code", BATCHES)
def test_the_ten_lines_attend(line: int, code: str) -> None:
    """Each sequence of a batch, alone and over contiguous K and V, gives what the README's call gives."""
    names = run(line, code)
    q, k, v, out, lse = (names[name] for name in ("q", "k", "v", "out", "lse"))
    assert type(out) is type(q) and out.shape == q.shape and out.dtype == q.dtype
    for i, tokens in enumerate((slice(0, 70), slice(70, 100))):
        assert_attends(out[i], lse[i], q[i], k[tokens], v[tokens])


def test_two_states_merge_to_the_whole() -> None:
    (block,) = (param.values for param in PARAMS if "single_decode(" in param.values[1])
    names = run(*block)
    assert_attends(names["out"][0], names["lse"][0], names["q"], names["k"], names["v"])


# -- two processes -----------------------------------------------------------------------------------------------------

SAVE = """
arrays = (x if isinstance(x, np.ndarray) else x.get() for x in (out, q, k, v))
np.savez(sys.argv[0] + str(comm.ranks[0]), *arrays)
"""


def assert_serves(code: str, folder: Path, *commands: list[Any]) -> None:
    """Where these commands run `code` as serve.py, both ranks find the answer."""
    (folder / "serve.py").write_text(f"import sys\n{code}{SAVE}")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"PYTHONPATH": str(README.parent)}
    processes = [subprocess.Popen(command, cwd=folder, env=env, **pipes) for command in commands]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    for rank in (0, 1):
        with np.load(folder / f"serve.py{rank}.npz") as arrays:
            out, q, k, v = arrays.values()
            assert_attends(out[0], None, q[0], k, v)


def test_two_processes_of_mpi(tmp_path: Path) -> None:
    assert_serves(SERVERS[1], tmp_path, [MPIEXEC, "-n", "2", sys.executable, "serve.py"])


@pytest.mark.gpu
@pytest.mark.two_gpus
def test_two_processes_with_a_gpu_each(tmp_path: Path) -> None:
    code = SERVERS[0].replace("localhost:29500", free_address())
    assert_serves(code, tmp_path, *([sys.executable, "serve.py", rank] for rank in "01"))


def test_every_kind_of_block_is_tested() -> None:
    assert len(BATCHES) == 4  # CuPy, JAX, NumPy, in chunks
    assert [re.findall(r"(\w+Ranks)\(", code) for code in SERVERS] == [["PeerRanks"], ["MpiRanks"]]


def test_the_readme_shows_all_three_libraries() -> None:
    first_lines = [code.splitlines()[0] for _, code in BLOCKS[:3]]
    assert first_lines == ["import cupy as cp", "import jax", "import numpy as np"]


def test_a_broken_block_fails_with_its_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(*python_blocks("text\n\n```python\nx = 1\ny = x / 0\n```\n")[0])
    assert caught.traceback[-1].lineno + 1 == 5


def test_markdown_that_is_no_python_is_left_alone() -> None:
    assert python_blocks("```bash\nrm x\n```\n```python\nx\n```\n") == [(4, "x\n")]
