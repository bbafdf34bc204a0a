"""What each thread prepares for itself.

Parameters of a launch and pinned memory are written before they are used: no other thread may write them meanwhile.
"""

import threading
from typing import Any


class PerThread(threading.local):
    """A dict for each thread, which goes when the thread ends."""

    def __init__(self) -> None:
        self.items: dict[Any, Any] = {}
