"""The demo: its run from the command line, and the engine's decisions."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import paged_attn as pa
from paged_attn.__main__ import main, make_parser
from paged_attn.demo import cli, view
from paged_attn.demo.engine import Engine, Request, State
from paged_attn.demo.models import LOADERS, LanguageModel, UsageError, load_glassllm

ROOT = Path(__file__).parents[1]
STORY = "Alice was sitting on the bank by her sister, and she was very tired of having nothing to do. The Queen"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_glassllm(np, "float32")


def make_engine(model: LanguageModel, *, num_pages: int, page_size: int = 4, stop_id: int | None = None) -> Engine:
    config = model.llama.config
    cache = pa.PagedKVCache(
        num_pages,
        page_size,
        config.num_kv_heads,
        config.head_dim,
        layout="HND",
        dtype="float32",
        num_layers=len(model.llama.layers),
        device="cpu",
    )
    return Engine(model.llama, cache, stop_id=stop_id)


def submit(engine: Engine, model: LanguageModel, *prompts: str, max_new_tokens: int = 12, every: int = 0) -> None:
    for number, prompt in enumerate(prompts):
        engine.submit(Request(number, model.encode(prompt), max_new_tokens, arrival=number * every))


def serve(engine: Engine) -> list[list[int]]:
    while engine.busy:
        engine.step()
    return [request.new_tokens for request in engine.requests]


def demo(*options: str, backend: str = "numpy") -> str:
    """What `python -m paged_attn demo` prints where there is no terminal."""
    command = [sys.executable, "-m", "paged_attn", "demo", "--backend", backend, *options]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def answers(output: str) -> list[str]:
    """The texts behind the summary's 'request N prompt' lines."""
    texts = re.split(r"^request \d+ ", output, flags=re.MULTILINE)[1:]
    texts[-1] = re.split(r"\n\n\d+ requests, ", texts[-1])[0]
    return [text.split("\n", 1)[1].strip() for text in texts]


# The command


def test_the_default_run_joins_forks_preempts_and_frees():
    output = demo()
    assert "\x1b" not in output  # plain lines
    assert output.startswith(
        "glassllm on NumPy, float32: 4 layers, 4 query and 2 KV heads of 32\npool of 60 pages of 4"
    )
    events = re.findall(r"^step +(\d+)  request (\d) (.*)$", output, re.MULTILINE)
    steps = [int(step) for step, _, _ in events]
    assert steps == sorted(steps)
    for request in "01234":
        mine = [text for _, number, text in events if number == request]
        assert mine[0].startswith("joins") and mine[-1].startswith("done after 40 tokens, frees")
    assert any(re.search(r"joins, \d\d tokens forked from request 0, prefill of \d+$", text) for _, _, text in events)
    preempted = [(int(s), n) for s, n, text in events if text.startswith("preempted, pool full (")]
    came_back = [(int(s), n) for s, n, text in events if text.startswith("comes back")]
    assert preempted and len(preempted) == len(came_back)
    assert all(back > out and n == m for (out, n), (back, m) in zip(preempted, came_back, strict=True))
    assert len(answers(output)) == 5 and all(len(text) > 40 for text in answers(output))
    assert re.search(r"^5 requests, 200 new tokens in \d+ steps, \d+ tokens/s on NumPy$", output, re.MULTILINE)
    assert f"preemptions: {len(preempted)}\n" in output
    peak, num_pages, free = map(int, re.search(r"pages: peak (\d+) of (\d+), (\d+) free at the end", output).groups())
    assert num_pages - 5 < peak <= num_pages == free


@pytest.mark.gpu
def test_the_default_run_on_a_gpu_says_so_and_takes_the_same_turns():
    output = demo(backend="auto")
    assert re.match(r"glassllm on NVIDIA .*, float16: ", output)
    turns = re.findall(r"^step .*$", output, re.MULTILINE)
    assert turns == re.findall(r"^step .*$", demo(), re.MULTILINE)  # 40 tokens each, whatever they are
    assert len(answers(output)) == 5 and all(len(text) > 40 for text in answers(output))


def test_options_do_what_they_say():
    base = ("--prompt", "The Queen", "--prompt", "The Cat", "--max-new-tokens", "9")
    output = demo(*base, "--page-size", "3", "--num-pages", "30", "--layout", "HND")
    assert "pool of 30 pages of 3 tokens, layout HND" in output
    assert output.count("done after 9 tokens") == 2
    assert "2 requests, 18 new tokens" in output
    assert "preemptions: 0\n" in output
    assert answers(output) == answers(demo(*base, "--page-size", "16", "--num-pages", "2"))


def test_the_texts_do_not_depend_on_the_pool():
    assert answers(demo()) == answers(demo("--num-pages", "400", "--page-size", "1", "--layout", "HND"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-pages", "3"], r"request 0 may grow to \d+ tokens, which is \d+ pages of 4, but the pool has 3; raise"),
        (["--max-new-tokens", "128"], r"request 0 may grow to \d+ tokens .*, but the model's context holds 128; "),
        (["--prompt", ""], "the prompt of request 0 has no token; give at least one"),
        (["--num-pages", "3000000000"], "--num-pages is 3000000000, which is more than 2147483647; pass a smaller"),
        (["--page-size", "10000000000", "--num-pages", "1"], "--page-size is 10000000000, which is more than 2147"),
        # 245 TB are more than 47 bits of address reach, however generous the machine.
        (
            ["--page-size", "2000000000"],
            r"a pool of 60 pages of 2000000000 tokens takes 2\.29e\+05 GiB, .* lower --num",
        ),
        (
            ["--num-pages", "1" + "0" * 30],
            "a pool of 10{30} pages of 4 tokens takes .* lower --num-pages or --page-size",
        ),
        (["--max-new-tokens", "10000000000"], "request 0 may grow to 100000000.. tokens .* lower --max-new-tokens"),
    ],
)
def test_what_cannot_be_served_is_said_and_exits_with_2(options, message, capsys):
    assert main(["demo", "--backend", "numpy", *options]) == 2
    error = capsys.readouterr().err
    assert re.match(message, error) and error.count("\n") == 1
    assert not re.search(r"num_pages|page_size|max_new_tokens", error)  # options are named as they are typed


@pytest.mark.parametrize("reason", ["cuda:0 has compute capability 7.5", "k_pages spans 99 bytes; split the pool"])
def test_what_a_card_lacks_is_one_line(reason, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise NotImplementedError(reason)

    monkeypatch.setattr(pa, "PagedKVCache", refuse)
    assert main(["demo", "--backend", "numpy"]) == 2
    wanted = f"{reason}; or lower --num-pages or --page-size, or pass --backend numpy\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 9 GiB")], ids=repr)
def test_running_out_of_memory_while_serving_is_one_line(error, monkeypatch, capsys):
    def step(engine: Engine) -> None:
        raise error

    monkeypatch.setattr(Engine, "step", step)
    assert main(["demo", "--backend", "numpy"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("out of memory") and str(error) in said and "lower --num-pages or --page-size" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        "--page-size=0",
        "--layout=NDH",
        "--model=gpt",
        "--num-pages=x",
        "--num-pages=-1",
        "--num-pages=1e5",
        "--max-new-tokens=0",
    ],
)
def test_options_that_mean_nothing_exit_with_2(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", option])
    assert stopped.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_cuda_where_there_is_none_is_an_error_and_auto_says_what_it_took(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)  # import cupy raises ImportError
    assert main(["demo", "--backend", "cuda"]) == 2
    error = capsys.readouterr().err
    reason = "device='cuda' needs CuPy, and CuPy cannot be imported (import of cupy halted; None in sys.modules)"
    doctor = "python -m paged_attn doctor says what to install"
    assert error == f"--backend cuda: {reason}; {doctor}, or pass --backend numpy\n"
    assert main(["demo", "--prompt", "The Queen", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("glassllm on NumPy (device='cuda' needs CuPy")


def test_names_are_understood_in_capitals_and_in_small_letters():
    options = ("--prompt", "The Queen", "--max-new-tokens", "2")
    assert "layout HND" in demo(*options, "--layout", "hnd", "--model", "GLASSLLM", backend="NumPy")


@pytest.mark.parametrize("moment", ["loading", "serving", "in the summary"])
def test_ctrl_c_ends_with_one_line_and_130(moment, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    if moment == "loading":
        monkeypatch.setitem(LOADERS, "glassllm", interrupted)
    else:
        owner, name = (Engine, "step") if moment == "serving" else (cli, "summary")
        monkeypatch.setattr(owner, name, interrupted)
    assert main(["demo", "--backend", "numpy"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_signal_ends_a_process_with_one_line_and_130():
    # A shell may have started this test with SIGINT ignored, which a child inherits.
    start = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    start += "runpy.run_module('paged_attn', run_name='__main__', alter_sys=True)"
    options = ["demo", "--backend", "numpy", "--max-new-tokens", "84", "--num-pages", "40", *["--prompt", STORY] * 100]
    command = [sys.executable, "-u", "-c", start, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert first.startswith("glassllm on NumPy")
    assert (process.returncode, error) == (130, "stopped by Ctrl-C\n")


def test_ctrl_c_while_it_imports_is_one_line():
    start = """
import runpy, sys
class Interrupted:
    def find_spec(name, path=None, target=None):
        if name == "rich.live":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted)
runpy.run_module("paged_attn", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", start, "demo"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_a_terminal_says_that_a_model_loads(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    wanted = "loading smollm2 ..."

    def load(xp, dtype):
        deadline = time.monotonic() + 10
        while wanted not in screen.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)  # another thread draws
        raise UsageError("a model is missing")

    monkeypatch.setitem(LOADERS, "smollm2", load)
    options = make_parser().parse_args(["demo", "--model", "smollm2", "--backend", "numpy"])
    with pytest.raises(UsageError):
        cli.demo(options, screen)
    assert wanted in screen.file.getvalue()


def test_a_cupy_that_does_not_work_is_no_gpu(monkeypatch, capsys):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise OSError(30, "Read-only file system")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert main(["demo", "--backend", "cuda"]) == 2
    assert "CuPy cannot be imported (OSError: [Errno 30] Read-only file system)" in capsys.readouterr().err
    assert main(["demo", "--prompt", "The Queen", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("glassllm on NumPy (device='cuda' needs CuPy")


# The engine


def test_a_preempted_request_is_recomputed_to_the_same_text(model):
    roomy, tight = make_engine(model, num_pages=200), make_engine(model, num_pages=24)
    for engine in roomy, tight:
        submit(engine, model, STORY, "The Cat", STORY + " and the King", "A Rabbit", max_new_tokens=20, every=1)
    assert serve(roomy) == serve(tight)
    assert roomy.stats.preemptions == 0 < tight.stats.preemptions
    assert tight.cache.num_free_pages == 24
    assert tight.stats.peak_pages <= 24
    joined = {(event.step, event.request.number) for event in tight.events if "prefill" in event.text}
    preempted = {(event.step, event.request.number) for event in tight.events if "preempted" in event.text}
    assert len(preempted) == tight.stats.preemptions
    assert 0 not in {number for _, number in preempted}  # the oldest is never the victim
    assert not joined & preempted  # nobody is let in only to be put out in the same step


def test_the_youngest_is_preempted_keeps_its_text_and_returns_first(model):
    engine = make_engine(model, num_pages=12)
    submit(engine, model, "The Queen", "The Cat", "The King", max_new_tokens=30)
    while not engine.stats.preemptions:
        engine.step()
    victim = next(request for request in engine.requests if request.state == State.PREEMPTED)
    assert victim is engine.requests[2] and engine.waiting[0] is victim
    kept = list(victim.new_tokens)
    assert kept
    assert engine.num_pages_of(victim) == 0
    serve(engine)
    assert victim.new_tokens[: len(kept)] == kept and len(victim.new_tokens) == 30
    assert any(event.request is victim and event.text.startswith("comes back") for event in engine.events)


def test_requests_join_while_others_decode_in_one_batch(model):
    engine = make_engine(model, num_pages=100)
    submit(engine, model, "The Queen", "The Cat grinned", every=3)
    for _ in range(4):
        engine.step()
    first, second = engine.requests
    assert (first.state, second.state) == (State.DECODE, State.PREFILL)
    assert (len(first.new_tokens), len(second.new_tokens)) == (4, 1)
    engine.step()
    assert (first.state, second.state) == (State.DECODE, State.DECODE)


def test_the_longest_running_prefix_is_forked_and_shares_its_whole_pages(model):
    engine = make_engine(model, num_pages=100)
    submit(engine, model, "The Queen", STORY, STORY + " and the King", every=1)
    for _ in range(2):
        engine.step()
    assert engine.cache.num_shared_pages == 0
    engine.step()
    shared = len(model.encode(STORY))
    text = next(event.text for event in engine.events if event.request.number == 2)
    assert text.startswith(f"joins, {shared} tokens forked from request 1, prefill of ")
    assert engine.cache.num_shared_pages == shared // 4  # the page that is partly filled was copied on write
    assert engine.stats.forked_tokens >= shared
    assert engine.stats.computed_tokens == sum(engine.cache.seq_len(r.seq) for r in engine.running) - (
        engine.stats.forked_tokens
    )


def test_an_identical_prompt_computes_its_last_token_only(model):
    engine = make_engine(model, num_pages=100)
    submit(engine, model, STORY, STORY, every=1)
    engine.step()
    before = engine.stats.computed_tokens
    engine.step()
    assert engine.stats.computed_tokens - before == 2
    first, second = serve(engine)
    assert first == second


def test_a_stop_token_ends_a_request_and_frees_its_pages(model):
    free_running = make_engine(model, num_pages=40)
    submit(free_running, model, STORY)
    (answer,) = serve(free_running)
    stop_id = answer[5]
    engine = make_engine(model, num_pages=40, stop_id=stop_id)
    submit(engine, model, STORY)
    assert serve(engine) == [answer[: answer.index(stop_id) + 1]]
    assert engine.cache.num_free_pages == 40


# The view


def test_the_live_view_shows_requests_pool_and_speed(model, monkeypatch):
    monkeypatch.setattr(view, "SECONDS_PER_FRAME", 0.0)
    engine = make_engine(model, num_pages=40)
    submit(engine, model, STORY, STORY + " and the King", every=2)
    for _ in range(3):
        engine.step()
    console = Console(force_terminal=True, width=120, record=True, color_system=None)
    console.print(view.picture(engine, model.decode, console.width))
    picture = console.export_text()
    prompt = len(model.encode(STORY))
    pages = engine.num_pages_of(engine.requests[0])
    assert re.search(rf"^0 +decode +{prompt}\+3 +{pages} ", picture, re.MULTILINE)
    assert re.search(r"^1 +prefill +\d+\+1 ", picture, re.MULTILINE)
    used, shared, free = map(int, re.search(r"used (\d+), shared (\d+), free (\d+)", picture).groups())
    assert used + free == 40 and 0 < shared < used
    assert re.search(r"step 3 +\d+ tokens/s", picture)
    view.serve(engine, model.decode, console)
    assert not engine.busy and "done" in console.export_text()


@pytest.mark.parametrize("width", [120, 80, 60, 40, 35, 24])
def test_a_narrow_terminal_cuts_no_number(model, width):
    engine = make_engine(model, num_pages=40)
    submit(engine, model, STORY, STORY + " and the King", "The Cat", max_new_tokens=30, every=2)
    for _ in range(25):
        engine.step()
    console = Console(force_terminal=True, width=width, record=True, color_system=None)
    console.print(view.picture(engine, model.decode, width))
    picture = console.export_text()
    assert "…" not in picture
    assert all(len(line) <= width for line in picture.splitlines())
    for request in engine.requests:
        tokens = rf"{len(request.prompt)}\+{len(request.new_tokens)}"
        assert re.search(rf"^{request.number} .* {tokens} +{engine.num_pages_of(request)}\b", picture, re.MULTILINE)
    words = " ".join(picture.split())
    used, free = engine.num_used_pages, engine.cache.num_free_pages
    assert f"used {used}, shared {engine.cache.num_shared_pages}, free {free}" in words
    if width >= 60:
        assert model.decode(engine.requests[0].new_tokens)[-20:] in picture  # the newest text


def test_the_last_picture_still_tells_of_preemptions(model, monkeypatch):
    monkeypatch.setattr(view, "SECONDS_PER_FRAME", 0.0)
    engine = make_engine(model, num_pages=24)
    submit(engine, model, STORY, "The Cat", STORY + " and the King", "A Rabbit", max_new_tokens=20, every=1)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, record=True, color_system=None)
    view.serve(engine, model.decode, console)
    assert engine.stats.preemptions > 0
    last = console.export_text().rpartition("pool ")[2]
    assert f"preemptions {engine.stats.preemptions}" in last
