"""A short run of the fuzzers in `benchmarks/fuzz.py`: whatever is in a file, the answer is a result or a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FUZZ), *arguments], capture_output=True, text=True, check=False)


def test_odd_files_end_in_a_result_or_a_sentence(tmp_path: Path) -> None:
    done = fuzz("--count", "224", "--seed", "7", "--log", str(tmp_path / "failures.jsonl"))
    assert done.returncode == 0, done.stdout
    assert "224 cases, 0 failures" in done.stdout
    assert not (tmp_path / "failures.jsonl").exists()


def test_the_fuzzers_notice_what_they_are_to_find(tmp_path: Path) -> None:
    """Run against readers that raise what is no sentence, or make a file that is not theirs."""
    script = f"""
import sys, runpy
from pathlib import Path
import adarank.recipe.job
calls, align = [], adarank.recipe.job.align
def broken(*given, **named):
    calls.append(1)
    if len(calls) % 2:
        raise TypeError("not a sentence")
    Path("stray").touch()
    return align(*given, **named)
adarank.recipe.job.align = broken
sys.argv = ["fuzz.py", "--count", "24", "--only", "recipes"]
sys.path.insert(0, {str(FUZZ.parent)!r})
runpy.run_path({str(FUZZ)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TypeError: not a sentence" in done.stdout
    assert "touched" in done.stdout


@pytest.mark.slow
def test_ten_thousand_odd_files_end_in_a_result_or_a_sentence() -> None:
    done = fuzz("--count", "10000")
    assert done.returncode == 0, done.stdout
