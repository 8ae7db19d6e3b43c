"""The tables of performance.md, from records of costs."""

from __future__ import annotations

from typing import Any

from results_tables import record_of

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


def _row(bed: str, found: dict[str, Any], precision: str) -> str:
    names = ("networks", f"compose, {precision}", f"pull back, {precision}")
    cells = [
        f"{found['seconds'][n]:.3f} ({found['least_and_most'][n][0]:.3f}-{found['least_and_most'][n][1]:.3f})"
        for n in names
    ]
    return f"| {bed}, {precision} | {' | '.join(cells)} | {found['step_over_networks'][precision]:.2f} |"
