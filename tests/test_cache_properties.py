"""Any sequence of calls of PagedKVCache against a plain model, in which pages are objects and tokens are ints.

Some calls fail: one of the calls that the cache makes of its backend raises, before or after it has done its work. Then
everything must be as it was.

Every rank gets the same calls, and so does a cache that has all pages. A token must be on the rank where the model has
it and on no other, and all answers must be the same. A call that has failed on one rank alone is made there again.
"""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import paged_attn as pa
from paged_attn import backends

NUM_PAGES, KV_HEADS, HEAD_DIM = 12, 2, 16


def to_host(array):
    return array if isinstance(array, np.ndarray) else array.get()


def kv_of(token, layer, is_v):
    """K or V of tokens [n] in one layer: float16 [n, KV_HEADS, HEAD_DIM], exact, different in every element."""
    element = np.arange(KV_HEADS * HEAD_DIM).reshape(KV_HEADS, HEAD_DIM)
    seed = np.asarray(token, np.int64).reshape(-1, 1, 1) * 769 + layer * 101 + is_v * 57
    return ((seed + element) % 2039).astype(np.float16)


class Injected(Exception):
    """What a backend raises here, as it would an out-of-memory error."""


class Fuse:
    """Of the calls that a cache makes of its backend, the one with a given number raises."""

    FUNCTIONS = ("empty", "zeros", "to_backend", "copy_pages", "update_table", "append")

    def __init__(self, backend):
        self.number = -1  # of that call, counted from the next one on; below 0: none
        self.is_late = False  # whether the call does its work before it raises
        functions = {name: self.wrapped(getattr(backend, name)) for name in self.FUNCTIONS}
        uploader = self.wrapped(backend.uploader)
        self.patch = mock.patch.multiple(backend, uploader=lambda device: self.wrapped(uploader(device)), **functions)
        self.patch.start()

    @contextmanager
    def out(self):
        """No call raises in here, and none is counted."""
        number, self.number = self.number, -1
        yield
        self.number = number

    def wrapped(self, function):
        def call(*arguments):
            self.number -= 1
            if self.number:
                return function(*arguments)
            if self.is_late:
                function(*arguments)
            raise Injected

        return call


class Page:
    def __init__(self, rank):
        self.rank, self.ids = rank, {}  # ids: of this page in the caches that have it, once seen in a table


class Sequence:
    def __init__(self, first_rank, tokens=(), pages=()):
        self.first_rank, self.tokens, self.pages = first_rank, list(tokens), list(pages)


class CacheMachine(RuleBasedStateMachine):
    """`self.model` holds, for every live id, the tokens and the pages of the sequence; a shared page is one object."""

    def __init__(self, device, layout, page_size, num_layers, num_ranks=1):
        super().__init__()
        self.num_pages = NUM_PAGES // num_ranks + 2 * (num_ranks > 1)  # of one rank

        def make(num_pages, **ranks):
            options = {"layout": layout, "dtype": "float16", "num_layers": num_layers, "device": device}
            return pa.PagedKVCache(num_pages, page_size, KV_HEADS, HEAD_DIM, **options, **ranks)

        self.ranks = [make(self.num_pages, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        self.whole = make(self.num_pages * num_ranks)
        self.fuse = Fuse(backends.of(self.whole.device))
        self.page_size, self.model, self.next_token, self.num_created = page_size, {}, 0, 0

    @rule(number=st.integers(1, 12), is_late=st.booleans())
    def one_of_the_next_calls_fails(self, number, is_late):
        self.fuse.number, self.fuse.is_late = number, is_late

    def on_all(self, call):
        """What call(cache) returns for every cache, which is the same, but for arrays.

        Injected: the first rank has failed, no other was called, and all is as it was. OutOfPagesError: of every rank.
        """
        answers = []
        for cache in self.ranks:
            try:
                answers.append(self.answer(call, cache))
            except Injected:
                self.fuse.number = -1
                if self.model:
                    self.read_cache(cache, list(self.model))
                if not answers:
                    raise
                answers.append(self.answer(call, cache))
        if isinstance(answers[0], pa.OutOfPagesError):
            assert len({(type(answer), answer.args, answer.wanted, answer.free) for answer in answers}) == 1
            raise answers[0]
        with self.fuse.out():
            answers.append(call(self.whole))
        if not hasattr(answers[0], "shape"):
            assert len(set(answers)) == 1
        return answers

    @staticmethod
    def answer(call, cache):
        try:
            return call(cache)
        except pa.OutOfPagesError as error:
            return error

    def pick(self, number):
        return list(self.model)[number % len(self.model)]

    def sharers(self, page):
        return [seq for seq, sequence in self.model.items() if page in sequence.pages]

    def held(self):
        return {page for sequence in self.model.values() for page in sequence.pages}

    def pages_for(self, length):
        return -(-length // self.page_size)

    def model_copies(self, batch):
        """The sequences of a batch [(seq, count)] that must copy their last page before they write into it."""
        writers = [seq for seq, count in batch if count and len(self.model[seq].tokens) % self.page_size]
        last = {seq: self.model[seq].pages[-1] for seq in writers}
        copying = []
        for seq in writers:
            sharers = self.sharers(last[seq])
            all_write = all(last.get(other) is last[seq] for other in sharers)
            longest = max(len(self.model[other].tokens) for other in sharers)
            keeper = [w for w in writers if w in sharers and len(self.model[w].tokens) == longest][-1:]
            if len(sharers) > 1 and not (all_write and [seq] == keeper):
                copying.append(seq)
        return copying

    @rule()
    def new(self):
        seq, *_ = self.on_all(lambda cache: cache.new_sequence())
        assert seq not in self.model
        self.model[seq] = Sequence(self.num_created % len(self.ranks))
        self.num_created += 1

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 99), part=st.none() | st.floats(0, 1))
    def fork(self, number, part):
        source = self.model[seq := self.pick(number)]
        length = len(source.tokens) if part is None else round(part * len(source.tokens))
        try:
            fork, *_ = self.on_all(lambda cache: cache.fork(seq) if part is None else cache.fork(seq, length))
        except Injected:
            return
        assert fork not in self.model
        self.model[fork] = Sequence(source.first_rank, source.tokens[:length], source.pages[: self.pages_for(length)])

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 99), part=st.floats(0, 1))
    def truncate(self, number, part):
        sequence = self.model[seq := self.pick(number)]
        length = round(part * len(sequence.tokens))
        self.on_all(lambda cache: cache.truncate(seq, length))
        del sequence.tokens[length:], sequence.pages[self.pages_for(length) :]

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 99))
    def free(self, number):
        seq = self.pick(number)
        self.on_all(lambda cache: cache.free(seq))
        del self.model[seq]
        for cache in self.ranks:
            with pytest.raises(ValueError, match="was freed"):
                cache.seq_len(seq)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), same_count=st.none() | st.integers(0, 3))
    def append(self, data, same_count):
        order = data.draw(st.permutations(list(self.model)))
        seqs = order[: data.draw(st.integers(0, len(order)))]
        limit = min(2 * self.page_size + 1, 20)
        counts = [data.draw(st.integers(0, limit)) if same_count is None else same_count for _ in seqs]
        batch = list(zip(seqs, counts, strict=True))
        copies = {seq: Page(self.model[seq].pages[-1].rank) for seq in self.model_copies(batch)}
        added = {seq: self.model_pages(seq, count) for seq, count in batch}
        lacking, wanted, free = self.fullest([*copies.values(), *(page for pages in added.values() for page in pages)])
        taken = [len(added[seq]) + (seq in copies) for seq in seqs]
        enough = sum(-(-count // len(self.ranks)) for count in taken) <= self.ranks[0].num_free_pages
        tokens = list(range(self.next_token, self.next_token + sum(counts)))
        try:
            slots = self.on_all(
                lambda cache: self.append_to_cache(cache, seqs, counts if same_count is None else same_count, tokens)
            )
        except pa.OutOfPagesError as error:
            assert (error.wanted, error.free) == (wanted, free) and lacking > 0 and not enough
            return
        except Injected:
            return
        assert lacking <= 0
        if slots[0] is not None:
            is_here = np.array([to_host(array) >= 0 for array in slots])
            assert (is_here[:-1].sum(axis=0) == 1).all() and is_here[-1].all()
            assert all((to_host(array)[~here] == -1).all() for array, here in zip(slots, is_here, strict=True))
        self.next_token += len(tokens)
        for seq, page in copies.items():
            self.model[seq].pages[-1] = page
        for seq, count in batch:
            self.model[seq].tokens += tokens[:count]
            self.model[seq].pages += added[seq]
            del tokens[:count]

    def model_pages(self, seq, count):
        """The pages that a sequence gets with so many more tokens."""
        sequence = self.model[seq]
        numbers = range(len(sequence.pages), self.pages_for(len(sequence.tokens) + count))
        return [Page((sequence.first_rank + number) % len(self.ranks)) for number in numbers]

    def fullest(self, pages):
        """Of the rank that lacks most if these pages are taken: what it lacks, what it is to give, what it has."""
        wanted, held = Counter(page.rank for page in pages), Counter(page.rank for page in self.held())
        free = [self.num_pages - held[rank] for rank in range(len(self.ranks))]
        return max((wanted[rank] - free[rank], wanted[rank], free[rank]) for rank in range(len(self.ranks)))

    def append_to_cache(self, cache, seqs, counts, tokens):
        """The slots; of a cache of one layer they are not seen."""
        layers = range(len(cache.layers))
        arrays = [[self.to_device(kv_of(tokens, layer, is_v)) for is_v in (False, True)] for layer in layers]
        if len(layers) == 1:
            return cache.append(seqs, counts, *arrays[0])
        slots = cache.reserve(seqs, counts)
        with self.fuse.out():  # from here on the tokens are reserved
            for layer in layers:
                cache.write(slots, *arrays[layer], layer=layer)
        return slots

    def to_device(self, array):
        if self.whole.device == "cpu":
            return array
        import cupy

        return cupy.asarray(array)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), out=st.sampled_from(["none", "plain", "positions"]))
    def read(self, data, out):
        order = data.draw(st.permutations(list(self.model)))
        seqs = order[: data.draw(st.integers(1, len(order)))]
        try:
            for cache in self.ranks:
                cache.page_table(seqs)
        except Injected:
            self.fuse.number = -1
            self.read_back(list(self.model))
        self.fuse.number = -1
        self.read_back(seqs, out)

    def read_back(self, seqs, out="none"):
        for cache in (*self.ranks, self.whole):
            self.read_cache(cache, seqs, out)

    def read_cache(self, cache, seqs, out="none"):
        """The table of a cache has the pages that the model has there, where they are in their sequences."""
        rank, num_ranks = (self.ranks.index(cache), len(self.ranks)) if cache in self.ranks else (0, 1)
        pages_of = [
            [(j, page) for j, page in enumerate(self.model[seq].pages) if num_ranks == 1 or page.rank == rank]
            for seq in seqs
        ]
        if out == "none":
            table = cache.page_table(seqs)
        else:
            capacity, has_positions = (len(seqs) + 1, sum(map(len, pages_of))), out == "positions" or num_ranks > 1
            sizes = {"page_size": self.page_size, "positions": has_positions, "page_stride": num_ranks}
            table = cache.page_table(seqs, pa.PageTable.empty(*capacity, **sizes, device=cache.device))
        table.validate(cache.num_pages).raise_if_bad()
        assert table.page_stride == num_ranks and (table.page_offset is not None or num_ranks == 1)
        indptr, indices, seq_lens = map(to_host, (table.indptr, table.indices, table.seq_lens))
        offsets = np.zeros(len(seqs), int)
        if table.page_offset is not None:
            offsets = to_host(table.page_offset)
            assert to_host(table.total_len).tolist() == [len(self.model[seq].tokens) for seq in seqs]
        for i, (seq, pages) in enumerate(zip(seqs, pages_of, strict=True)):
            ids = indices[indptr[i] : indptr[i + 1]].tolist()
            assert [j for j, _ in pages] == [offsets[i] + num_ranks * k for k in range(len(ids))]
            for (_, page), page_id in zip(pages, ids, strict=True):
                assert page.ids.setdefault(cache, page_id) == page_id, "a page keeps its id while anybody holds it"
            begins = [j * self.page_size for j, _ in pages]
            tokens = [token for j in begins for token in self.model[seq].tokens[j : j + self.page_size]]
            assert seq_lens[i] == len(tokens)
            self.read_tokens(cache, tokens, ids)
        ids = [page.ids[cache] for page in self.held() if cache in page.ids]
        assert len(set(ids)) == len(ids), "two pages of the model are one page of the cache"

    def read_tokens(self, cache, tokens, ids):
        for layer, kv in enumerate(cache.layers):
            for pages, is_v in ((kv.k_pages, False), (kv.v_pages, True)):
                held = to_host(pages)[np.array(ids, int)]
                by_token = held if kv.layout == "NHD" else held.swapaxes(1, 2)
                found = by_token.reshape(-1, KV_HEADS, HEAD_DIM)[: len(tokens)]
                np.testing.assert_array_equal(found, kv_of(tokens, layer, is_v))

    @invariant()
    def counts_agree(self):
        pages = [page for sequence in self.model.values() for page in sequence.pages]
        lengths = [len(sequence.tokens) for sequence in self.model.values()]
        num_shared = sum(count > 1 for count in Counter(pages).values())
        held = Counter(page.rank for page in set(pages))
        for cache in (*self.ranks, self.whole):
            assert cache.num_shared_pages == num_shared
            assert [cache.seq_len(seq) for seq in self.model] == lengths
        assert {cache.num_free_pages for cache in self.ranks} == {self.num_pages - max(held.values(), default=0)}
        assert self.whole.num_free_pages == self.whole.num_pages - len(set(pages))

    def teardown(self):
        """Everything is readable to the end; then every page comes back, and all of them can be had once more."""
        self.fuse.number = -1
        self.fuse.patch.stop()
        if self.model:
            self.read_back(list(self.model))
        for cache in (*self.ranks, self.whole):
            for seq in self.model:
                cache.free(seq)
            assert (cache.num_free_pages, cache.num_shared_pages) == (cache.num_pages, 0)
            slots = to_host(cache.reserve([cache.new_sequence()], self.whole.num_pages * self.page_size))
            assert sorted(slots[slots >= 0].tolist()) == list(range(cache.num_pages * self.page_size))


def run(device, *arguments, max_examples, steps=40):
    run_state_machine_as_test(
        lambda: CacheMachine(device, *arguments),
        settings=settings(
            max_examples=max_examples if device == "cpu" else 15,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_every_token_stays_readable_and_no_page_leaks(device, layout, page_size, num_layers):
    run(device, layout, page_size, num_layers, max_examples=40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_ranks_answer_alike_and_have_each_token_once(device, num_ranks):
    run(
        device,
        "NHD" if num_ranks % 2 else "HND",
        (4, 3, 2)[num_ranks % 3],
        1 + num_ranks // 2 % 2,
        num_ranks,
        max_examples=20,
    )
