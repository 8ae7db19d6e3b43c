"""What a command that was interrupted left behind, in sentences: what is kept, and what the same command does next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adarank.io.lock import resolved

_ANEW = "the same command starts from the beginning"


def state_of(out: Path) -> Path:
    """The folder beside an output in which a merge keeps what it goes on from."""
    return out.parent / f".{out.name}.state"


def state_of_search(best: Path) -> Path:
    """The folder beside the best recipe in which a search keeps the points that are done."""
    return best.parent / f".{best.stem}.search"


def state_of_analysis(out: Path) -> Path:
    """The folder beside an analysis' files in which the parts that are done are kept."""
    return out.parent / f".{out.name}.analysis"


def of_merge(out: Path) -> str:
    """After a merge."""
    state = state_of(resolved(out))
    kept = [name for name in _kept(state) if name.endswith(".pt")]
    untouched = f"Nothing was written to {out}"
    if not kept:
        return f"{untouched}, and nothing is kept: {_ANEW}."
    what = "the last saved step" if "state.pt" in kept else "what was computed of the experts"
    return f"{untouched}. {what[0].upper()}{what[1:]} is kept in {state}: the same command goes on from there."


def of_search(best: Path) -> str:
    """After a search."""
    state = state_of_search(resolved(best))
    runs = [
        folder for folder in state.glob("*") if folder.is_dir()
    ]  # of other inputs or recipes, too: the last is this one
    latest = max(runs, key=lambda folder: folder.stat().st_mtime, default=state)
    points = sum(1 for _ in latest.glob("*.json"))
    if not points:
        return f"{best} was not written, and no point was finished: {_ANEW}."
    return f"{best} was not written. {points} finished point(s) are kept: the same command goes on with the others."


def of_analysis(out: Path) -> str:
    """After an analysis."""
    state = state_of_analysis(resolved(out))
    parts = max((len(kept.read_bytes().splitlines()) for kept in state.glob("*/parts.jsonl")), default=0)
    if not parts:
        return f"Nothing was written to {out}, and no part was finished: {_ANEW}."
    return f"Nothing was written to {out}. {parts} finished part(s) are kept: the same command goes on with the others."


def of_demo(out: Path) -> str:
    """After the demo, whose rows but the last are kept nowhere."""
    if not any(name == "state.pt" for name in _kept(state_of(resolved(out)))):
        return f"Nothing was written to {out}, and nothing is kept: {_ANEW}."
    return (
        f"Nothing was written to {out}. The last saved step of AdaRank's adaptation is kept: the same command computes the other "
        "rows again, and goes on from that step."
    )


def _kept(state: Path) -> Iterator[str]:
    """Names of all files of a state."""
    return (file.name for file in state.rglob("*") if file.is_file())
