"""MpiRanks in four processes of MPI."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from paged_attn import parallel

ROOT = Path(__file__).parents[2]
MPIEXEC = Path(sysconfig.get_path("scripts")) / "mpiexec"  # the one of the wheel mpich


@pytest.mark.parametrize("what", ["right", "disagreeing", "late"])
def test_four_processes(what: str) -> None:
    command = [MPIEXEC, "-n", "4", sys.executable, "-m", "tests.parallel.mpi_ranks", what]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    said = result.stdout + result.stderr
    assert "wrong:" not in said and result.returncode == 0, said
    assert sorted(result.stdout.splitlines()) == [f"rank {rank} is done" for rank in range(4)], said


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"MpiRanks needs mpi4py and an MPI.*pip install mpi4py mpich"):
        parallel.MpiRanks()
