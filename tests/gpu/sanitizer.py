"""compute-sanitizer over a small set of every kernel, with CuPy's memory pools off.

    python tests/gpu/sanitizer.py

Runs memcheck, initcheck, synccheck and racecheck side by side and writes tests/gpu/sanitizer.json: card, date,
versions, hash of the sources, launches and reports of every kernel by tool, and the text of the reports. The exit
status is 1 where a tool reported anything. compute-sanitizer is looked for in PATH, in /usr/local/cuda and in the wheel
nvidia-cuda-sanitizer-api (13 or later: those before lack a part of it).
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = Path(__file__).with_suffix(".json")
TOOLS = {
    "memcheck": ("--report-api-errors", "no"),  # CuPy asks the driver for what may be missing
    "initcheck": (),
    "synccheck": (),
    "racecheck": ("--racecheck-report", "all"),
}
WORK = (sys.executable, "-m", "tests.gpu.sanitizer", "--work")
SECONDS = 120  # for one tool
REPORTS_KEPT = 20  # texts a tool


# -- what the tools watch ----------------------------------------------------------------------------------------------


def work() -> None:
    """Right and corrupted inputs for every operation, then attention in more shapes and dtypes; a line of JSON."""
    import cupy

    cupy.cuda.set_allocator(None)
    cupy.cuda.set_pinned_memory_allocator(None)
    import numpy as np

    from tests import cases, conftest
    from tests.gpu import answers, fuzz

    launches = fuzz.count_launches()
    for operation in fuzz.OPERATIONS.values():
        for seed in range(3):
            random = np.random.default_rng(seed)
            given = fuzz.right_input(random, 64)
            fuzz.run(operation, given, _NoCanaries())
            given = fuzz.corrupted(random, given, operation.corruptible)
            fuzz.assert_named(fuzz.run(operation, given, _NoCanaries()).faults, operation.faults(given))
    for case in (
        cases.Case("split", (900, 0, 17), num_qo_heads=8, head_dim=128, layout="HND", dtype="bfloat16"),
        cases.Case("unsplit", (40,) * 40, num_qo_heads=4, num_kv_heads=2, page_size=3),
        cases.Case("wide", (70, 33), num_qo_heads=10, head_dim=256, logits_soft_cap=5.0),
        cases.Case("speculative", (90, 33), num_qo_heads=24, q_len=4, window_left=20),
        cases.Case("prefill", (300, 33), q_lens=(140, 33), head_dim=128, dtype="bfloat16"),
        cases.Case("prefill_wide", (70, 9), q_lens=(40, 9), head_dim=256, logits_soft_cap=5.0, layout="HND"),
        cases.Case("prefill_window", (150, 3), q_lens=(90, 9), num_qo_heads=10, page_size=3, window_left=20),
    ):
        inputs = cases.build(case)
        answers.assert_right(inputs, *answers.answer(inputs))
    inputs = cases.build(cases.Case("prefill_long", (1500, 700), q_lens=(140, 33), head_dim=128))
    out = cupy.full(inputs.q.shape, cupy.nan, cupy.float16)  # initcheck does not see what TMA writes
    answers.assert_right(inputs, *answers.answer(inputs, out=out))
    card = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    evidence = {
        "card": card["name"].decode(),
        "versions": {
            "cupy": cupy.__version__,
            "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
            "driver": cupy.cuda.runtime.driverGetVersion(),
        },
        "source_hash": conftest.source_hash(),
        "launches": launches,
    }
    print(json.dumps(evidence))


class _NoCanaries:
    """The tools see more than canaries do."""

    def start(self) -> None: ...

    def check(self) -> None: ...


# -- the tools ---------------------------------------------------------------------------------------------------------


def find_sanitizer() -> str:
    if found := shutil.which("compute-sanitizer"):
        return found
    wheels = importlib.util.find_spec("nvidia")
    folders = list(wheels.submodule_search_locations or ()) if wheels else []
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    places += [place for folder in folders for place in Path(folder).glob("cu1*/bin/compute-sanitizer")]
    if not places:
        raise SystemExit('there is no compute-sanitizer; pip install "nvidia-cuda-sanitizer-api>=13"')
    return str(places[0])


def run_tool(sanitizer: str, tool: str) -> tuple[float, int, str, str]:
    """Seconds, exit status, the end of what the work printed, and the tool's log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = (sanitizer, "--tool", tool, *TOOLS[tool], "--log-file", str(log), *WORK)
        began = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
        text = log.read_text() if log.exists() else ""
        return time.perf_counter() - began, result.returncode, (result.stdout + result.stderr)[-2000:], text


def reports(log: str) -> list[str]:
    """The reports in a log: a line that begins one, and the indented lines behind it."""
    found: list[str] = []
    for line in log.splitlines():
        text = line.removeprefix("=========")
        if not line.startswith("=========") or not text.strip():
            continue
        if text.startswith("  ") and found:
            found[-1] += f"\n{text.rstrip()}"
        else:
            found.append(text.strip())
    return [report for report in found if not re.match(r"COMPUTE-SANITIZER|\w+ SUMMARY|LEAK SUMMARY", report)]


def summary(log: str) -> str | None:
    """The tool's own count of what it found; None where it did not come to its end."""
    found = re.search(r"\w+ SUMMARY: .*", log)
    return found[0] if found else None


def is_clean(summary: str | None) -> bool:
    nothing = r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)\s*"
    return summary is not None and re.fullmatch(nothing, summary) is not None


def by_kernel(found: Sequence[str], kernels: Sequence[str]) -> Counter[str]:
    """Reports of each kernel; of none of them: "elsewhere"."""
    counts: Counter[str] = Counter()
    for report in found:
        named = [kernel for kernel in kernels if re.search(rf"\b{kernel}\b\s*[(+]|in {kernel}\b", report)]
        counts[named[0] if named else "elsewhere"] += 1
    return counts


def main() -> int:
    sanitizer = find_sanitizer()
    version = subprocess.run((sanitizer, "--version"), capture_output=True, text=True, check=False).stdout
    # Without a tool first: it compiles the kernels for all of them, and gives the launches.
    plain = subprocess.run(WORK, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    if plain.returncode:
        raise SystemExit(f"the work fails without a tool:\n{plain.stderr[-2000:]}")
    evidence: dict[str, Any] = json.loads(plain.stdout.splitlines()[-1])
    evidence["versions"]["compute-sanitizer"] = re.findall(r"[Vv]ersion (\S+)", version)[-1:]
    launches: dict[str, int] = evidence.pop("launches")
    with ThreadPoolExecutor() as pool:
        results = dict(zip(TOOLS, pool.map(lambda tool: run_tool(sanitizer, tool), TOOLS), strict=True))
    tools: dict[str, Any] = {}
    counts: dict[str, dict[str, int]] = {kernel: {"launches": n} for kernel, n in sorted(launches.items())}
    clean = True
    for tool, (seconds, status, output, log) in results.items():
        found, said = reports(log), summary(log)
        kernels = by_kernel(found, list(launches))
        for kernel in (*launches, *({"elsewhere"} & set(kernels))):
            counts.setdefault(kernel, {})[tool] = kernels[kernel]
        tools[tool] = {"seconds": round(seconds, 1), "exit_status": status, "summary": said}
        if found or status:
            tools[tool] |= {"reports": found[:REPORTS_KEPT], "output": output}
        clean &= is_clean(said) and not status and not found
        print(f"{tool:10} {seconds:6.1f} s  exit status {status}  {said}")
    evidence |= {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "command": "python tests/gpu/sanitizer.py",
        "clean": clean,
        "tools": tools,
        "kernels": counts,
    }
    EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n")
    print(f"{'clean' if clean else 'NOT clean'}; written to {EVIDENCE.relative_to(ROOT)}")
    return int(not clean)


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        raise SystemExit(main())
