"""A launch follows its arrays when their forms change (tests/simt/forms.py has the calls)."""

from tests import child


def test_every_call_is_right_whatever_the_one_before_was_like() -> None:
    said = child.run("tests.simt.forms", seconds=300)
    for work, right in said.items():
        assert right, work
        assert all(right), (work, right)
