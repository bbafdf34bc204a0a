"""Runs a module in a process of its own, where a fault or an endless loop of a kernel can do no harm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: Any, seconds: float) -> dict[str, Any]:
    """The last line that `python -m module arguments` prints, as JSON.

    The module prints a line before whatever may go wrong. Where it does, the last line is in the AssertionError, with
    how the process ended (a negative number is the signal that ended it).
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as expired:
        raise AssertionError(f"no end after {seconds} s, at {_last_line(expired.stdout)}") from expired
    assert result.returncode == 0, (
        f"exit status {result.returncode} at {_last_line(result.stdout)}\n{result.stderr[-2000:]}"
    )
    return json.loads(_last_line(result.stdout))


def _last_line(output: str | bytes | None) -> str:
    """The last whole line; of a process that was ended, the output comes as bytes."""
    text = output.decode() if isinstance(output, bytes) else output or ""
    return text[: text.rfind("\n")].rpartition("\n")[2] or "its beginning"
