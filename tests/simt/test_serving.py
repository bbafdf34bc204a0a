"""After warm_up nothing compiles while serving (tests/serving.py has the loop), on cards of either prefill."""

import pytest

from tests import child


@pytest.mark.parametrize("compute_capability", ["80", "90"])
def test_nothing_compiles_while_serving(compute_capability: str) -> None:
    said = child.run("tests.serving", "shim", compute_capability, seconds=900)
    assert said["ahead"] > 10
    assert said["while_serving"] == []
