"""What a person sees of the engine: a live picture in a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
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
POOL_WIDTH, TEXT_WIDTH = 60, 48  # of the bar and of the newest text, where the terminal has room for them
BESIDE_TEXT = 40  # what the other columns take
GAP = (0, 2, 0, 0)  # between columns


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
    room = min(TEXT_WIDTH, width - BESIDE_TEXT)
    columns = [Column(name, overflow="fold") for name in ("request", "state")]
    columns += [Column(name, justify="right", no_wrap=True) for name in ("tokens", "pages")]
    columns += [Column("text", no_wrap=True, overflow="crop")] if room >= len("text") else []
    requests = Table(*columns, box=None, pad_edge=False, padding=GAP)
    for request in engine.requests:
        # The longest state always has room, so that the columns stay where they are.
        state = Text(request.state.ljust(len(State.PREEMPTED)), STATE_STYLES[request.state], overflow="fold")
        tokens, pages = f"{len(request.prompt)}+{len(request.new_tokens)}", str(engine.num_pages_of(request))
        newest = Text(" ".join(decode(request.new_tokens).split())[-room:])
        requests.add_row(*(str(request.number), state, tokens, pages, newest)[: len(columns)])
    used, shared, free = engine.num_used_pages, engine.cache.num_shared_pages, engine.cache.num_free_pages
    bar = ProgressBar(engine.cache.num_pages, used, complete_style="green" if free else "red", finished_style="red")
    pool = Table.grid("", Column(max_width=POOL_WIDTH), "", padding=GAP)
    pool.add_row("pool", bar, f"used {used}, shared {shared}, free {free}")
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
