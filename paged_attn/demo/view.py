"""What a person sees of the engine: a live picture in a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paged_attn.demo.engine import Engine, State

STATE_STYLES = {
    State.WAITING: "dim",
    State.PREFILL: "bold cyan",
    State.DECODE: "green",
    State.PREEMPTED: "bold red",
    State.DONE: "blue",
}
SECONDS_PER_FRAME = 0.08  # a small model takes its steps faster than an eye can follow
POOL_WIDTH = 60
TEXT_WIDTH = 48


def serve(engine: Engine, decode: Callable[[list[int]], str], console: Console) -> None:
    """Run the engine until every request is done, showing each step."""
    if not console.is_terminal:
        while engine.busy:
            already = len(engine.events)
            engine.step()
            for event in engine.events[already:]:
                console.print(f"step {event.step:3d}  request {event.request.number} {event.text}", soft_wrap=True)
        return
    with Live(picture(engine, decode), console=console, auto_refresh=False) as live:
        while engine.busy:
            started = time.perf_counter()
            engine.step()
            live.update(picture(engine, decode), refresh=True)
            time.sleep(max(0.0, SECONDS_PER_FRAME - (time.perf_counter() - started)))


def picture(engine: Engine, decode: Callable[[list[int]], str]) -> Group:
    """One frame: the requests, the pool, what happened last."""
    requests = Table(box=None, pad_edge=False)
    requests.add_column("request")
    requests.add_column("state", min_width=len(State.PREEMPTED))
    requests.add_column("tokens", justify="right")
    requests.add_column("pages", justify="right")
    requests.add_column("text", no_wrap=True)
    for request in engine.requests:
        requests.add_row(
            str(request.number),
            Text(request.state, STATE_STYLES[request.state]),
            f"{len(request.prompt)}+{len(request.new_tokens)}",
            str(engine.num_pages_of(request)),
            Text(" ".join(decode(request.new_tokens).split())[-TEXT_WIDTH:]),
        )
    used, shared, free = engine.num_used_pages, engine.cache.num_shared_pages, engine.cache.num_free_pages
    filled = round(POOL_WIDTH * used / engine.cache.num_pages)
    pool = Text.assemble(
        "pool ",
        ("█" * filled, "green" if free else "red"),
        ("░" * (POOL_WIDTH - filled), "dim"),
        f"  used {used}, shared {shared}, free {free}",
    )
    speed = f"step {engine.stats.steps}   {engine.stats.tokens_per_second:.0f} tokens/s"
    news = [Text(f"step {e.step}: request {e.request.number} {e.text}", "dim") for e in engine.events[-4:]]
    return Group(requests, Text(), pool, Text(speed), Text(), *news)


def summary(
    engine: Engine, prompts: Sequence[str], decode: Callable[[list[int]], str], console: Console, backend: str
) -> None:
    """The texts, then the figures."""
    for request, prompt in zip(engine.requests, prompts, strict=True):
        console.print()
        console.print(Text(f"request {request.number}", "bold"), Text(prompt, "dim"), soft_wrap=True)
        console.print(Text(decode(request.new_tokens).strip()), soft_wrap=True)
    stats = engine.stats
    console.print()
    console.print(
        f"{len(engine.requests)} requests, {stats.new_tokens} new tokens in {stats.steps} steps, "
        f"{stats.tokens_per_second:.0f} tokens/s on {backend}",
        f"tokens: {stats.computed_tokens} computed, {stats.forked_tokens} forked",
        f"pages: peak {stats.peak_pages} of {engine.cache.num_pages}, {engine.cache.num_free_pages} free at the end",
        f"preemptions: {stats.preemptions}",
        sep="\n",
        soft_wrap=True,
        highlight=False,
    )
