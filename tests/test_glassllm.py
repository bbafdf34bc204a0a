"""glassllm through the paged cache, against glassllm's own forward pass, which knows nothing of pages."""

from __future__ import annotations

from functools import cache as memoised
from types import ModuleType

import glassllm
import numpy as np
import pytest

import paged_attn as pa
from paged_attn.demo.engine import Engine, Request
from paged_attn.demo.models import LanguageModel, load_glassllm

OPENING = "Alice was sitting on the bank by her sister, and she was very tired of having nothing to do. "
PROMPTS = [
    OPENING + "“Who are you?” said the Caterpillar.",
    OPENING + "The White Rabbit looked at his watch and",
    "“Off with her head!” the Queen shouted.",
    OPENING + "The Cat only grinned",
    "A",
]
DTYPES = {"numpy": "float32", "cupy": "float16"}
TOLERANCES = {"numpy": 1e-4, "cupy": 2e-2}  # of logits that reach 20


@memoised
def oracle() -> tuple[glassllm.GlassLM, glassllm.Tokenizer]:
    return glassllm.load_pretrained("en")


@memoised
def language_model(xp: ModuleType) -> LanguageModel:
    return load_glassllm(xp, DTYPES[xp.__name__])


def make_cache(xp: ModuleType, *, page_size: int, num_pages: int, layout: str = "NHD") -> pa.PagedKVCache:
    llama = language_model(xp).llama
    config = llama.config
    return pa.PagedKVCache(
        num_pages,
        page_size,
        config.num_kv_heads,
        config.head_dim,
        layout=layout,
        dtype=llama.dtype,
        num_layers=len(llama.layers),
        device="cpu" if xp is np else "cuda",
    )


class TeacherForced(Engine):
    """Compares the logits of every request in every step with the oracle's, and goes on with the oracle's token."""

    largest_error = 0.0
    largest_batch = 0

    def sample(self, logits, requests):
        model, _ = oracle()
        expected = np.stack([model.forward(request.tokens).data[0, -1] for request in requests])
        ours = logits.get() if hasattr(logits, "get") else logits
        assert ours.shape == expected.shape and ours.dtype == np.float32
        self.largest_error = max(self.largest_error, float(abs(ours - expected).max()))
        self.largest_batch = max(self.largest_batch, len(requests))
        return expected.argmax(axis=-1).tolist()


def serve(engine: Engine, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    _, tokenizer = oracle()
    for number, prompt in enumerate(prompts):
        engine.submit(Request(number, tokenizer.encode(prompt), max_new_tokens, arrival=2 * number))
    while engine.busy:
        engine.step()
    return [request.new_tokens for request in engine.requests]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_logits_in_every_step_are_the_models_own(xp, page_size, layout):
    cache = make_cache(xp, page_size=page_size, num_pages=144 // page_size, layout=layout)
    engine = TeacherForced(language_model(xp).llama, cache)
    serve(engine, PROMPTS, max_new_tokens=24)
    assert engine.largest_error <= TOLERANCES[xp.__name__]
    assert engine.largest_batch > 1
    assert engine.stats.forked_tokens > 0 and engine.stats.preemptions > 0  # the hard ways were taken
    assert cache.num_free_pages == cache.num_pages


def test_logits_at_every_position_of_the_context(xp):
    cache = make_cache(xp, page_size=16, num_pages=8)
    engine = TeacherForced(language_model(xp).llama, cache)
    (answer,) = serve(engine, ["A"], max_new_tokens=language_model(xp).llama.config.max_len - 1)
    assert len(answer) == 127
    assert engine.largest_error <= TOLERANCES[xp.__name__]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_batched_is_alone_is_glassllm(page_size, layout):
    llama = language_model(np).llama
    sizes = {"page_size": page_size, "num_pages": 144 // page_size, "layout": layout}
    batched = serve(Engine(llama, make_cache(np, **sizes)), PROMPTS, max_new_tokens=16)
    alone = [serve(Engine(llama, make_cache(np, **sizes)), [prompt], max_new_tokens=16)[0] for prompt in PROMPTS]
    model, tokenizer = oracle()
    own = [[step.token for step in model.generate(tokenizer.encode(p), 16, greedy=True)] for p in PROMPTS]
    assert batched == alone == own
