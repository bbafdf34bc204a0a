"""PeerRanks on the SIMT shim's cards, and what is said where there is no CuPy. tests/gpu/test_exchange.py: on cards."""

import sys

import pytest

from paged_attn import parallel
from tests import child


@pytest.mark.shim
def test_ranks_on_the_shim() -> None:
    assert child.run("tests.parallel.peer_ranks", "shim", seconds=300) == {}


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"PeerRanks needs CuPy.*pip install"):
        parallel.PeerRanks(0, 2, devices=[0, 1])
