"""Continuous batching over a ``PagedKVCache``: the serving loop, and nothing else.

A step, in order: requests that have arrived join while there are pages for them, sharing the longest prefix that a
running request has already computed (``fork``); every running request reserves slots for its new tokens; if the pool
is full the youngest gives its pages back and waits to be recomputed; one plan and one forward pass serve the whole
batch; each request gets one token; finished requests free their pages.

There is no separate prefill phase: a request's new tokens are those that its sequence in the cache does not hold yet.
That is the whole prompt when it joins, the part behind the shared prefix after a fork, prompt and answer so far when
it comes back from preemption, and one token in every other step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

import paged_attn as pa
from paged_attn.demo.models import Array, Attention, Llama


class State(StrEnum):
    """What a request is doing."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    DONE = "done"


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine."""

    number: int
    prompt: list[int]
    max_new_tokens: int
    arrival: int = 0  # the first step in which it may join
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)  # prompt and answer so far
    seq: int = -1  # its sequence in the cache while it runs

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """The answer so far."""
        return self.tokens[len(self.prompt) :]


@dataclass(frozen=True)
class Event:
    """Something a person watching would want to know."""

    step: int
    request: Request
    text: str


@dataclass
class Stats:
    """Counters over the life of an engine."""

    steps: int = 0
    new_tokens: int = 0
    computed_tokens: int = 0  # tokens that went through the model
    forked_tokens: int = 0  # tokens that did not have to, because another request's pages held them
    preemptions: int = 0
    peak_pages: int = 0
    seconds: float = 0.0  # inside step()

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0


class Engine:
    """Serves requests with one model over one cache, greedily; override ``sample`` for anything else."""

    def __init__(self, model: Llama, cache: pa.PagedKVCache, *, stop_id: int | None = None):
        self.model, self.cache, self.stop_id = model, cache, stop_id
        self.decode = pa.BatchDecodeWithPagedKVCache()
        self.prefill = pa.BatchPrefillWithPagedKVCache()
        self.requests: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.stats = Stats()
        self.events: list[Event] = []

    def submit(self, request: Request) -> None:
        """Queue a request. ValueError if it could never be served."""
        longest = len(request.prompt) + request.max_new_tokens
        if not request.prompt:
            raise ValueError(f"the prompt of request {request.number} has no token; give at least one")
        if longest > self.model.config.max_len:
            raise ValueError(
                f"request {request.number} may grow to {longest} tokens ({len(request.prompt)} of prompt and "
                f"{request.max_new_tokens} new), but the model's context holds {self.model.config.max_len}; "
                "shorten the prompt or lower max_new_tokens"
            )
        if self._pages(longest) > self.cache.num_pages:
            raise ValueError(
                f"request {request.number} may grow to {longest} tokens, which is {self._pages(longest)} pages of "
                f"{self.cache.page_size}, but the pool has {self.cache.num_pages}; "
                "raise num_pages or lower max_new_tokens"
            )
        self.requests.append(request)
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        """Whether any request is not done yet."""
        return bool(self.waiting or self.running)

    def step(self) -> None:
        """Let every request that has room advance by one token."""
        started = time.perf_counter()
        for request in self.running:
            request.state = State.DECODE
        self._admit()
        if self.running:
            pending, slots = self._reserve()
            self.stats.peak_pages = max(self.stats.peak_pages, self.num_used_pages)
            logits = self._forward(pending, slots)
            for request, token in zip(list(self.running), self.sample(logits, self.running), strict=True):
                self._accept(request, token)
        self.stats.steps += 1
        self.stats.seconds += time.perf_counter() - started

    def sample(self, logits: Array, requests: Sequence[Request]) -> list[int]:
        """The next token of each request, from logits float32 [batch, vocab]."""
        return logits.argmax(axis=-1).tolist()

    # One step, in order

    def _admit(self) -> None:
        """Let requests join, first come first served, while there is room for them and a page for every running one."""
        while self.waiting and self.waiting[0].arrival <= self.stats.steps:
            request = self.waiting[0]
            donor, shared = self._longest_shared_prefix(request)
            promised = sum(self._pages_to_write(r, self.cache.seq_len(r.seq)) for r in self.running)
            if promised + self._pages_to_write(request, shared) > self.cache.num_free_pages:
                return
            self.waiting.popleft()
            returns = "comes back" if request.state == State.PREEMPTED else "joins"
            if donor is None:
                request.seq = self.cache.new_sequence()
                text = f"{returns}, prefill of {len(request.tokens)} tokens"
            else:
                request.seq = self.cache.fork(donor.seq, shared)
                text = f"{returns}, {shared} tokens forked from request {donor.number}, "
                text += f"prefill of {len(request.tokens) - shared}"
            self.stats.forked_tokens += shared
            request.state = State.PREFILL
            self.running.append(request)
            self._report(request, text)

    def _reserve(self) -> tuple[list[list[int]], Array]:
        """Slots for the new tokens of all running requests, preempting the youngest while the pool is too small."""
        while True:
            pending = [request.tokens[self.cache.seq_len(request.seq) :] for request in self.running]
            try:
                return pending, self.cache.reserve([r.seq for r in self.running], [len(new) for new in pending])
            except pa.OutOfPagesError as error:  # the cache is as it was before the call
                self._preempt(self.running[-1], error)

    def _preempt(self, request: Request, error: pa.OutOfPagesError) -> None:
        """A request gives its pages back; it is the first to come back, and is then recomputed."""
        freed = self._release(request, State.PREEMPTED)
        self.waiting.appendleft(request)
        self.stats.preemptions += 1
        self._report(request, f"preempted, pool full ({error.wanted} wanted, {error.free} free), frees {freed} pages")

    def _forward(self, pending: list[list[int]], slots: Array) -> Array:
        """One mixed batch through the model: one plan for the step, one run a layer."""
        counts = np.array([len(new) for new in pending])
        qo_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        token_ids = np.concatenate(pending)
        positions = np.concatenate(
            [np.arange(len(r.tokens) - n, len(r.tokens)) for r, n in zip(self.running, counts, strict=True)]
        )
        table = self.cache.page_table([r.seq for r in self.running])
        kv, num_qo_heads = self.cache.layers[0], self.model.config.num_qo_heads
        attention: Attention
        if counts.max() == 1:
            attention = self.decode
            self.decode.plan(kv, table, num_qo_heads)
        else:  # decoding requests are rows of one query among the prompts
            attention = self.prefill
            self.prefill.plan(kv, table, qo_indptr, num_qo_heads)
        self.stats.computed_tokens += len(token_ids)
        return self.model.forward(token_ids, positions, qo_indptr[1:] - 1, slots, self.cache, attention)

    def _accept(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        self.stats.new_tokens += 1
        if token == self.stop_id or len(request.new_tokens) == request.max_new_tokens:
            freed = self._release(request, State.DONE)
            self._report(request, f"done after {len(request.new_tokens)} tokens, frees {freed} pages")

    def _release(self, request: Request, state: State) -> int:
        """A request stops running; returns how many pages that frees."""
        free = self.cache.num_free_pages
        self.cache.free(request.seq)
        self.running.remove(request)
        request.state = state
        return self.cache.num_free_pages - free

    # Pages

    @property
    def num_used_pages(self) -> int:
        """Pages that are not free."""
        return self.cache.num_pages - self.cache.num_free_pages

    def num_pages_of(self, request: Request) -> int:
        """Pages that a request holds, shared ones included."""
        return self._pages(self.cache.seq_len(request.seq)) if request in self.running else 0

    def _pages(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.cache.page_size)

    def _pages_to_write(self, request: Request, num_cached: int) -> int:
        """Pages that the tokens not cached yet may take, the copy of a shared page that is partly filled included."""
        return self._pages(len(request.tokens)) - num_cached // self.cache.page_size

    def _longest_shared_prefix(self, request: Request) -> tuple[Request | None, int]:
        """The running request that has computed the most of this one's tokens, and how many; the last is never shared,
        for its logits are wanted."""
        best: tuple[Request | None, int] = (None, 0)
        for donor in self.running:
            limit = min(self.cache.seq_len(donor.seq), len(request.tokens) - 1)
            differs = (i for i in range(limit) if donor.tokens[i] != request.tokens[i])
            shared = next(differs, limit)
            if shared > best[1]:
                best = donor, shared
        return best

    def _report(self, request: Request, text: str) -> None:
        self.events.append(Event(self.stats.steps, request, text))
