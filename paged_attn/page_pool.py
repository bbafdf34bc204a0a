"""PagePool: which pages of every rank are free, and how many sequences hold each of the others."""

import numpy as np

from .errors import OutOfPagesError
from .ragged import ranges


def share(num_pages: np.ndarray, first: np.ndarray, num_ranks: int) -> np.ndarray:
    """How many of `num_pages` pages in a row a rank has that begins with page `first`, below num_ranks."""
    return (num_pages - first + (num_ranks - 1)) // num_ranks


class PagePool:
    """The pages of all ranks, numbered through: page p of rank r is r * num_pages + p, and this rank is rank 0.

    Every rank has such a pool, and all of them get the same calls, so that each knows how many pages another one has
    left, and which of them are shared.
    """

    def __init__(self, num_pages: int, num_ranks: int) -> None:
        self.num_pages, self.num_ranks = num_pages, num_ranks  # pages of one rank
        self.num_free = [num_pages] * num_ranks
        numbers = np.arange(num_ranks * num_pages, dtype=np.int32).reshape(num_ranks, num_pages)
        self._free = list(numbers[:, ::-1].copy())  # of each rank a stack: the first num_free are free
        self._holders = np.zeros(num_ranks * num_pages, np.int32)  # sequences that hold a page
        self._num_shares = 0  # sum of _holders, less one for each page that is held

    @property
    def num_shared(self) -> int:
        """Pages of all ranks that more than one sequence holds."""
        return int(np.count_nonzero(self._holders > 1))

    @property
    def is_any_shared(self) -> bool:
        return self._num_shares > 0

    def must_copy(self, pages: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Which of some sequences, `length` tokens long, must copy their last page, of `pages`, to write into it.

        Returns bool [sequences].
        """
        is_shared = self._holders[pages] > 1
        if not is_shared.any():
            return is_shared
        shared, group, num_writers = np.unique(pages, return_inverse=True, return_counts=True)
        # The longest writes behind the tokens of all others, so that a call that fails later harms none of them.
        by_length = np.argsort(length, kind="stable")
        keeper = np.zeros(shared.size, np.int64)
        keeper[group[by_length]] = by_length  # of several values for one element NumPy keeps the last
        keeps_original = (num_writers == self._holders[shared])[group] & (keeper[group] == np.arange(pages.size))
        return is_shared & ~keeps_original

    def next_free(self, first_rank: np.ndarray, counts: np.ndarray, copied: np.ndarray) -> np.ndarray:
        """The pages that `take` takes next: counts[i] of the ranks first_rank[i], first_rank[i] + 1, ... in turns, for
        each i, then one of the rank of each of the pages `copied`. They are free.

        OutOfPagesError, about the rank that lacks the most pages, if one lacks any.
        """
        if self.num_ranks == 1:  # the quick way to the same
            most, free = int(counts.sum()) + copied.size, self.num_free[0]
            if most > free:
                raise OutOfPagesError(most, free)
            return self._free[0][free - most : free][::-1].copy()
        rank = np.arange(self.num_ranks)[:, None]
        of_each = share(first_rank + counts, rank, self.num_ranks) - share(first_rank, rank, self.num_ranks)
        wanted = [new + copies for new, copies in zip(of_each.sum(axis=1).tolist(), self._by_rank(copied), strict=True)]
        # Of ranks that lack the same, one of the same numbers in every pool.
        lacking, most, free = max((w - f, w, f) for w, f in zip(wanted, self.num_free, strict=True))
        if lacking > 0:
            raise OutOfPagesError(most, free)
        ranks = np.concatenate([ranges(first_rank, counts) % self.num_ranks, copied // self.num_pages])
        pages = np.empty(ranks.size, np.int32)
        for i, (stack, free, count) in enumerate(zip(self._free, self.num_free, wanted, strict=True)):
            pages[ranks == i] = stack[free - count : free][::-1]
        return pages

    def take(self, pages: np.ndarray) -> None:
        """One sequence holds each of these pages, which next_free has given."""
        for rank, count in enumerate(self._by_rank(pages)):
            self.num_free[rank] -= count
        self._holders[pages] = 1

    def hold(self, pages: np.ndarray) -> None:
        """One more sequence holds these pages."""
        self._num_shares += pages.size  # first: an interrupt can make it too large, never too small
        self._holders[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """One sequence less holds these pages; those that none holds any more become free."""
        self._holders[pages] -= 1
        freed = pages[self._holders[pages] == 0]
        self._num_shares -= pages.size - freed.size
        for rank, stack in enumerate(self._free):
            of_rank = freed if self.num_ranks == 1 else freed[freed // self.num_pages == rank]
            end = self.num_free[rank] + of_rank.size
            stack[end - of_rank.size : end] = of_rank
            self.num_free[rank] = end

    def release_copied(self, pages: np.ndarray) -> None:
        """Sequences that have copies now hold these pages no longer, a page as often as it is here; others still do."""
        np.subtract.at(self._holders, pages, 1)
        self._num_shares -= pages.size

    def _by_rank(self, pages: np.ndarray) -> list[int]:
        """How many of these pages each rank has."""
        if self.num_ranks == 1:
            return [pages.size]
        return np.bincount(pages // self.num_pages, minlength=self.num_ranks).tolist()
