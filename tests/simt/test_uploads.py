"""Pinned memory is written again only when the copy out of it is over (tests/simt/uploads.py has the device)."""

from tests import child


def test_uploads_to_a_device_that_lags_behind_arrive_whole() -> None:
    said = child.run("tests.simt.uploads", seconds=120)
    for run in (*said["late"], said["prompt"]):
        assert (run["sent"] + run["refused"], run["wrong"]) == (1000, 0)
    assert all(run["refused"] > 0 for run in said["late"]) and said["prompt"]["refused"] == 0
    assert said["prompt"]["blocks"] <= 2, "a device that keeps up needs no more memory"
