"""The options of the demo, and its run from prompts to summary."""

from __future__ import annotations

import argparse
from types import ModuleType

import numpy as np
from rich.console import Console

import paged_attn as pa
from paged_attn.demo.engine import Engine, Request
from paged_attn.demo.models import LOADERS, MissingPackageError
from paged_attn.demo.view import serve, summary

STEPS_BETWEEN_ARRIVALS = 4  # so that requests join while others decode
DEFAULT_POOLS = {"glassllm": (4, 60), "smollm2": (16, 10)}  # page_size, num_pages: too small for all five prompts


class UsageError(Exception):
    """The demo cannot do what was asked; the message says why and what to do."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the demo's options."""
    parser.add_argument("--model", choices=LOADERS, default="glassllm", help="default: glassllm")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for more requests; default: five")
    parser.add_argument("--max-new-tokens", type=positive, default=40, metavar="N", help="per request; default: 40")
    backends = ("auto", "numpy", "cuda")
    parser.add_argument(
        "--backend", choices=backends, default="auto", help="auto: a GPU where there is one, else NumPy"
    )
    sizes = "; ".join(f"{model} {page_size}" for model, (page_size, _) in DEFAULT_POOLS.items())
    pools = "; ".join(f"{model} {num_pages}" for model, (_, num_pages) in DEFAULT_POOLS.items())
    parser.add_argument("--page-size", type=positive, metavar="N", help=f"tokens in a page; default: {sizes}")
    parser.add_argument("--num-pages", type=positive, metavar="N", help=f"pages in the pool; default: {pools}")
    parser.add_argument("--layout", choices=tuple(pa.Layout), default=pa.Layout.NHD, help="default: NHD")


def run(options: argparse.Namespace) -> int:
    """Serve the prompts; returns the exit status: 0, or 2 with one line of reason."""
    console = Console(highlight=False, markup=False)
    try:
        demo(options, console)
    except (UsageError, MissingPackageError) as error:
        Console(stderr=True, highlight=False, markup=False).print(str(error), soft_wrap=True)
        return 2
    return 0


def demo(options: argparse.Namespace, console: Console) -> None:
    """Load the model, serve the prompts, print texts and summary."""
    xp, backend = choose_backend(options.backend)
    on_gpu = xp is not np
    model = LOADERS[options.model](xp, "float16" if on_gpu else "float32")
    config = model.llama.config
    default_page_size, default_num_pages = DEFAULT_POOLS[options.model]
    cache = pa.PagedKVCache(
        options.num_pages or default_num_pages,
        options.page_size or default_page_size,
        config.num_kv_heads,
        config.head_dim,
        layout=options.layout,
        dtype=model.llama.dtype,
        num_layers=len(model.llama.layers),
        device="cuda" if on_gpu else "cpu",
    )
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


def choose_backend(name: str) -> tuple[ModuleType, str]:
    """The array module to compute with, and what it runs on in words."""
    if name == "numpy":
        return np, "NumPy"
    problem = cuda_problem()
    if problem is None:
        import cupy

        return cupy, cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    if name == "cuda":
        raise UsageError(
            f"--backend cuda: {problem}; with a GPU install paged_attn[demo-cuda12] or paged_attn[demo-cuda13], "
            "without one pass --backend numpy"
        )
    return np, f"NumPy ({problem})"


def cuda_problem() -> str | None:
    """Why the demo cannot run on a GPU here, or None."""
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "CuPy sees no CUDA device"
    except ImportError:
        return "CuPy is not installed"
    except Exception as error:  # of any type: a cache folder that cannot be made, a driver that does not answer
        return f"CuPy does not work: {type(error).__name__}: {error}"
    try:
        from cupy.cuda import cublas  # noqa: F401 (the linear layers need it; CuPy loads it here)
    except ImportError:
        return "CuPy finds no cuBLAS"
    return None


def positive(text: str) -> int:
    """An argparse type: an int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
