"""What a person sees of the engine: a live picture in a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, JustifyMethod
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
POOL_WIDTH = 60  # of the bar and of the newest text, where the terminal has room for them
TEXT_WIDTH = 48
GAP = 2  # between columns


def serve(engine: Engine, decode: Callable[[list[int]], str], console: Console) -> None:
    """Run the engine until every request is done, showing each step."""
    if not console.is_terminal:
        while engine.busy:
            already = len(engine.events)
            engine.step()
            for event in engine.events[already:]:
                console.print(f"step {event.step:3d}  request {event.request.number} {event.text}", soft_wrap=True)
        return
    with Live(picture(engine, decode, console.width), console=console, auto_refresh=False) as live:
        while engine.busy:
            started = time.perf_counter()
            engine.step()
            live.update(picture(engine, decode, console.width), refresh=True)
            time.sleep(max(0.0, SECONDS_PER_FRAME - (time.perf_counter() - started)))


def picture(engine: Engine, decode: Callable[[list[int]], str], width: int) -> Group:
    """One frame for a terminal of ``width`` columns: the requests, the pool, what happened last.

    Numbers are never cut: the texts and the bar take what room there is beside them.
    """
    header = ("request", "state", "tokens", "pages")
    rows = [
        (
            str(request.number),
            str(request.state),
            f"{len(request.prompt)}+{len(request.new_tokens)}",
            str(engine.num_pages_of(request)),
        )
        for request in engine.requests
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    widths[header.index("state")] = len(State.PREEMPTED)  # the longest, so that the columns stay where they are
    room = min(TEXT_WIDTH, width - sum(widths) - GAP * len(widths))
    requests = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for name, least in zip(header, widths, strict=True):
        justify: JustifyMethod = "right" if name in ("tokens", "pages") else "left"
        requests.add_column(name, justify=justify, min_width=least if room >= 0 else None, overflow="fold")
    if room >= len("text"):
        requests.add_column("text", no_wrap=True, overflow="crop", max_width=room)
    for request, (number, state, *counts) in zip(engine.requests, rows, strict=True):
        text = " ".join(decode(request.new_tokens).split())
        cells: list[str | Text] = [number, Text(state, STATE_STYLES[request.state]), *counts, Text(text[-room:])]
        requests.add_row(*cells[: len(requests.columns)])
    used, shared, free = engine.num_used_pages, engine.cache.num_shared_pages, engine.cache.num_free_pages
    counts_of_pool = f"used {used}, shared {shared}, free {free}"
    bar = max(0, min(POOL_WIDTH, width - len("pool ") - GAP - len(counts_of_pool)))
    filled = round(bar * used / engine.cache.num_pages)
    pool = Text.assemble(
        "pool ",
        ("█" * filled, "green" if free else "red"),
        ("░" * (bar - filled), "dim"),
        " " * GAP if bar else "",
        counts_of_pool,
    )
    stats = engine.stats
    speed = f"step {stats.steps}   {stats.tokens_per_second:.0f} tokens/s   preemptions {stats.preemptions}"
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
