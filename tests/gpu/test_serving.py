"""After warm_up nothing compiles while serving (tests/serving.py has the loop)."""

from tests import child


def test_nothing_compiles_while_serving() -> None:
    said = child.run("tests.serving", "gpu", seconds=300)
    assert said["ahead"] > 10
    assert said["while_serving"] == []
