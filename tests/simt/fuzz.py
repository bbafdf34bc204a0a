"""tests/gpu/fuzz.py with the SIMT shim as its card; test_fuzz.py runs this in a child process.

    python -m tests.simt.fuzz --rounds 100 --operations append

Arrays stand in memory of their own with guard pages, so that here reading past an array is seen too. Nothing is timed.
"""

from . import card

card.install()

from tests.gpu import fuzz  # noqa: E402  it imports cupy, which is the stand-in now

if __name__ == "__main__":
    fuzz.main(memory=card.GuardPages(), timed=False)
