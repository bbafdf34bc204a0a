"""Both backends give the same verdict on every bad input (tests/simt/verdicts.py makes the calls)."""

from tests import child


def test_a_call_is_refused_by_both_backends_in_the_same_words() -> None:
    said = child.run("tests.simt.verdicts", seconds=120)
    assert said["cases"] > 300
    assert not said["differences"]
