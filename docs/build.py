"""Write the generated pages: methods.md from the methods, cli.md from --help, results.md and the README's table from records.

python docs/build.py            # write
python docs/build.py --check    # say what is out of date, exit 1
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import adaptation_tables

from adarank.catalogue import catalogue, presets
from adarank.cli.main import parser

ROOT = Path(__file__).resolve().parent.parent
TASKS = {
    "minilm-8": ["cola", "sst2", "mrpc", "mnli", "qnli", "agnews", "trec", "tweet_emotion"],
    "demo-8": ["mnist", "fashion_mnist", "kannada_mnist", "chars74k_fnt", "mnist_m", "usps", "gtsrb", "cifar10"],
}
ROWS = [
    "base",
    "weight average",
    "TA",
    "SVD_k",
    "TIES",
    "DARE+TA",
    "DARE+TIES",
    "Consensus-TA",
    "Consensus-TIES",
    "Breadcrumbs",
    "Model Stock",
    "STAR",
    "TSV-M",
    "Iso-C",
    "Iso-CTS",
    "CART",
    "CART, energy",
    "Fisher",
    "RegMean",
    "RegMean++",
    "AdaMerging, task-wise",
    "AdaMerging",
    "AdaMerging++",
    "TA+AdaRank",
    "CART++",
    "CART+AdaRank",
    "AdaRank about the base",
    "TSV-M+AdaRank",
    "Iso-C+AdaRank",
    "Iso-CTS+AdaRank",
    "AdaRank",
    "experts",
]
TASK_AWARE = ["TALL-masks", "EMR", "TSV-C", "CART-indexing"]
HEAD = ["base", "weight average", "TA", "TIES", "CART", "AdaMerging", "CART++", "TA+AdaRank", "CART+AdaRank",
        "AdaRank", "experts"]  # fmt: skip


def methods_page() -> str:
    """Formula, needs, settings and source of every method, and the presets."""
    lines = [
        "# Methods",
        "",
        "Generated from the methods themselves. τ_t = W_t - W₀ is a task vector, W̄ the experts' mean.",
        "",
    ]
    for entry in catalogue().values():
        lines += [
            f"## {entry.name}",
            "",
            entry.summary,
            "",
            f"    {entry.formula}",
            "",
            f"Needs {entry.needs}. Source: {entry.source}.",
            "",
        ]
        own = [s for s in entry.settings if not s.name.startswith("adapt.")]
        if own:
            lines += ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
            lines += [f"| `{s.name}` | {s.default} | {s.allowed} | {s.meaning} |" for s in own] + [""]
    loop = [s for s in catalogue()["adarank"].settings if s.name.startswith("adapt.")]
    lines += [
        "## The adapt block",
        "",
        "Settings of every method that adapts.",
        "",
        "| setting | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{s.name.removeprefix('adapt.')}` | {s.default} | {s.allowed} | {s.meaning} |" for s in loop]
    lines += [
        "",
        "## Presets",
        "",
        "`adapt: {preset: NAME}`: the settings released with the papers.",
        "",
        "| preset | parameters | adapt |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {_flat(preset['parameters'])} | {_flat(preset['adapt'])} |" for name, preset in presets().items()
    ]
    return "\n".join(lines) + "\n"


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def cli_page() -> str:
    """Every command's --help."""
    os.environ["COLUMNS"] = "100"
    top = parser()
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    parts = ["# The command line\n\nGenerated from `--help`. Results go to stdout, progress to stderr. Exit codes: 0 done, 1 an error that the message"
             " explains, 2 wrong usage, 130 interrupted.\n"]  # fmt: skip
    for name, command in {"": top, **commands}.items():
        parts.append(f"## adarank {name}".rstrip() + f"\n\n```text\n{command.format_help()}```\n")
    return "\n".join(parts)


def load(bed: str, row: str) -> list[dict[str, Any]]:
    """The records of one row, by seed."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "records" / bed).glob("*-seed*.json"))]
    return sorted((r for r in found if r["row"] == row), key=lambda r: r["seed"])


def table(bed: str, rows: list[str]) -> list[str]:
    """Mean over seeds, and ± the sample standard deviation of the mean score where there are several.

    "gap" is the share of the way from the weight average to the experts.
    """
    tasks = TASKS[bed]
    experts, average = (load(bed, row)[0] for row in ("experts", "weight average"))
    lines = ["| | mean | norm. | gap | " + " | ".join(tasks) + " | seeds |", "|---" * (len(tasks) + 5) + "|"]
    for row in rows:
        records = load(bed, row)
        if not records:
            continue
        means = [r["mean"] for r in records]
        spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
        scores = {task: statistics.mean(r["scores"][task] for r in records) for task in tasks}
        normal = 100 * statistics.mean(scores[task] / experts["scores"][task] for task in tasks)
        gap = 100 * (statistics.mean(means) - average["mean"]) / (experts["mean"] - average["mean"])
        cells = [
            f"{statistics.mean(means):.1f}{spread}",
            f"{normal:.1f}",
            f"{gap:.0f}%",
            *(f"{scores[task]:.1f}" for task in tasks),
            str(len(records)),
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def filled(page: str, fill: Mapping[str, Callable[[], list[str]]]) -> str:
    """A page's words with what its placeholders stand for."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.sub(r"<!-- (\w+) -->", lambda m: "\n".join(fill[m.group(1)]()), text)


def adaptation_page() -> str:
    """What adaptation does and what its choices come to."""
    own = adaptation_tables
    fill = {"steps": own.steps, "studies": own.tables, "signals": own.signals, "subsets": own.subsets}
    return filled("adaptation.in.md", fill)


def results_page() -> str:
    """The tables of both test beds with what each number rests on."""
    fill: dict[str, Callable[[], list[str]]] = {
        "main": lambda: table("minilm-8", ROWS),
        "ablation": lambda: ablation("minilm-8"),
        "settings": lambda: settings("minilm-8"),
        "collapse": lambda: collapse("minilm-8"),
        "demo": lambda: table("demo-8", ROWS),
        "demo_task_aware": lambda: task_aware("demo-8"),
        "demo_ablation": lambda: ablation("demo-8"),
        "demo_settings": lambda: settings("demo-8"),
        "demo_collapse": lambda: collapse("demo-8"),
        "costs": costs,
        "peers": peers,
        "fusion_bench": fusion_bench,
    }
    return filled("results.in.md", fill)


def task_aware(bed: str) -> list[str]:
    """Rows whose every task has weights of its own, with their size; nothing before they have records."""
    found = [records[0] for row in TASK_AWARE if (records := load(bed, row))]
    if not found:
        return []
    experts = load(bed, "experts")[0]["scores"]
    lines = [
        "### Task-aware methods",
        "",
        "Each task is scored by weights of its own, from one bundle; the task of every test input is known, so these rows are no rivals",
        "of those above. Sizes are of all weights, heads included, beside all experts whole and beside one network.",
        "",
        "| | mean | norm. | of the experts' size | × one model | " + " | ".join(TASKS[bed]) + " |",
        "|---" * (len(TASKS[bed]) + 5) + "|",
    ]
    for record in found:
        scores, size = record["scores"], record["bytes"]
        normal = 100 * statistics.mean(scores[task] / experts[task] for task in TASKS[bed])
        cells = [f"{record['mean']:.1f}", f"{normal:.1f}", f"{100 * size['bundle'] / size['experts']:.0f}%"]
        cells += [f"{size['bundle'] / size['one']:.1f}", *(f"{scores[task]:.1f}" for task in TASKS[bed])]
        lines.append(f"| {record['row']} | " + " | ".join(cells) + " |")
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


def _mean(bed: str, row: str) -> str:
    means = [r["mean"] for r in load(bed, row)]
    if not means:
        return "not run"
    return f"{statistics.mean(means):.1f}" + (
        f" ± {statistics.stdev(means):.1f} ({len(means)} seeds)" if len(means) > 1 else ""
    )


def settings(bed: str) -> list[str]:
    """What each row ran with."""
    lines = ["| row | settings | merge, s |", "|---|---|---|"]
    for row in [*ROWS, "TA+AdaRank, masks only", "CART+AdaRank, masks only"]:
        for record in load(bed, row)[:1]:
            given = record["settings"]
            parts = [_flat({k: v for k, v in given.get("parameters", {}).items() if v is not None})]
            if "adapt" in given:
                keys = ("objective", "steps", "batch_size", "lr_masks", "lr_lambda")
                parts.append(_flat({k: given["adapt"][k] for k in keys if k in given["adapt"]}))
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
            cells = [f"{100 * seen[t]['before']:.0f} → {100 * seen[t]['after']:.0f}" for t in TASKS[bed]]
            lines.append(
                f"| {row} | "
                + " | ".join(cells)
                + f" | {100 * found['components_kept']:.1f}% | {', '.join(found['collapsed']) or 'none'} |"
            )
    return lines


def costs() -> list[str]:
    """Adaptation steps beside plain autograd, peaks of data-free merges, and agreement with mergekit."""
    step = json.loads((ROOT / "records" / "costs" / "step.json").read_text())
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
    memory = json.loads((ROOT / "records" / "costs" / "merge-memory-float32.json").read_text())
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


def peers() -> list[str]:
    """Largest relative differences from mergekit, over its recipes."""
    record = json.loads((ROOT / "records" / "peers" / "mergekit.json").read_text())
    lines = ["| models | output | least | median | largest relative difference of a recipe |", "|---|---|---|---|---|"]
    for stored in ("float32", "bfloat16"):
        for written, found in record[stored]["max_relative_difference_by_output_dtype"].items():
            lines.append(f"| {stored} | {written} | {found['min']:.1e} | {found['median']:.1e} | {found['max']:.1e} |")
    return lines


def fusion_bench() -> list[str]:
    """Largest relative differences from FusionBench, method by method, and why they are what they are."""
    record = json.loads((ROOT / "records" / "peers" / "fusion-bench.json").read_text())
    lines = [
        "| method | largest relative difference | values that differ | with FusionBench's rule | whose choice, with the formula |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if "refused" in row:
            cells = ["not to be had", "", ""]
        else:
            rule = f"{row['with_their_rule']:.1e}" if "why" in row and "with_their_rule" in row else ""
            cells = [f"{row['max_relative_difference']:.1e}", f"{row['values_unequal']} of {row['values']:,}", rule]
        why = (row.get("why") or row.get("note", "")).replace("|", "\\|")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {why} |")
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


def shown() -> list[str]:
    """What `adarank demo` printed, from its record."""
    record = json.loads((ROOT / "records" / "demo-8" / "demo.json").read_text())
    return ["```text", *record["shown"], "```"]


def readme() -> str:
    """The README with what the demo shows and the head of the results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = {
        "shown": shown(),
        "demo": table("demo-8", HEAD),
        "minilm": table("minilm-8", HEAD),
    }
    for name, rows in tables.items():
        begin, end = f"<!-- {name} table -->", f"<!-- end of {name} table -->"
        found = "\n".join([begin, "", *rows, "", end])
        text = re.sub(f"{begin}.*?{end}", lambda m, found=found: found, text, flags=re.DOTALL)
    return text


PAGES: dict[str, Callable[[], str]] = {
    "docs/methods.md": methods_page,
    "docs/cli.md": cli_page,
    "docs/adaptation.md": adaptation_page,
    "docs/adaptation.svg": adaptation_tables.curves,
    "docs/results.md": results_page,
    "docs/demo-8.svg": chart,
    "README.md": readme,
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    print("\n".join(f"{'out of date' if check else 'written'}: {name}" for name in stale) or "all pages are up to date")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
