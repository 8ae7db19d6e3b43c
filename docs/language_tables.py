"""The tables of lm-4 in results.md, from its records."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from records import FOLDER, Record, Records

FILE = FOLDER / "lm-4.jsonl"
ROWS = [
    "base",
    "average",
    "task arithmetic",
    "TIES",
    "DARE",
    "TSV-M",
    "WUDI",
    "CART",
    "AdaRank by entropy",
    "AdaRank by entropy, about the average",
    "AdaRank about the average",
    "AdaRank",
    "AdaRank, 450 steps",
    "AdaRank block by block, about the average",
    "AdaRank block by block",
    "experts",
]


def language_table(lora: bool, file: Path = FILE) -> list[str]:
    """Perplexity and next-token accuracy of each domain, exact answers of arithmetic, and the shares of the way to the experts.

    Where a row has several seeds it is their mean; "log ppl" is the mean over the domains of the logarithm of the perplexity,
    with ± its sample standard deviation over seeds; "gap" the share of the way from the base to the experts.

    Arguments:
        lora: of the adapters as experts, else of the whole models.
    """
    prefix = "lora: " if lora else ""
    recorded = Records(file).find(kind="language row")
    names = {row: row if row == "base" else prefix + row for row in ROWS}
    by_row = {row: [record for record in recorded if record["name"] == name] for row, name in names.items()}
    rows = {row: records for row, records in by_row.items() if records}
    if "experts" not in rows:
        return ["(not run)"]
    domains = next(iter(rows.values()))[0]["domains"]
    heading = ["", "log ppl", "gap", *(f"{d} ppl" for d in domains), *(f"{d} token" for d in domains), "exact", "seeds"]
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    start, end = (statistics.mean(map(_mean_log, rows[row])) for row in ("base", "experts"))
    for row, records in rows.items():
        logs = [_mean_log(record) for record in records]
        spread = f" ± {statistics.stdev(logs):.3f}" if len(logs) > 1 else ""
        gap = 100 * (start - statistics.mean(logs)) / (start - end)
        cells = [f"{statistics.mean(logs):.3f}{spread}", f"{gap:.0f}%"]
        cells += [f"{value:.2f}" for value in _means(records, "perplexity")]
        cells += [f"{value:.1f}" for value in _means(records, "token_accuracy")]
        exact = statistics.mean(record["exact_match"] for record in records)
        lines.append(f"| {row} | " + " | ".join([*cells, f"{exact:.1f}", str(len(records))]) + " |")
    return lines


def _mean_log(record: Record) -> float:
    return statistics.mean(math.log(value) for value in record["perplexity"])


def _means(records: list[Record], name: str) -> list[float]:
    """Means over seeds, domain by domain."""
    return [statistics.mean(values) for values in zip(*(record[name] for record in records), strict=True)]
