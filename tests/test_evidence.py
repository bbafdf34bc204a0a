"""The rules of conftest.py, in a small tree of its own: skips of gpu tests, and the evidence of a GPU run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paged_attn.interop import cuda_available

ROOT = Path(__file__).parents[1]

GPU_TESTS = """
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_on_the_card(n):
    assert n

def test_that_skips():
    pytest.skip("not today")
"""
CUPY = """
class ndarray: ...

class cuda:
    is_available = staticmethod(lambda: True)
    class runtime:
        getDevice = staticmethod(lambda: 0)
        getDeviceProperties = staticmethod(lambda device: {"name": b"Test Card"})
        driverGetVersion = staticmethod(lambda: 12090)
"""
CONFIG = """
[tool.pytest.ini_options]
addopts = ["--import-mode=importlib", "--strict-markers", "-ra", "-p", "no:cacheprovider"]
markers = ["gpu: needs a card", "shim: needs g++"]
filterwarnings = ["error"]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("tests/gpu", "kernels", "paged_attn", "fakes/cupy"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests/gpu/test_card.py").write_text(GPU_TESTS)
    (tmp_path / "tests/test_host.py").write_text("def test_on_the_host(): ...\n")
    (tmp_path / "kernels/append.cu").write_text("// a kernel\n")
    (tmp_path / "fakes/cupy/__init__.py").write_text(CUPY)
    (tmp_path / "pyproject.toml").write_text(CONFIG)
    return tmp_path


def run_pytest(
    tree: Path, *arguments: str, card: bool, required: bool = False, compiler: bool = True
) -> tuple[int, str]:
    """Exit status and output; `card`: with a CuPy that says it sees one; `compiler`: with g++."""
    environment = {name: value for name, value in os.environ.items() if name != "PA_REQUIRE_GPU"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tree / "fakes")] * card + [str(ROOT)])}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"PA_REQUIRE_GPU": "1"} if required else {})
    environment |= {} if compiler else {"PATH": str(tree / "empty")}
    command = [sys.executable, "-m", "pytest", *arguments]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout


@pytest.mark.skipif(cuda_available(), reason="this machine has a card")
def test_without_a_card_gpu_tests_are_skipped_or_fail(tree: Path) -> None:
    status, said = run_pytest(tree, card=False)
    assert status == 0
    assert "1 passed, 3 skipped" in said
    assert "warning: there is no GPU evidence" in said
    status, said = run_pytest(tree, card=False, required=True)
    assert status == 1
    assert "1 passed, 3 error" in said
    assert "a gpu test was skipped, and PA_REQUIRE_GPU=1" in said
    assert not (tree / "tests/gpu/results.json").exists()


@pytest.mark.parametrize("processes", [(), ("-p", "xdist", "-n", "2")], ids=["one", "two"])
def test_a_gpu_run_writes_its_evidence(processes: tuple[str, ...], tree: Path) -> None:
    status, said = run_pytest(tree, "-m", "gpu", *processes, card=True)
    assert status == 0
    assert "2 passed, 1 skipped" in said
    evidence = json.loads((tree / "tests/gpu/results.json").read_text())
    assert evidence["card"] == "Test Card"
    assert evidence["total"] == {"passed": 2, "skipped": 1}
    assert evidence["tests"] == {
        "tests/gpu/test_card.py::test_on_the_card": {"passed": 2},
        "tests/gpu/test_card.py::test_that_skips": {"skipped": 1},
    }
    assert len(evidence["source_hash"]) == 64
    assert not evidence["skips_are_failures"]


def test_a_skip_inside_a_gpu_test_is_a_failure_where_a_card_is_required(tree: Path) -> None:
    (tree / "tests/gpu/test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    status, said = run_pytest(tree, "-m", "gpu", card=True, required=True)
    assert status != 0
    assert "a module of gpu tests was skipped, and PA_REQUIRE_GPU=1" in said
    (tree / "tests/gpu/test_module.py").unlink()
    status, said = run_pytest(tree, "-m", "gpu", card=True, required=True)
    assert status == 1
    assert "1 failed, 2 passed" in said
    assert "not today" in said
    evidence = json.loads((tree / "tests/gpu/results.json").read_text())
    assert evidence["total"] == {"passed": 2, "failed": 1}
    assert evidence["skips_are_failures"]


@pytest.mark.parametrize("processes", [(), ("-p", "xdist", "-n", "2")], ids=["one", "two"])
def test_a_missing_compiler_is_said_once(processes: tuple[str, ...], tree: Path) -> None:
    """One failure for all tests that need it, and nothing where none of them was chosen; the others run."""
    (tree / "tests/simt").mkdir()
    (tree / "tests/simt/test_kernel.py").write_text(GPU_TESTS.partition("def test_that")[0])
    status, said = run_pytest(tree, "tests", "-m", "not gpu", *processes, card=False)
    assert status == 0 and "3 passed" in said
    status, said = run_pytest(tree, "tests", "-m", "not gpu", *processes, card=False, compiler=False)
    assert status == 1
    assert "1 failed, 1 passed" in said
    assert "g++ is not on the PATH, and 2 of the chosen tests run kernels" in said and "apt-get install g++" in said
    for choice in ("not gpu and not shim", "gpu"):
        status, said = run_pytest(tree, "tests", "-m", choice, *processes, card=False, compiler=False)
        assert status == 0 and "g++" not in said


def test_evidence_of_another_tree_is_told(tree: Path) -> None:
    """A warning, no failure; and none while the tree is the one that was tested."""
    run_pytest(tree, "-m", "gpu", card=True)
    assert "warning: the GPU evidence" not in run_pytest(tree, "-m", "not gpu", card=True)[1]
    (tree / "kernels/append.cu").write_text("// another kernel\n")
    status, said = run_pytest(tree, "-m", "not gpu", card=True)
    assert status == 0
    assert "is of another tree than this one; run PA_REQUIRE_GPU=1 pytest -m gpu" in said
