"""The tables of performance.md, from records of costs."""

from __future__ import annotations

from statistics import median
from typing import Any

from results_tables import record_of, recorded

BEDS = ("demo-8", "MiniLM's shapes")
STARTS = ("CART", "TA")
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
TOOLS = ("copy", "adarank", "mergekit")


def step_parts() -> list[str]:
    """What a step takes beside the networks alone."""
    record = record_of("costs", "cost", "step parts")
    lines = [
        "| bed, precision of products | networks, s | compose, s | pull back, s | step over networks |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        _row(bed, record[bed], precision) for bed in BEDS if bed in record for precision in ("float32", "bfloat16")
    ]


def step_vs_autograd() -> list[str]:
    """Steps with soft masks beside the same steps by plain autograd."""
    rows = []
    for record in recorded("costs", "cost"):
        if record["name"].startswith("step soft"):
            precision = record["name"].removeprefix("step soft").strip() or "float32"
            rows += [_beside(f"{start}, {precision}", record[start]) for start in STARTS if start in record]
    if not rows:
        return []
    return [
        "Beside plain autograd of the same formula (`benchmarks/step_vs_autograd.py`, soft masks, minilm-8's models and texts, batches of 16):",
        "",
        "| start, precision of products | step, s | autograd, s | autograd over step | step over networks | peak memory (beyond what was loaded), MB | autograd's |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _beside(label: str, measured: dict[str, Any]) -> str:
    seconds = [f"{measured['seconds'][side]['median']:.2f}" for side in ("engine", "autograd")]
    ratios = [
        f"{of['median']:.2f} ({of['min']:.2f}-{of['max']:.2f})"
        for of in (measured["autograd_over_engine"], measured["engine_over_networks"])
    ]
    memory = [measured["memory_bytes"][side] for side in ("engine", "autograd")]
    peaks = [f"{of['peak_in_steps'] / 1e6:.0f} ({(of['peak_in_steps'] - of['loaded']) / 1e6:.0f})" for of in memory]
    return f"| {' | '.join([label, *seconds, *ratios, *peaks])} |"


def merge_speed() -> list[str]:
    """Merges beside mergekit and beside a copy: a table for each size of models that was measured."""
    lines = []
    for record in recorded("costs", "cost"):
        if record["name"].startswith("merge speed,"):
            lines += _speeds(record)
    return lines


def _speeds(record: dict[str, Any]) -> list[str]:
    size, turns = record["bytes_per_model"] / 1e9, len(next(iter(record["methods"].values()))["copy"]["seconds"])
    lines = [
        f"Models of {size:.2f} GB in bfloat16, one thread, {'one turn' if turns == 1 else f'{turns} turns'}: seconds of the processor / of the clock, medians; ratios within a turn:",
        "",
        "| method | copy | adarank | mergekit | processor: adarank over mergekit | clock | adarank, MB | mergekit, MB | apart in float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return [*lines, *(_speed(method, of) for method, of in record["methods"].items()), ""]


def _speed(method: str, measured: dict[str, Any]) -> str:
    ours, theirs = measured["adarank"], measured["mergekit"]
    times = [f"{median(measured[t]['processor']):.1f} / {median(measured[t]['seconds']):.1f}" for t in TOOLS]
    ratios = [
        _spread([a / b for a, b in zip(ours[key], theirs[key], strict=True)])  # of the same turn
        for key in ("processor", "seconds")
    ]
    memory = [f"{median(tool['anonymous']) / 1e6:.0f}" for tool in (ours, theirs)]
    return f"| {' | '.join([f'`{method}`', *times, *ratios, *memory, _apart(method, measured)])} |"


def _apart(method: str, measured: dict[str, Any]) -> str:
    if "apart" not in measured:
        return "draws at random" if method in RANDOM else ""
    exact = measured.get("from_float64", {})
    said = ", ".join(f"{tool} {far:.0e}" for tool, far in exact.items())
    return f"{measured['apart']:.0e}" + (f" (from float64: {said})" if exact else "")


def _spread(of: list[float]) -> str:
    return f"{median(of):.2f}" + (f" ({min(of):.2f}-{max(of):.2f})" if len(of) > 1 else "")


def merge_memory() -> list[str]:
    """Peaks of anonymous memory beside what `plan` predicts."""
    rows = []
    for record in recorded("costs", "cost"):
        if record["name"].startswith("merge memory"):
            kind = record["name"].removeprefix("merge memory, ")
            measured = {m: of for m, of in record["methods"].items() if "predicted_over_measured" in of}
            rows += [_memory(kind, method, of) for method, of in measured.items()]
    if not rows:
        return []
    return [
        "Measured:",
        "",
        "| models | method | peak anonymous memory, MB | predicted, MB | predicted over measured |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _memory(kind: str, method: str, measured: dict[str, Any]) -> str:
    peak, predicted = measured["peak_anonymous"]["max"] / 1e6, measured["peak_predicted"] / 1e6
    return f"| {kind} | `{method}` | {peak:.0f} | {predicted:.0f} | {predicted / peak:.2f} |"


def _row(bed: str, found: dict[str, Any], precision: str) -> str:
    names = ("networks", f"compose, {precision}", f"pull back, {precision}")
    cells = [
        f"{found['seconds'][n]:.3f} ({found['least_and_most'][n][0]:.3f}-{found['least_and_most'][n][1]:.3f})"
        for n in names
    ]
    return f"| {bed}, {precision} | {' | '.join(cells)} | {found['step_over_networks'][precision]:.2f} |"
