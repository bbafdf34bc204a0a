"""Any sequence of calls of PagedKVCache against a plain model, in which pages are objects and tokens are ints.

Some calls fail: one of the calls that the cache makes of its backend raises, before or after it has done its work. Then
everything must be as it was.
"""

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
    page_id = None  # once seen in a table


class Sequence:
    def __init__(self, tokens=(), pages=()):
        self.tokens, self.pages = list(tokens), list(pages)


class CacheMachine(RuleBasedStateMachine):
    """`self.model` holds, for every live id, the tokens and the pages of the sequence; a shared page is one object."""

    def __init__(self, device, layout, page_size, num_layers):
        super().__init__()
        self.cache = pa.PagedKVCache(
            NUM_PAGES,
            page_size,
            KV_HEADS,
            HEAD_DIM,
            layout=layout,
            dtype="float16",
            num_layers=num_layers,
            device=device,
        )
        self.fuse = Fuse(backends.of(self.cache.device))
        self.page_size, self.model, self.next_token = page_size, {}, 0

    @rule(number=st.integers(1, 6), is_late=st.booleans())
    def one_of_the_next_calls_fails(self, number, is_late):
        self.fuse.number, self.fuse.is_late = number, is_late

    def has_failed(self):
        """What is to be done where a call raised Injected: nothing, but to look whether all is there."""
        self.fuse.number = -1
        if self.model:
            self.read_back(list(self.model), into_out=False)

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
        seq = self.cache.new_sequence()
        assert seq not in self.model
        self.model[seq] = Sequence()

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 99), part=st.none() | st.floats(0, 1))
    def fork(self, number, part):
        source = self.model[seq := self.pick(number)]
        length = len(source.tokens) if part is None else round(part * len(source.tokens))
        try:
            fork = self.cache.fork(seq) if part is None else self.cache.fork(seq, length)
        except Injected:
            self.has_failed()
            return
        assert fork not in self.model
        self.model[fork] = Sequence(source.tokens[:length], source.pages[: self.pages_for(length)])

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 99), part=st.floats(0, 1))
    def truncate(self, number, part):
        sequence = self.model[seq := self.pick(number)]
        length = round(part * len(sequence.tokens))
        self.cache.truncate(seq, length)
        del sequence.tokens[length:], sequence.pages[self.pages_for(length) :]

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 99))
    def free(self, number):
        seq = self.pick(number)
        self.cache.free(seq)
        del self.model[seq]
        with pytest.raises(ValueError, match="was freed"):
            self.cache.seq_len(seq)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), same_count=st.none() | st.integers(0, 3))
    def append(self, data, same_count):
        order = data.draw(st.permutations(list(self.model)))
        seqs = order[: data.draw(st.integers(0, len(order)))]
        limit = min(2 * self.page_size + 1, 20)
        counts = [data.draw(st.integers(0, limit)) if same_count is None else same_count for _ in seqs]
        batch = list(zip(seqs, counts, strict=True))
        copying = self.model_copies(batch)
        added = [self.pages_for(len(self.model[seq].tokens) + n) - len(self.model[seq].pages) for seq, n in batch]
        wanted, free = sum(added) + len(copying), NUM_PAGES - len(self.held())
        tokens = list(range(self.next_token, self.next_token + sum(counts)))
        try:
            self.append_to_cache(seqs, counts if same_count is None else same_count, tokens)
        except pa.OutOfPagesError as error:
            assert (error.wanted, error.free) == (wanted, free) and wanted > free
            return
        except Injected:
            self.has_failed()
            return
        assert wanted <= free
        self.next_token += len(tokens)
        for seq in copying:
            self.model[seq].pages[-1] = Page()
        for (seq, count), new_pages in zip(batch, added, strict=True):
            self.model[seq].tokens += tokens[:count]
            self.model[seq].pages += [Page() for _ in range(new_pages)]
            del tokens[:count]

    def append_to_cache(self, seqs, counts, tokens):
        layers = range(len(self.cache.layers))
        arrays = [[self.to_device(kv_of(tokens, layer, is_v)) for is_v in (False, True)] for layer in layers]
        if len(layers) == 1:
            self.cache.append(seqs, counts, *arrays[0])
            return
        slots = self.cache.reserve(seqs, counts)
        self.fuse.number = -1  # from here on the tokens are reserved
        for layer in layers:
            self.cache.write(slots, *arrays[layer], layer=layer)

    def to_device(self, array):
        if self.cache.device == "cpu":
            return array
        import cupy

        return cupy.asarray(array)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), into_out=st.booleans())
    def read(self, data, into_out):
        order = data.draw(st.permutations(list(self.model)))
        seqs = order[: data.draw(st.integers(1, len(order)))]
        try:
            self.cache.page_table(seqs)
        except Injected:
            self.has_failed()
        self.read_back(seqs, into_out)

    def read_back(self, seqs, into_out):
        self.fuse.number = -1
        out = None
        if into_out:
            num_pages = sum(len(self.model[seq].pages) for seq in seqs)
            out = pa.PageTable.empty(len(seqs) + 1, num_pages, page_size=self.page_size, device=self.cache.device)
        table = self.cache.page_table(seqs, out)
        table.validate(NUM_PAGES).raise_if_bad()
        indptr, indices = to_host(table.indptr), to_host(table.indices)
        assert to_host(table.seq_lens).tolist() == [len(self.model[seq].tokens) for seq in seqs]
        for seq, begin, end in zip(seqs, indptr, indptr[1:], strict=False):
            ids = indices[begin:end].tolist()
            for page, page_id in zip(self.model[seq].pages, ids, strict=True):
                assert page.page_id in (None, page_id), "a page keeps its id while anybody holds it"
                page.page_id = page_id
            self.read_tokens(self.model[seq].tokens, ids)
        ids = [page.page_id for page in self.held() if page.page_id is not None]
        assert len(set(ids)) == len(ids), "two pages of the model are one page of the cache"

    def read_tokens(self, tokens, ids):
        for layer, kv in enumerate(self.cache.layers):
            for pages, is_v in ((kv.k_pages, False), (kv.v_pages, True)):
                held = to_host(pages)[np.array(ids, int)]
                by_token = held if kv.layout == "NHD" else held.swapaxes(1, 2)
                found = by_token.reshape(-1, KV_HEADS, HEAD_DIM)[: len(tokens)]
                np.testing.assert_array_equal(found, kv_of(tokens, layer, is_v))

    @invariant()
    def counts_agree(self):
        pages = [page for sequence in self.model.values() for page in sequence.pages]
        assert self.cache.num_free_pages == NUM_PAGES - len(set(pages))
        assert self.cache.num_shared_pages == sum(pages.count(page) > 1 for page in set(pages))
        assert [self.cache.seq_len(seq) for seq in self.model] == [len(s.tokens) for s in self.model.values()]

    def teardown(self):
        """Everything is readable to the end; then every page comes back, and all of them can be had once more."""
        self.fuse.number = -1
        self.fuse.patch.stop()
        if self.model:
            self.read_back(list(self.model), into_out=False)
        for seq in self.model:
            self.cache.free(seq)
        assert (self.cache.num_free_pages, self.cache.num_shared_pages) == (NUM_PAGES, 0)
        slots = self.cache.reserve([self.cache.new_sequence()], NUM_PAGES * self.page_size)
        assert sorted(to_host(slots).tolist()) == list(range(NUM_PAGES * self.page_size))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_every_token_stays_readable_and_no_page_leaks(device, layout, page_size, num_layers):
    run_state_machine_as_test(
        lambda: CacheMachine(device, layout, page_size, num_layers),
        settings=settings(
            max_examples=40 if device == "cpu" else 15,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
