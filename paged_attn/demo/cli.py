"""The options of the demo, and its run from prompts to summary."""

from __future__ import annotations

import argparse
import math
import re
import sys
from types import ModuleType

import numpy as np
from rich.console import Console

import paged_attn as pa
from paged_attn import install
from paged_attn.demo.engine import Engine, Request
from paged_attn.demo.models import LOADERS, LanguageModel, UsageError
from paged_attn.demo.view import serve, summary

STEPS_BETWEEN_ARRIVALS = 4  # so that requests join while others decode
DEFAULT_POOLS = {"glassllm": (4, 60), "smollm2": (16, 10)}  # page_size, num_pages: too small for all five prompts


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the demo's options; a name is understood in capitals and in small letters."""
    parser.add_argument("--model", type=str.lower, choices=LOADERS, default="glassllm", help="default: glassllm")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for more requests; default: five")
    parser.add_argument("--max-new-tokens", type=positive, default=40, metavar="N", help="per request; default: 40")
    backends = ("auto", "numpy", "cuda")
    parser.add_argument(
        "--backend", type=str.lower, choices=backends, default="auto", help="auto: a GPU where there is one, else NumPy"
    )
    sizes = "; ".join(f"{model} {page_size}" for model, (page_size, _) in DEFAULT_POOLS.items())
    pools = "; ".join(f"{model} {num_pages}" for model, (_, num_pages) in DEFAULT_POOLS.items())
    parser.add_argument("--page-size", type=positive, metavar="N", help=f"tokens in a page; default: {sizes}")
    parser.add_argument("--num-pages", type=positive, metavar="N", help=f"pages in the pool; default: {pools}")
    layouts = [layout.value for layout in pa.Layout]
    parser.add_argument("--layout", type=str.upper, choices=layouts, default=layouts[0], help=f"default: {layouts[0]}")


def run(options: argparse.Namespace) -> int:
    """Serve the prompts; returns the exit status: 0, or 2 with one line of reason."""
    console = Console(highlight=False, markup=False)
    try:
        demo(options, console)
    except UsageError as error:
        reason = str(error)
    except MemoryError as error:
        reason = f"out of memory{f' ({error})' if str(error) else ''}; lower num_pages or page_size"
    else:
        return 0
    Console(stderr=True, highlight=False, markup=False).print(as_typed(reason, options), soft_wrap=True)
    return 2


def as_typed(message: str, options: argparse.Namespace) -> str:
    """A message of the library or the engine, with options named as one types them: num_pages is --num-pages."""
    names = "|".join(name for name in vars(options) if "_" in name)
    return re.sub(rf"\b(?:{names})\b", lambda name: f"--{name[0].replace('_', '-')}", message)


def demo(options: argparse.Namespace, console: Console) -> None:
    """Load the model, serve the prompts, print texts and summary."""
    with console.status(f"loading {options.model} ..."):
        xp, backend = choose_backend(options.backend)
        on_gpu = xp is not np
        model = LOADERS[options.model](xp, "float16" if on_gpu else "float32")
    config = model.llama.config
    default_page_size, default_num_pages = DEFAULT_POOLS[options.model]
    num_pages, page_size = options.num_pages or default_num_pages, options.page_size or default_page_size
    cache = make_cache(model, num_pages, page_size, options.layout, "cuda" if on_gpu else "cpu")
    engine = Engine(model.llama, cache, stop_id=model.stop_id)
    prompts = options.prompt or model.default_prompts
    for number, prompt in enumerate(prompts):
        try:
            engine.submit(
                Request(number, model.encode(prompt), options.max_new_tokens, arrival=number * STEPS_BETWEEN_ARRIVALS)
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
    if on_gpu:  # compile the kernels before the clock runs
        warm_up = Engine(model.llama, cache)
        warm_up.submit(Request(0, engine.requests[0].prompt, max_new_tokens=min(2, options.max_new_tokens)))
        with console.status("compiling the kernels ..."):
            while warm_up.busy:
                warm_up.step()
    pool = cache.layers[0]
    console.print(
        f"{options.model} on {backend}, {pool.dtype}: {len(cache.layers)} layers, {config.num_qo_heads} query and "
        f"{config.num_kv_heads} KV heads of {config.head_dim}\n"
        f"pool of {pool.num_pages} pages of {pool.page_size} tokens, layout {pool.layout}",
        soft_wrap=True,
    )
    serve(engine, model.decode, console)
    summary(engine, prompts, model.decode, console, backend)


def make_cache(model: LanguageModel, num_pages: int, page_size: int, layout: str, device: str) -> pa.PagedKVCache:
    """The pool that the command line asks for; UsageError if it cannot be."""
    config, num_layers, dtype = model.llama.config, len(model.llama.layers), model.llama.dtype
    sizes = num_pages, page_size, config.num_kv_heads, config.head_dim
    num_bytes = math.prod(sizes) * 2 * num_layers * dtype.itemsize  # K and V
    try:
        if num_bytes > sys.maxsize:  # more than an address can reach: array libraries raise other errors for it
            raise MemoryError
        return pa.PagedKVCache(*sizes, layout=layout, dtype=dtype, num_layers=num_layers, device=device)
    except MemoryError:
        raise UsageError(
            f"a pool of {num_pages} pages of {page_size} tokens takes {num_bytes / 2**30:.3g} GiB, which is more than "
            "can be allocated here; lower num_pages or page_size"
        ) from None
    except NotImplementedError as error:  # an old card, or a pool that the kernels do not address
        raise UsageError(f"{error}; or lower num_pages or page_size, or pass --backend numpy") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def choose_backend(name: str) -> tuple[ModuleType, str]:
    """The array module to compute with, and what it runs on in words."""
    if name == "numpy":
        return np, "NumPy"
    if problem := cuda_problem():
        if name == "cuda":
            raise UsageError(f"--backend cuda: {problem}, or pass --backend numpy")
        return np, f"NumPy ({problem.rpartition(';')[0]})"
    import cupy

    return cupy, cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def cuda_problem() -> str:
    """What keeps the demo from a GPU, and behind a semicolon what to do; empty where nothing does."""
    support = pa.supports("decode", device="cuda")
    if not support:
        return f"{support.reason.rpartition(';')[0]}; python -m paged_attn doctor says what to install"
    try:
        from cupy.cuda import cublas  # noqa: F401 (the linear layers need it; CuPy loads it here)
    except ImportError:
        return f"CuPy finds no cuBLAS; install it with {install.for_cuda(install.CUBLAS, where='beside cupy-cuda{}x')}"
    return ""


def positive(text: str) -> int:
    """An argparse type: an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)
