"""PageLists against lists of a dictionary: what they hold, what a table gets, and what the device is sent."""

import numpy as np
import pytest

import paged_attn as pa
from paged_attn.backends import reference
from paged_attn.page_lists import PageLists

ROWS = 12


class World:
    """Random changes of page lists beside a model of them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.lists = PageLists(reference, "cpu")
        self.lists.set_num_rows(ROWS)
        self.model: dict[int, list[int]] = {row: [] for row in range(ROWS)}

    def some_rows(self) -> np.ndarray:
        return self.rng.permutation(ROWS)[: self.rng.integers(1, ROWS)]

    def grow(self, most: int = 5) -> None:
        rows = self.some_rows()
        counts = self.rng.integers(0, most, rows.size)
        pages = self.rng.integers(0, 1000, counts.sum())
        entries = self.lists.stage(rows, counts, pages)
        self.check()  # nothing is held before commit
        self.lists.commit(rows, counts, entries)
        for row, new in zip(rows, np.split(pages, counts.cumsum()[:-1]), strict=True):
            self.model[row] += new.tolist()

    def replace(self) -> None:
        rows = np.array([row for row in self.some_rows() if self.model[row]], int)
        pages = self.rng.integers(0, 1000, rows.size)
        self.lists.replace_last_pages(rows, pages)
        for row, page in zip(rows, pages, strict=True):
            self.model[row][-1] = int(page)

    def shrink(self) -> None:
        row = int(self.rng.integers(ROWS))
        kept = int(self.rng.integers(len(self.model[row]) + 1))
        self.lists.count[row] = kept
        del self.model[row][kept:]

    def table_is_right(self) -> None:
        """The table of all rows, made of what the device has."""
        rows = np.arange(ROWS)
        indptr = np.concatenate([[0], np.cumsum([len(self.model[row]) for row in rows])])
        table = pa.PageTable.empty(ROWS, int(indptr[-1]), page_size=1, device="cpu")
        self.lists.write_table(rows, indptr, {"last_page_len": np.ones(ROWS, np.int64)}, table)
        assert table.indices.tolist() == [page for row in rows for page in self.model[row]]

    def table_of_a_rank_is_right(self) -> None:
        """Every third page of rows in any order, from a page on that differs from row to row."""
        rows = self.rng.permutation(ROWS)
        offsets = self.rng.integers(0, 3, ROWS)
        expected = [self.model[row][offset::3] for row, offset in zip(rows, offsets, strict=True)]
        indptr = np.concatenate([[0], np.cumsum(list(map(len, expected)))])
        table = pa.PageTable.empty(ROWS + 1, int(indptr[-1]), page_size=1, device="cpu", positions=True, page_stride=3)
        per_row = {"last_page_len": rows + 1, "page_offset": offsets, "total_len": rows + 50}
        self.lists.write_table(rows, indptr, per_row, table)
        assert table.indices.tolist() == [page for pages in expected for page in pages]
        for name, values in per_row.items():
            assert getattr(table, name).tolist() == [*values, 0]

    def check(self) -> None:
        for row, pages in self.model.items():
            assert self.lists.pages(row).tolist() == pages
        rows = np.array([row for row in range(ROWS) if self.model[row]], int)
        assert self.lists.last_pages(rows).tolist() == [self.model[row][-1] for row in rows]


@pytest.mark.parametrize("seed", range(6))
def test_lists_and_tables_hold_what_they_were_given(seed: int) -> None:
    """Tables come after a few changes, or after so many that the device has to get all entries."""
    world = World(seed)
    for _ in range(60):
        for _ in range(int(world.rng.choice([1, 3, 10]))):
            world.rng.choice([world.grow, world.replace, world.shrink])()
            world.check()
        for _ in range(int(world.rng.choice([0, 200]))):  # more changes than there are entries
            world.replace()
        world.rng.choice([world.table_is_right, world.table_of_a_rank_is_right])()


def test_only_changed_entries_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0)
    for _ in range(20):
        world.grow()
    world.table_is_right()
    sent = []
    update = reference.update_table

    def counted(page_lists, update_index, *rest):
        sent.append(update_index.size)
        update(page_lists, update_index, *rest)

    monkeypatch.setattr(reference, "update_table", counted)
    world.replace()
    replaced = world.lists._num_changed
    world.table_is_right()
    world.table_is_right()
    assert sent == [replaced, 0] and replaced <= ROWS


@pytest.mark.parametrize("fails", ["empty", "update_table"])
def test_a_table_that_fails_loses_no_change(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    for _ in range(5):
        world.grow()

    def fail(*_) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(reference, fails, fail)
        with pytest.raises(MemoryError):
            world.table_is_right()
    world.check()
    world.table_is_right()
