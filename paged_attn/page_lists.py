"""PageLists: the page ids of all sequences of a cache, on the host, and their copy on the device."""

from types import ModuleType

import numpy as np

from .page_table import PageTable
from .ragged import ranges


def resized(array: np.ndarray, size: int) -> np.ndarray:
    """A copy of a 1-D array with `size` elements, zeros behind the old ones."""
    copy = np.zeros(size, array.dtype)
    copy[: array.size] = array
    return copy


class PageLists:
    """The page ids of every sequence, in one flat array (the arena) on the host, and a copy of it on the device.

    Row r has the extent page_ids[start[r] : start[r] + capacity[r]]; its pages are the first count[r] entries. A list
    that outgrows its extent moves to a new one of twice the size it needs, behind all others; when there is no room
    behind them, all lists move to a new arena. The device gets only the entries that changed, with the next table.

    Where a method raises, the lists hold what they held.
    """

    def __init__(self, backend: ModuleType, device: str) -> None:
        self._backend, self._device = backend, device
        self.start = np.zeros(0, np.int64)
        self.capacity = np.zeros(0, np.int64)
        self.count = np.zeros(0, np.int64)
        self.page_ids = np.zeros(1, np.int32)
        self._used = 0
        self._changed = np.zeros(1, np.int32)  # [arena size]; _num_changed indices of what the device lacks
        self._num_changed = 0  # above the arena's size: every entry may be one
        self._device_page_ids = backend.empty((0,), np.dtype(np.int32), device)  # as large as the arena, or outgrown

    def set_num_rows(self, num_rows: int) -> None:
        start, capacity, count = (resized(x, num_rows) for x in (self.start, self.capacity, self.count))
        self.start, self.capacity, self.count = start, capacity, count

    def pages(self, row: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Pages first to last (excluded) of one row, a view."""
        start = self.start[row]
        return self.page_ids[start + first : start + (self.count[row] if last is None else last)]

    def last_pages(self, rows: np.ndarray) -> np.ndarray:
        """The last page of each row, a copy; of a row without pages, anything."""
        return self.page_ids.take(self.start[rows] + self.count[rows] - 1, mode="clip")

    def stage(self, rows: np.ndarray, counts: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """Write counts[i] pages behind the end of the list of rows[i], which does not hold them before `commit`.

        `pages` has those of rows[0] first, then those of rows[1], ... Returns their indices in page_ids.
        """
        held = self.count[rows]
        self._make_room(rows, held + counts)
        entries = ranges(self.start[rows] + held, counts)
        self.page_ids[entries] = pages
        return entries

    def commit(self, rows: np.ndarray, counts: np.ndarray, entries: np.ndarray) -> None:
        """The lists of `rows` now hold the pages that were staged."""
        self.count[rows] += counts
        self._mark_changed(entries)

    def replace_last_pages(self, rows: np.ndarray, pages: np.ndarray) -> None:
        entries = self.start[rows] + self.count[rows] - 1
        self.page_ids[entries] = pages
        self._mark_changed(entries)

    def write_table(self, rows: np.ndarray, indptr: np.ndarray, per_row: dict[str, np.ndarray], out: PageTable) -> None:
        """Write the table of `rows` into `out`, after sending what the device has not seen of the lists.

        per_row: what row i of `out` gets as element i of last_page_len and, where it has positions, of page_offset and
        total_len. It then gets every page_stride-th page from page page_offset[i] on.
        """
        device_page_ids = self._device_page_ids
        if device_page_ids.size != self.page_ids.size:  # the lists have moved since, so that all of them are changed
            device_page_ids = self._backend.empty(self.page_ids.shape, self.page_ids.dtype, self._device)
        is_known = self._num_changed <= self._changed.size
        changed = self._changed[: self._num_changed] if is_known else np.arange(self._used, dtype=np.int32)
        values = self.page_ids[changed]
        starts = self.start[rows]
        if "page_offset" in per_row:
            starts += per_row["page_offset"]
        self._backend.update_table(device_page_ids, changed, values, starts, indptr, per_row, out)
        self._device_page_ids = device_page_ids
        self._num_changed = 0

    def _make_room(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Give rows[i] a capacity of counts[i] or more. Lists may move; what they hold stays."""
        short = self.capacity[rows] < counts
        if not short.any():
            return
        page_ids, changed, used = self.page_ids, self._changed, self._used
        is_new = used + 2 * int(counts[short].sum()) > page_ids.size
        if is_new:
            wanted = self.count.copy()
            wanted[rows] = counts
            rows, counts, used = np.arange(wanted.size), wanted, 0
            size = max(page_ids.size, 4 * int(counts.sum()))  # at least half stays free: moving is amortised
            page_ids, changed = np.zeros(size, np.int32), np.zeros(size, np.int32)
        else:
            rows, counts = rows[short], counts[short]
        held = self.count[rows]
        end = used + np.cumsum(2 * counts)
        start = end - 2 * counts
        entries = ranges(start, held)
        page_ids[entries] = self.page_ids[ranges(self.start[rows], held)]

        # All is computed; from here on nothing raises.
        self.page_ids, self._changed, self._used = page_ids, changed, int(end[-1])
        if is_new:
            self._num_changed = 0
        self.start[rows], self.capacity[rows] = start, 2 * counts
        self._mark_changed(entries)

    def _mark_changed(self, entries: np.ndarray) -> None:
        end = self._num_changed + entries.size
        if end <= self._changed.size:
            self._changed[self._num_changed : end] = entries
        self._num_changed = end
