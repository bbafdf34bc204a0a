"""Sinks, and V with a dim of its own, on the shim's cards of either prefill (tests/features.py has the calls)."""

import pytest

from tests import child


@pytest.mark.parametrize("compute_capability", ["80", "90"])
def test_features(compute_capability: str) -> None:
    assert child.run("tests.features", "shim", compute_capability, seconds=900) == {}
