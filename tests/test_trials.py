"""What comments cite as "(trial N)" is an entry of bench/trials.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^### (\d+)\. \S", re.MULTILINE)
CITED = re.compile(r"\btrials? (\d+(?:(?:, | and )\d+)*)", re.IGNORECASE)


def test_cited_trials_are_written_down() -> None:
    entries = ENTRY.findall((ROOT / "bench/trials.md").read_text(encoding="utf-8"))
    assert len(entries) == len(set(entries)), "a number is given twice"
    sources = [path for folder in ("bench", "kernels", "paged_attn") for path in (ROOT / folder).rglob("*.*")]
    texts = [path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".cu", ".cuh", ".md")]
    cited = {number for text in texts for group in CITED.findall(text) for number in re.findall(r"\d+", group)}
    assert cited, "nothing cites a trial"
    assert cited <= set(entries), f"cited and not written down: {sorted(cited - set(entries), key=int)}"
