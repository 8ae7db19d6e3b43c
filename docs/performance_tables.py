"""The tables of performance.md, from records of costs."""

from __future__ import annotations

from typing import Any

from results_tables import record_of, recorded

BEDS = ("demo-8", "MiniLM's shapes")


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


def merge_speed() -> list[str]:
    """Merges beside mergekit and beside a copy: a table for each size of models that was measured."""
    lines = []
    for record in recorded("costs", "cost"):
        if record["name"].startswith("merge speed,"):
            lines += _speeds(record)
    return lines


def _speeds(record: dict[str, Any]) -> list[str]:
    size = record["bytes_per_model"] / 1e9
    lines = [
        f"Models of {size:.2f} GB in bfloat16, one thread, seconds of the processor and, behind the stroke, of the clock:",
        "",
        "| method | copy | adarank | mergekit | adarank over mergekit | adarank, MB | mergekit, MB | apart in float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [*lines, *(_speed(method, of) for method, of in record["methods"].items()), ""]


def _speed(method: str, measured: dict[str, Any]) -> str:
    tools = [measured[tool] for tool in ("copy", "adarank", "mergekit")]
    times = [f"{_spread(tool['processor'])} / {_spread(tool['seconds'])}" for tool in tools]
    ours, theirs = tools[1:]
    ratios = [f"{ours[key]['median'] / theirs[key]['median']:.2f}" for key in ("processor", "seconds")]
    memory = [f"{tool['anonymous']['median'] / 1e6:.0f}" for tool in (ours, theirs)]
    apart = (
        f"{measured['difference']['max_relative_difference']:.0e}" if "difference" in measured else "draws at random"
    )
    return f"| {' | '.join([f'`{method}`', *times, ' / '.join(ratios), *memory, apart])} |"


def _spread(of: dict[str, float]) -> str:
    return f"{of['median']:.1f} ({of['min']:.1f}-{of['max']:.1f})"


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
