"""Both backends agree where numbers are at their limits (tests/simt/extremes.py has the calls)."""

from tests import child


def test_both_backends_agree_at_the_limits_of_numbers() -> None:
    said = child.run("tests.simt.extremes", seconds=300)
    for work, right in said.items():
        assert right, work
        assert all(right), (work, right)
