"""PagedKVCache of several ranks, rule by rule, beside one cache that has all pages.

tests/test_cache_properties.py holds any sequence of calls, failing ones too, against a model.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import backends
from tests.test_cache import to_device, to_host

KV_HEADS, HEAD_DIM, HEADS = 2, 16, 6


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def make(device: str, num_pages: int = 8, page_size: int = 4, **options: Any) -> pa.PagedKVCache:
    return pa.PagedKVCache(
        num_pages, page_size, KV_HEADS, HEAD_DIM, layout="NHD", dtype="float16", device=device, **options
    )


class Ranks:
    """The caches of all ranks, and one of one rank with all their pages, which get the same calls."""

    def __init__(self, device: str, num_ranks: int, num_pages: int = 8, page_size: int = 4, **options: Any) -> None:
        self.device, self.page_size, self.random = device, page_size, np.random.default_rng(num_ranks)
        self.ranks = [
            make(device, num_pages, page_size, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)
        ]
        self.whole = make(device, num_pages * num_ranks, page_size, **options)

    def all(self, call: Callable[[pa.PagedKVCache], Any]) -> Any:
        """What every cache answers."""
        answers = {call(cache) for cache in (*self.ranks, self.whole)}
        assert len(answers) == 1
        return answers.pop()

    def new(self, count: int = 0) -> int:
        seq = self.all(lambda cache: cache.new_sequence())
        self.append([seq], [count])
        return seq

    def append(self, seqs: list[int], counts: list[int]) -> None:
        k, v = self.normal(sum(counts), KV_HEADS, HEAD_DIM), self.normal(sum(counts), KV_HEADS, HEAD_DIM)
        self.all(lambda cache: cache.append(seqs, counts, k, v))

    def normal(self, *shape: int) -> Any:
        return to_device(self.random.standard_normal(shape, np.float32).astype(np.float16), self.device)

    def check(self, seqs: list[int]) -> None:
        """All tables together are that of the whole cache, page by page, and so is what the pages hold."""
        whole = self.whole.page_table(seqs)
        begins, ids = to_host(whole.indptr), to_host(whole.indices)
        seen = np.zeros(int(begins[-1]), int)
        for cache in self.ranks:
            table = cache.page_table(seqs)
            table.validate(cache.num_pages).raise_if_bad()
            assert table.page_stride == len(self.ranks)
            offsets, lengths = (to_host(x) for x in (table.page_offset, table.total_len))
            assert lengths.tolist() == to_host(whole.seq_lens).tolist()
            rows = np.repeat(np.arange(len(seqs)), np.diff(to_host(table.indptr)))
            first = to_host(table.indptr)[rows]
            number = offsets[rows] + (np.arange(rows.size) - first) * len(self.ranks)
            assert (number < np.diff(begins)[rows]).all()
            here = begins[rows] + number
            seen[here] += 1
            used = np.arange(self.page_size) < (lengths[rows] - number * self.page_size)[:, None]
            for name in ("k_pages", "v_pages"):
                pages, expected = (to_host(getattr(x.layers[0], name)) for x in (cache, self.whole))
                np.testing.assert_array_equal(pages[to_host(table.indices)][used], expected[ids[here]][used])
        assert (seen == 1).all()


def held(cache: pa.PagedKVCache, seqs: list[int]) -> int:
    """Pages of this rank."""
    return int(to_host(cache.page_table(seqs).indptr)[-1])


# -- who has which page ----------------------------------------------------------------------------------------------


def test_page_j_is_on_rank_j_after_the_first(device):
    ranks = [make(device, rank=rank, num_ranks=2) for rank in range(2)]
    slots = []
    for cache in ranks:
        a, b = cache.new_sequence(), cache.new_sequence()
        slots.append(to_host(cache.reserve([a, b], [5, 2])).tolist())
    assert slots == [[0, 1, 2, 3, -1, -1, -1], [-1, -1, -1, -1, 0, 4, 5]]
    tables = [cache.page_table([b, a]) for cache in ranks]
    for name, expected in {
        "indptr": ([0, 0, 1], [0, 1, 2]),
        "indices": ([0], [1, 0]),
        "last_page_len": ([0, 4], [2, 1]),
        "page_offset": ([1, 0], [0, 1]),
        "total_len": ([2, 5], [2, 5]),
        "seq_lens": ([0, 4], [2, 1]),
    }.items():
        assert tuple(to_host(getattr(table, name)).tolist() for table in tables) == expected, name
    assert [table.page_stride for table in tables] == [2, 2]
    assert [cache.seq_len(a) for cache in ranks] == [5, 5]
    assert [(cache.num_pages, cache.num_ranks, cache.num_free_pages) for cache in ranks] == [(8, 2, 6)] * 2


def test_a_fork_is_spread_like_its_parent_and_the_next_sequence_like_none(device):
    ranks = Ranks(device, 3, num_pages=16)
    for _ in range(2):
        parent = ranks.new(4 * 4)
    fork = ranks.all(lambda cache: cache.fork(parent, 0))
    ranks.append([fork], [4 * 4])
    other = ranks.new(4 * 4)
    assert [held(cache, [parent]) for cache in ranks.ranks] == [1, 2, 1]
    assert [held(cache, [fork]) for cache in ranks.ranks] == [1, 2, 1]
    assert [held(cache, [other]) for cache in ranks.ranks] == [1, 1, 2]


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_sequences_of_one_page_are_spread_evenly(num_ranks):
    ranks = [make("cpu", 512, 16, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for cache in ranks:
        seqs = [cache.new_sequence() for _ in range(512)]
        cache.reserve(seqs, 16)
    pages = [held(cache, seqs) for cache in ranks]
    assert sum(pages) == 512 and max(pages) - min(pages) <= 1
    assert {cache.num_free_pages for cache in ranks} == {512 - max(pages)}


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("length", [1, 16, 17, 1000, 4096])
def test_a_context_needs_its_share_of_pages_on_every_rank(num_ranks, length):
    """P // num_ranks of its P pages, or one more: so many are enough, and one less is not."""
    pages = -(-length // 16)
    most = -(-pages // num_ranks)
    ranks = [make("cpu", most, 16, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for cache in ranks:
        seq = cache.new_sequence()
        cache.reserve([seq], length)
    found = [held(cache, [seq]) for cache in ranks]
    assert sum(found) == pages and set(found) <= {pages // num_ranks, most} and ranks[0].num_free_pages == 0
    if most > 1:
        for rank in range(num_ranks):
            cache = make("cpu", most - 1, 16, rank=rank, num_ranks=num_ranks)
            with pytest.raises(pa.OutOfPagesError) as error:
                cache.reserve([cache.new_sequence()], length)
            assert (error.value.wanted, error.value.free) == (most, most - 1)


# -- pages that run out ----------------------------------------------------------------------------------------------


def test_errors_are_about_the_rank_that_lacks_most():
    """Of two that lack the same it is the one that is asked for more, on every rank."""
    for rank in range(3):
        cache = make("cpu", 4, 1, rank=rank, num_ranks=3)
        a, b, c = (cache.new_sequence() for _ in range(3))  # first on rank 0, 1 and 2
        cache.reserve([a, b], [4, 1])  # rank 0 has 2 free pages, rank 1 has 2, rank 2 has 3
        assert cache.num_free_pages == 2
        for counts, wanted, free in (
            ([7, 0, 0], 3, 2),  # 2, 3 and 2 pages of the ranks
            ([0, 0, 10], 4, 3),  # 3, 3 and 4: each lacks one
            ([0, 2**31 - 1, 0], 715827883, 3),
        ):
            with pytest.raises(pa.OutOfPagesError) as error:
                cache.reserve([a, b, c], counts)
            assert (error.value.wanted, error.value.free) == (wanted, free), (rank, counts)
        cache.reserve([a, b, c], [5, 0, 1])
        assert [cache.seq_len(seq) for seq in (a, b, c)] == [9, 1, 1] and cache.num_free_pages == 0


# -- shared pages ----------------------------------------------------------------------------------------------------


def test_the_rank_of_a_shared_page_copies_it_and_the_others_count(device, monkeypatch):
    ranks = Ranks(device, 3)
    parent = ranks.new(6)  # its last page is on rank 1
    fork = ranks.all(lambda cache: cache.fork(parent))
    assert ranks.all(lambda cache: cache.num_shared_pages) == 2
    backend = backends.of(ranks.whole.device)
    copy_pages, copied = backend.copy_pages, []

    def counted(storage, source, target):
        copied.append((source.tolist(), target.tolist()))
        copy_pages(storage, source, target)

    monkeypatch.setattr(backend, "copy_pages", counted)
    ranks.append([fork, parent], [1, 0])
    assert copied == [([0], [1]), ([1], [2])]  # on rank 1, and in the whole cache
    assert ranks.all(lambda cache: cache.num_shared_pages) == 1
    assert {cache.num_free_pages for cache in ranks.ranks} == {6}
    ranks.append([parent], [1])
    assert len(copied) == 2, "the last holder of a page writes into it"
    ranks.check([fork, parent])


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_a_long_life_beside_a_cache_of_one_rank(device, num_ranks):
    """Joining, growing, forking within pages, cutting and leaving at random, with copies in most steps."""
    ranks = Ranks(device, num_ranks, num_pages=600 // num_ranks + 8, page_size=3)
    random, live = ranks.random, []
    for step in range(150):
        if len(live) < 12:
            if live and random.random() < 0.7:
                source = live[random.integers(len(live))]
                length = int(random.integers(ranks.whole.seq_len(source) + 1))
                live.append(ranks.all(lambda cache, seq=source, length=length: cache.fork(seq, length)))
            else:
                live.append(ranks.new(int(random.integers(30))))
        else:
            seq = live[random.integers(len(live))]
            if random.random() < 0.5 and ranks.whole.seq_len(seq) < 40:
                length = int(random.integers(ranks.whole.seq_len(seq) + 1))
                ranks.all(lambda cache, seq=seq, length=length: cache.truncate(seq, length))
            else:
                ranks.all(lambda cache, seq=seq: cache.free(seq))
                live.remove(seq)
        batch = random.permutation(live)[: random.integers(1, len(live) + 1)].tolist()
        ranks.append(batch, random.integers(0, 5, len(batch)).tolist())
        ranks.all(lambda cache: cache.num_shared_pages)
        if step % 5 == 0:
            ranks.check(random.permutation(live).tolist())
    for seq in live:
        ranks.all(lambda cache, seq=seq: cache.free(seq))
    assert {cache.num_free_pages for cache in ranks.ranks} == {ranks.ranks[0].num_pages}


# -- page tables -----------------------------------------------------------------------------------------------------


def test_a_table_that_is_given_gets_positions(device):
    """Rows past the batch, which a larger one has left behind, are empty and at 0."""
    cache = make(device, 8, 4, rank=1, num_ranks=3)
    a, b, c = (cache.new_sequence() for _ in range(3))
    cache.reserve([a, b, c], [17, 5, 13])
    out = pa.PageTable.empty(4, 8, page_size=4, device=device, positions=True, page_stride=3)
    cache.page_table([a, b, c], out)
    table = cache.page_table([c, a], out)
    assert table.batch_size == 2 and table.page_stride == out.page_stride == 3
    expected = {"last_page_len": [4, 1], "page_offset": [2, 1], "total_len": [13, 17]}
    for name, values in expected.items():
        assert to_host(getattr(table, name)).tolist() == values, name
        assert to_host(getattr(out, name)).tolist() == [*values, 0, 0], name
    assert to_host(out.indptr).tolist() == [0, 1, 3, 3, 3]
    own = cache.page_table([c, a])
    assert to_host(own.indices).tolist() == to_host(out.indices)[:3].tolist()


def test_out_must_have_positions(device):
    cache, single = make(device, num_ranks=2), make(device)
    seq, other = cache.new_sequence(), single.new_sequence()
    for options, said in (
        ({}, "no positions"),
        ({"page_stride": 2}, "no positions"),
        ({"positions": True, "page_stride": 3}, "page_size=4 and page_stride=3, and the cache has 4 and 2"),
    ):
        out = pa.PageTable.empty(1, 4, page_size=4, device=device, **options)
        with pytest.raises(ValueError, match=rf"out has {said}.* make .*positions=True, page_stride=2\)"):
            cache.page_table([seq], out)
    with pytest.raises(ValueError, match="out has page_size=4 and page_stride=2, and the cache has 4 and 1"):
        single.page_table([other], pa.PageTable.empty(1, 4, page_size=4, device=device, positions=True, page_stride=2))
    single.reserve([other], 6)
    table = single.page_table([other], pa.PageTable.empty(1, 4, page_size=4, device=device, positions=True))
    assert [to_host(x).tolist() for x in (table.page_offset, table.total_len, table.seq_lens)] == [[0], [6], [6]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 2, "num_ranks": 2}, ValueError, r"rank is 2, and there are num_ranks=2; pass an int in \[0, 2\)"),
        ({"rank": -1, "num_ranks": 2}, ValueError, "rank is -1, and there are num_ranks=2"),
        ({"rank": 1}, ValueError, "rank is 1, and there are num_ranks=1"),
        ({"num_ranks": 0}, ValueError, "num_ranks is 0"),
        ({"rank": 0.0, "num_ranks": 2}, TypeError, "rank must be an int"),
        ({"num_ranks": 2**30}, ValueError, r"num_pages \* num_ranks is 8589934592, which is more than 2147483647"),
    ],
)
def test_impossible_ranks(options, error, message):
    with pytest.raises(error, match=message):
        make("cpu", **options)


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize(
    "options", [{}, {"window_left": 9}, {"q_len": 3}, {"q_len": 3, "window_left": 20}, {"causal": True}]
)
def test_merged_attention_of_the_ranks_is_that_over_all_pages(num_ranks, options):
    """decode of one and several queries, and prefill, causal and in a window; some ranks have no page of a sequence."""
    ranks = Ranks("cpu", num_ranks, num_pages=64)
    seqs = [ranks.new(count) for count in (70, 0, 3, 33)]
    seqs.append(ranks.all(lambda cache: cache.fork(seqs[0], 31)))
    ranks.append(seqs, [1, 1, 4, 9, 2])
    options, q_lens = dict(options), (3, 1, 2, 9, 1)
    q_len = options.pop("q_len", 1)
    if "causal" in options:
        shape, qo_indptr = (sum(q_lens), HEADS), np.append(0, np.cumsum(q_lens)).astype(np.int32)
    else:
        shape, qo_indptr = (len(seqs), q_len, HEADS), None
    q = ranks.normal(*shape, HEAD_DIM)

    def attend(cache: pa.PagedKVCache) -> tuple[np.ndarray, np.ndarray]:
        arguments = (cache.layers[0], cache.page_table(seqs))
        out, more = np.empty(q.shape, np.float32), {**options, "return_lse": True}
        if qo_indptr is None:
            return pa.decode(q, *arguments, out=out, **more)
        return pa.prefill(q, qo_indptr, *arguments, out=out, **more)

    parts = [attend(cache) for cache in ranks.ranks]
    v, s = (
        np.stack(arrays).reshape(num_ranks, -1, *arrays[0].shape[q.ndim - 2 :]) for arrays in zip(*parts, strict=True)
    )
    found, found_lse = pa.merge_states(v.swapaxes(0, 1), s.swapaxes(0, 1))
    expected, lse = attend(ranks.whole)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found_lse.reshape(lse.shape), lse, rtol=0, atol=2e-6)
    if num_ranks > 1:
        assert any(np.isneginf(part).any() for _, part in parts)
