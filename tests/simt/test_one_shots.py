"""One-shot calls reuse the plans that others left (tests/simt/one_shots.py has the calls)."""

from tests import child


def test_kept_plans_are_right_bounded_and_harmed_by_no_error() -> None:
    said = child.run("tests.simt.one_shots", seconds=300)
    for work, right in said.items():
        assert right, work
        assert all(right), (work, right)
