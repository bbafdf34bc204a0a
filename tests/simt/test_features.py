"""Sinks, V with a dim of its own and caches of several ranks, on the shim's cards (tests/features.py has the calls)."""

from tests import child


def test_features() -> None:
    assert child.run("tests.features", "shim", "80", seconds=900) == {}


def test_features_of_prefill_on_hopper() -> None:
    assert child.run("tests.features", "shim", "90", "sinks_of_gpt_oss", seconds=900) == {}
