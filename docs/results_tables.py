"""The tables and the picture of results.md and the README, from the records of both test beds."""

from __future__ import annotations

import statistics
from functools import cache
from itertools import takewhile
from typing import Any

from records import FOLDER, Record, Records

from adarank.recipe.reader import load_recipe
from adarank.workflow.demo import ZOO

TASKS = {
    "minilm-8": ["cola", "sst2", "mrpc", "mnli", "qnli", "agnews", "trec", "tweet_emotion"],
    "demo-8": ["mnist", "fashion_mnist", "kannada_mnist", "chars74k_fnt", "mnist_m", "usps", "gtsrb", "cifar10"],
}
ROWS = [
    "base", "weight average", "TA", "SVD_k", "TIES", "DARE+TA", "DARE+TIES", "Consensus-TA", "Consensus-TIES",
    "Breadcrumbs", "DELLA", "SCE", "Model Stock", "STAR", "TSV-M", "Iso-C", "Iso-CTS", "SVC", "DC-Merge", "WUDI",
    "SWUDI", "ACTMat", "CART", "CART, energy", "Fisher", "Fisher, empirical", "RegMean", "RegMean++", "FeatCal",
    "FeatCal, from the average", "ESM", "AdaMerging, task-wise", "AdaMerging", "AdaMerging++", "TA+AdaRank",
    "CART++", "CART+AdaRank", "AdaRank about the base", "TSV-M+AdaRank", "Iso-C+AdaRank", "Iso-CTS+AdaRank",
    "TSV-M+AdaRank, soft masks", "SyMerge", "SAMerging", "ProDistill", "AdaRank, binary masks", "AdaRank, by block",
    "AdaRank", "AdaRank, 32 inputs a step",
    "multi-task training", "experts",
]  # fmt: skip
TASK_AWARE = ["TALL-masks", "EMR", "TSV-C", "CART-indexing", "TA+Surgery", "WEMoE, entropy", "WEMoE", "Twin-Merging"]
HEAD = ["base", "weight average", "TA", "TIES", "CART", "AdaMerging", "CART++", "TA+AdaRank", "CART+AdaRank",
        "AdaRank, binary masks", "FeatCal", "SyMerge", "SAMerging", "ProDistill", "AdaRank", "experts"]  # fmt: skip


def flat(values: dict[str, Any]) -> str:
    """Settings in a line."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


@cache
def recorded(subject: str, kind: str) -> list[Record]:
    """All records of a kind."""
    return Records(FOLDER / f"{subject}.jsonl").find(kind=kind)


def load(bed: str, row: str, kind: str = "row") -> list[Record]:
    """The records of one row, by seed: with the experts' heads, or of the kind "learned heads"."""
    return sorted((r for r in recorded(bed, kind) if r["name"] == row), key=lambda r: r["seed"])


def record_of(subject: str, kind: str, name: str) -> Record:
    return next(record for record in recorded(subject, kind) if record["name"] == name)


def table(bed: str, rows: list[str], costs: bool = False) -> list[str]:
    """Mean over seeds, and ± the sample standard deviation of the mean score where there are several.

    "gap" is the share of the way from the weight average to the experts; "learned heads" the mean where heads were learned
    too, empty where there is no record of that, left out if no row has one. All else is with the experts' heads.

    Arguments:
        costs: with the seconds and the peak memory of each row's merge.
    """
    tasks = TASKS[bed]
    experts, average = (load(bed, row)[0] for row in ("experts", "weight average"))
    more = ["s", "GB"] if costs else []
    learned = {row: records for row in rows if (records := load(bed, row, "learned heads"))}
    column = ["learned heads"] if learned else []
    names = ["", "mean", "norm.", "gap", *column, *tasks, *more, "seeds"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        records = load(bed, row)
        if not records:
            continue
        means = [_spread(learned[row]) if row in learned else ""] if learned else []
        lines.append(_row(bed, row, records, [_gap(records, average, experts), *means], costs))
    return lines


def short_table(bed: str, rows: list[str]) -> list[str]:
    """The README's table, six columns: mean scores with the experts' heads and with learned ones.

    What follows is with learned heads: the share of the way from the weight average with the experts' heads to the experts, and
    the task that keeps least of its expert's score.
    """
    experts, average = (load(bed, row)[0] for row in ("experts", "weight average"))
    lines = [
        "| method | experts' heads | learned heads | gap closed | weakest task: score of expert's | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for row in [row for row in rows if load(bed, row)]:
        records, wide = load(bed, row), experts["scores"]
        learned = load(bed, row, "learned heads")
        scores = _scores(bed, learned) if learned else {}
        weakest = min(scores, key=lambda task: scores[task] / wide[task], default="")
        cells = [_spread(records), *(
            [_spread(learned), _gap(learned, average, experts), f"{weakest}: {scores[weakest]:.1f} of {wide[weakest]:.1f}"]
            if learned else ["", "100%" if row == "experts" else "", ""]
        ), _seeds(records, learned)]  # fmt: skip
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def _seeds(records: list[Record], learned: list[Record]) -> str:
    """How many seeds a row has; with the experts' heads and with learned ones where that differs."""
    return f"{len(records)}; {len(learned)}" if learned and len(learned) != len(records) else str(len(records))


def _row(bed: str, row: str, records: list[dict[str, Any]], more: list[str], costs: bool) -> str:
    """A row's line: mean over seeds ± the sample standard deviation, normalised mean, `more`, each task's mean, costs, seeds."""
    scores = _scores(bed, records)
    cells = [_spread(records), _normalised(bed, scores), *more, *(f"{score:.1f}" for score in scores.values())]
    return f"| {row} | " + " | ".join([*cells, *(_cost(records) if costs else ()), str(len(records))]) + " |"


def _scores(bed: str, records: list[dict[str, Any]]) -> dict[str, float]:
    """task -> mean score over seeds."""
    return {task: statistics.mean(r["scores"][task] for r in records) for task in TASKS[bed]}


def _normalised(bed: str, scores: dict[str, float]) -> str:
    """The mean over tasks of score ÷ expert's score, in per cent."""
    experts = load(bed, "experts")[0]["scores"]
    return f"{100 * statistics.mean(scores[task] / experts[task] for task in scores):.1f}"


def _gap(records: list[dict[str, Any]], average: Record, experts: Record) -> str:
    """The share of the way from the weight average to the experts."""
    mean = statistics.mean(r["mean"] for r in records)
    return f"{round(100 * (mean - average['mean']) / (experts['mean'] - average['mean']))}%"


def first_run() -> list[str]:
    """How long `adarank demo` took, on what, and the means that it came to."""
    demo, quick = (record_of("demo-8", "demo", name) for name in ("whole", "quick"))
    machine = demo["machine"]
    rows = takewhile(lambda line: not line.startswith("inputs"), demo["shown"][2:])
    means = {line.split()[0]: line.split()[1] for line in rows}
    default = load("demo-8", "AdaRank", "learned heads")
    taken, whole = load_recipe(ZOO / "recipe.yaml").method().settings.steps, default[0]["settings"]["adapt"]["steps"]
    return [
        f"- **Time**: the set-up, which depends on your connection, and then {demo['seconds']:.0f} s, or {quick['seconds']:.0f} s with `--quick`. That was on",
        f"  {machine['cores']} CPU cores ({machine['system']}, PyTorch {demo['versions']['torch']}), with {demo['peak_resident_bytes'] / 1e9:.1f} GB of memory at the peak.",
        f"- **Result**: a table of scores. Mean accuracy is {means['base']} for the base, {means['average']} for the average of the experts' weights,",
        f"  {means['AdaRank']} for AdaRank's merged model, and {means['experts']} for the experts, each on its own task.",
        f"- **{means['AdaRank']} here, {_spread(default)} [below](#results)**: the demo takes {taken} steps, with one seed, to be done sooner;",
        f"  the figure below is of {whole} steps, and the mean over {len(default)} seeds. Both have learned heads.",
    ]


def _spread(records: list[dict[str, Any]]) -> str:
    """The mean of the mean scores, and ± their sample standard deviation where there are several."""
    means = [r["mean"] for r in records]
    return f"{statistics.mean(means):.1f}" + (f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else "")


def _cost(records: list[dict[str, Any]]) -> tuple[str, str]:
    """Median seconds and greatest peak memory of the merges; empty where a record has none."""
    seconds = [r["merge_seconds"] for r in records if "merge_seconds" in r]
    peaks = [r["peak_resident_bytes"] for r in records if "peak_resident_bytes" in r]
    spent = statistics.median(seconds) if seconds else None
    told = "" if spent is None else f"{spent:.3g}" if spent < 1000 else f"{spent:.0f}"
    return told, f"{max(peaks) / 1e9:.1f}" if peaks else ""


def task_aware(bed: str) -> list[str]:
    """Rows whose every task has weights of its own, with their size; nothing before they have records."""
    found = {row: records for row in TASK_AWARE if (records := load(bed, row))}
    if not found:
        return []
    names = ["", "mean", "norm.", "of the experts' size", "× one model", *TASKS[bed], "s", "GB", "seeds"]
    lines = [
        "### Task-aware methods",
        "",
        "Each task is scored by weights of its own, from one bundle. The task of every test input is known, so these rows do not compare",
        "with those above. WEMoE and Twin-Merging use the task for the head alone: a router merges their weights for each input. Sizes are",
        "of all weights, heads included, relative to all experts whole and to one network.",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
    ]
    for row, records in found.items():
        size = records[0]["bytes"]
        sizes = [f"{100 * size['bundle'] / size['experts']:.0f}%", f"{size['bundle'] / size['one']:.1f}"]
        lines.append(_row(bed, row, records, sizes, True))
    return [*lines, ""]


def ablation(bed: str) -> list[str]:
    """The paper's Table 4, and random masks of the learned density."""
    lines = ["| learned | about the base (TA) | about the average (CART) |", "|---|---|---|"]
    variants = {
        "nothing": ("TA", "CART"),
        "λ": ("AdaMerging", "CART++"),
        "masks": ("TA+AdaRank, masks only", "CART+AdaRank, masks only"),
        "λ and masks": ("TA+AdaRank", "CART+AdaRank"),
        "λ; masks of the learned density in random places": ("TA+AdaRank, random masks", "CART+AdaRank, random masks"),
    }
    for label, rows in variants.items():
        lines.append(f"| {label} | " + " | ".join(_mean(bed, row) for row in rows) + " |")
    return lines


def heads_masks_lambda(bed: str) -> list[str]:
    """AdaRank's default with each of masks, λ and heads learned or not: seed 0 of every cell."""
    lines = ["| learned without labels | experts' heads | learned heads |", "|---|---|---|"]
    variants = {"nothing: the start": "AdaRank's start", "λ": "AdaRank, λ alone", "masks": "AdaRank, masks alone",
                "masks and λ: the default": "AdaRank"}  # fmt: skip
    for label, row in variants.items():
        cells = [[r for r in load(bed, row, kind) if r["seed"] == 0] for kind in ("row", "learned heads")]
        lines.append(f"| {label} | " + " | ".join(f"{of[0]['mean']:.1f}" if of else "not run" for of in cells) + " |")
    return lines


def _mean(bed: str, row: str) -> str:
    records = load(bed, row)
    return _spread(records) + (f" ({len(records)} seeds)" if len(records) > 1 else "") if records else "not run"


def settings(bed: str) -> list[str]:
    """What each row ran with."""
    lines = ["| row | settings | merge, s |", "|---|---|---|"]
    for row in [*ROWS, "TA+AdaRank, masks only", "CART+AdaRank, masks only"]:
        for record in load(bed, row)[:1]:
            given = record["settings"]
            parts = [flat({k: v for k, v in given.get("parameters", {}).items() if v is not None})]
            if "adapt" in given:
                keys = ("objective", "steps", "batch_size", "lr_masks", "lr_lambda")
                parts.append(flat({k: given["adapt"][k] for k in keys if k in given["adapt"]}))
            lines.append(
                f"| {row} | {'; '.join(p for p in parts if p) or given.get('what', 'none')} | {record.get('merge_seconds', '')} |"
            )
    return lines


def collapse(bed: str) -> list[str]:
    """Share of the most frequent prediction on unlabelled inputs, before and after adaptation."""
    lines = [
        "| row | " + " | ".join(TASKS[bed]) + " | components kept | called collapsed |",
        "|---" * (len(TASKS[bed]) + 3) + "|",
    ]
    for row in [
        "AdaMerging, task-wise",
        "AdaMerging",
        "AdaMerging++",
        "TA+AdaRank",
        "CART++",
        "CART+AdaRank",
        "AdaRank",
        "TA+AdaRank, masks only",
        "CART+AdaRank, masks only",
    ]:
        for record in load(bed, row)[:1]:
            found = record["adaptation"]
            seen = found["largest_class_share"]
            shares = dict(zip(record["scores"], zip(seen["before"], seen["after"], strict=True), strict=True))
            cells = [f"{100 * shares[t][0]:.0f} → {100 * shares[t][1]:.0f}" for t in TASKS[bed]]
            lines.append(
                f"| {row} | "
                + " | ".join(cells)
                + f" | {100 * found['components_kept']:.1f}% | {', '.join(found['collapsed']) or 'none'} |"
            )
    return lines


def costs() -> list[str]:
    """Adaptation steps beside plain autograd, peaks of data-free merges, and agreement with mergekit."""
    step = record_of("costs", "cost", "step")
    lines = [
        "| one step, all eight tasks | engine, s | plain autograd, s | time ratio (min to max) | peak memory ratio |",
        "|---|---|---|---|---|",
    ]
    for start in ("CART", "TA"):
        found, ratio = step[start], step[start]["autograd_over_engine"]
        own, other = (found["seconds"][side]["median"] for side in ("engine", "autograd"))
        lines.append(
            f"| {start} start | {own:.2f} | {other:.2f} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |"
            f" {found['peak_autograd_over_engine']:.2f} |"
        )
    memory = record_of("costs", "cost", "merge memory, float32")
    size = memory["settings"]["bytes_per_model"] / 1e9
    lines += [
        "",
        f"| merge of a base and three experts of {size:.2f} GB | peak anonymous memory, MB | predicted, MB |",
        "|---|---|---|",
    ]
    for method, found in memory["methods"].items():
        layers = (
            ""
            if found["layers"] == memory["settings"]["layers"]
            else f" ({found['layers']} of {memory['settings']['layers']} layers)"
        )
        lines.append(
            f"| {method}{layers} | {found['peak_anonymous']['max'] / 1e6:.0f} | {found['peak_predicted'] / 1e6:.0f} |"
        )
    return lines


CHART = ["base", "weight average", "TA", "CART", "AdaMerging", "CART+AdaRank", "AdaRank", "experts"]


def chart() -> str:
    """demo-8 as a picture: a bar for each model's mean accuracy, a dot for each task's."""
    rows = [row for row in CHART if load("demo-8", row)]
    left, width, step, top = 190, 500, 30, 34
    height = top + step * len(rows) + 28
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{left + width + 60}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="18" fill="#333">accuracy on eight image tasks, %: bar = mean, dot = one task</text>',
    ]
    bottom = top + step * len(rows)
    for tick in range(0, 101, 20):
        x = left + width * tick / 100
        parts.append(f'<line x1="{x:g}" y1="{top}" x2="{x:g}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:g}" y="{bottom + 18}" fill="#666" text-anchor="middle">{tick}</text>')
    for number, row in enumerate(rows):
        records = load("demo-8", row)
        mean = statistics.mean(r["mean"] for r in records)
        y = top + step * number
        colour = "#9aa5b1" if row in ("base", "experts") else "#4c78a8" if "AdaRank" not in row else "#e4572e"
        parts.append(f'<text x="{left - 8}" y="{y + 19}" fill="#333" text-anchor="end">{row}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 6}" width="{width * mean / 100:.1f}" height="{step - 12}" fill="{colour}"/>'
        )
        for task in TASKS["demo-8"]:
            x = left + width * statistics.mean(r["scores"][task] for r in records) / 100
            parts.append(f'<circle cx="{x:.1f}" cy="{y + step / 2:g}" r="3" fill="#222" fill-opacity="0.55"/>')
        parts.append(f'<text x="{left + width + 8}" y="{y + 19}" fill="#333">{mean:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
