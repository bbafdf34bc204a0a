"""NcclRanks: on the SIMT shim's cards with a stand-in for NCCL, and on cards."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paged_attn import parallel
from tests import child
from tests.parallel.test_sockets import free_address

ROOT = Path(__file__).parents[2]


@pytest.mark.shim
def test_two_ranks_of_a_stand_in() -> None:
    assert child.run("tests.parallel.nccl_ranks", "shim", seconds=300) == {}


def check(comm: Any) -> None:
    from tests.parallel.nccl_ranks import check_results  # it needs CuPy

    with comm:
        assert comm.all_gather_bytes([b"%d" % rank for rank in comm.ranks]) == [
            b"%d" % i for i in range(comm.num_ranks)
        ]
        check_results(comm)
        check_results(comm, host=True)


@pytest.mark.gpu
def test_one_rank() -> None:
    from cupy.cuda import nccl

    check(parallel.NcclRanks(0, 1))
    check(parallel.NcclRanks(0, 1, unique_id=nccl.get_unique_id()))


@pytest.mark.gpu
@pytest.mark.two_gpus
def test_two_gpus_of_one_process() -> None:
    check(parallel.NcclRanks(0, 2, devices=[0, 1]))


@pytest.mark.gpu
@pytest.mark.two_gpus
def test_two_processes() -> None:
    address = free_address()
    command = [sys.executable, "-m", "tests.parallel.nccl_ranks", "process"]
    processes = [
        subprocess.Popen([*command, str(rank), address], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    assert [process.communicate(timeout=200)[0].splitlines()[-1:] for process in processes] == [["{}"]] * 2


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"NcclRanks needs CuPy.*pip install"):
        parallel.NcclRanks(0, 1)
