"""Devices, streams and threads, without a card (tests/simt/contexts.py has the calls)."""

import pytest

from tests import child


@pytest.fixture(scope="module")
def said() -> dict:
    return child.run("tests.simt.contexts", seconds=240)


def test_work_goes_to_the_device_of_the_data_and_its_current_stream(said: dict) -> None:
    """While another device is the current one, which it still is afterwards."""
    assert said["contexts"] == {"current device": [], "launches": [], "results": []}


def test_a_device_has_one_status_word_however_many_threads_ask_first(said: dict) -> None:
    assert said["words"] == 1


def test_threads_that_have_ended_leave_nothing_that_grows(said: dict) -> None:
    threads = said["threads"]
    assert threads["left"] == [0, 0]
    assert threads["idle"] == 16
    assert threads["blocks"] == [24, 24 - 16], "pinned memory that threads left is used by others"
