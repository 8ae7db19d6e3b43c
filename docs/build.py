"""Write the generated pages: methods.md from the methods, cli.md from --help, results.md and the README's table from records.

python docs/build.py            # write
python docs/build.py --check    # say what is out of date, exit 1
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))  # records are read by what writes them

import adaptation_tables
import performance_tables
from language_tables import language_table
from peer_tables import forms, fusion_bench, peers, vocabularies
from results_tables import (
    HEAD,
    ROWS,
    ablation,
    chart,
    collapse,
    costs,
    first_run,
    flat,
    heads_masks_lambda,
    record_of,
    settings,
    short_table,
    table,
    task_aware,
)

from adarank.cli.main import parser
from adarank.recipe.catalogue import catalogue, presets
from adarank.recipe.papers import ROWS as PAPER_ROWS
from adarank.recipe.papers import SETTINGS

ROOT = Path(__file__).resolve().parent.parent


def methods_page() -> str:
    """Formula, needs, settings and source of every method, and the presets."""
    lines = [
        "# Methods",
        "",
        "Generated from the methods themselves. τ_t = W_t - W₀ is a task vector, W̄ the experts' mean.",
        "",
    ]
    usual = {s.name: s.default for s in catalogue()["adarank"].settings}
    for entry in catalogue().values():
        lines += [
            f"## {entry.name}",
            "",
            entry.summary,
            "",
            f"    {entry.formula}",
            "",
            f"Needs {entry.needs}. Reads {entry.reads}. In memory: {entry.memory}. Source: {entry.source}.",
            "",
        ]
        parameters = [s for s in entry.settings if not s.name.startswith("adapt.")]
        if parameters:
            lines += ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
            lines += [f"| `{s.name}` | {s.default} | {s.allowed} | {s.meaning} |" for s in parameters] + [""]
        loop = [s for s in entry.settings if s.name.startswith("adapt.")]
        changed = [f"{s.name.removeprefix('adapt.')} {s.default}" for s in loop if s.default != usual[s.name]]
        if changed:
            lines += [f"Its defaults in the adapt block: {', '.join(changed)}.", ""]
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
        "`adapt: {preset: NAME}`: the settings released with the papers. A preset states every setting that its result depends on, so it does",
        "not change when a default of adarank changes. The settings that the table does not list are as follows.",
        "",
        "- AdaRank: binary masks and a λ per tensor; the start is λ 2.3 with rank 0.16 about the average (on texts λ 1.6 with rank 0.04), λ 0.3 with rank 1 about the base, λ 1 with rank 1 on another basis.",
        "- AdaMerging: λ 0.3 about the base, per tensor; ++ with a density of 0.2. CART++: λ 1 with rank 0.08 about the average, per tensor.",
        "- Modular methods have the preset `paper` alone, with the number of steps of their papers.",
        f"- The adapt block: {flat(presets()['paper']['adapt'])}.",
        "- AdaRank's `paper` takes 10,000 steps on images. On texts it takes 5,000 of 8 inputs with a step size of 5e-5, as its paper has; the released file of RoBERTa about the average has 1e-4, and so has `roberta-7-cart`.",
        "",
        "| preset | parameters | adapt |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {flat(preset['parameters'])} | {flat(_beside_paper(preset['adapt']))} |"
        for name, preset in presets().items()
    ]
    lines += [
        "",
        "## Rows of the papers",
        "",
        "Which recipe makes which row of the tables of AdaRank (arXiv:2503.22178; eight tasks, RoBERTa and GPT-2 seven) and CART",
        "(arXiv:2412.12153). The figures are the papers' own, to compare a run on the same checkpoints with: means over tasks in per cent. The",
        "papers adapt on the test inputs (`data: {protocol: transductive}`). [results.md](results.md) has what this project measured.",
        "`adarank methods --papers` shows the same rows.",
        "",
        f"| row | recipe | {' | '.join(SETTINGS.values())} |",
        "|---|---|" + "---|" * len(SETTINGS),
    ]
    for row in PAPER_ROWS:
        recipe = f"`{row.yaml()}`" if row.recipe else ""
        figures = (row.shown(key) for key in SETTINGS)
        lines.append(
            f"| {row.name} | {'; '.join(part for part in (recipe, row.hint) if part)} | {' | '.join(figures)} |"
        )
    return "\n".join(lines) + "\n"


def _beside_paper(adapt: Mapping[str, Any]) -> dict[str, Any]:
    """What a preset's loop has that the one of `paper` has not."""
    return {key: value for key, value in adapt.items() if presets()["paper"]["adapt"][key] != value}


def cli_page() -> str:
    """Every command's --help."""
    top = parser()
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    parts = ["# The command line\n\nGenerated from `--help`. Results go to stdout, progress to stderr. Exit codes: 0 done, 1 an error that the message"
             " explains, 2 wrong usage, 70 a bug of adarank, 130 interrupted.\n"]  # fmt: skip
    with mock.patch.dict(os.environ, COLUMNS="100"):  # how wide argparse makes its help
        for name, command in {"": top, **commands}.items():
            parts.append(f"## adarank {name}".rstrip() + f"\n\n```text\n{command.format_help()}```\n")
    return "\n".join(parts)


def filled(page: str, fill: Mapping[str, Callable[[], list[str]]]) -> str:
    """A page's words with what its placeholders stand for."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.sub(r"<!-- (\w+) -->", lambda m: "\n".join(fill[m.group(1)]()), text)


def adaptation_page() -> str:
    """What adaptation does and what its choices come to."""
    return filled("adaptation.in.md", {"choices": adaptation_tables.choices})


def studies_page() -> str:
    """What adaptation's choices rest on."""
    fill: dict[str, Callable[[], list[str] | str]] = {
        "steps": adaptation_tables.steps,
        "studies": adaptation_tables.tables,
        "signals": adaptation_tables.signals,
        "subsets": adaptation_tables.subsets,
    }
    return filled("studies.in.md", fill)


def results_page() -> str:
    """The tables of both test beds with what each number rests on."""
    fill: dict[str, Callable[[], list[str]]] = {
        "main": lambda: table("minilm-8", ROWS, costs=True),
        "task_aware": lambda: task_aware("minilm-8"),
        "ablation": lambda: ablation("minilm-8"),
        "heads_masks_lambda": lambda: heads_masks_lambda("minilm-8"),
        "settings": lambda: settings("minilm-8"),
        "collapse": lambda: collapse("minilm-8"),
        "shown": shown,
        "demo": lambda: table("demo-8", ROWS, costs=True),
        "demo_task_aware": lambda: task_aware("demo-8"),
        "demo_ablation": lambda: ablation("demo-8"),
        "demo_heads_masks_lambda": lambda: heads_masks_lambda("demo-8"),
        "demo_settings": lambda: settings("demo-8"),
        "demo_collapse": lambda: collapse("demo-8"),
        "language": lambda: language_table(lora=False),
        "language_lora": lambda: language_table(lora=True),
        "costs": costs,
        "peers": peers,
        "forms": forms,
        "vocabularies": vocabularies,
        "fusion_bench": fusion_bench,
    }
    return filled("results.in.md", fill)


def performance_page() -> str:
    """What steps and merges cost."""
    return filled(
        "performance.in.md",
        {
            "step_parts": performance_tables.step_parts,
            "step_vs_autograd": performance_tables.step_vs_autograd,
            "merge_speed": performance_tables.merge_speed,
            "merge_memory": performance_tables.merge_memory,
        },
    )


def shown() -> list[str]:
    """What `adarank demo` printed, from its record."""
    return ["```text", *record_of("demo-8", "demo", "whole")["shown"], "```"]


def readme() -> str:
    """The README with what the first command costs and gives, and the main rows of the results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = {
        "first run": first_run(),
        "demo table": ["", *short_table("demo-8", HEAD), ""],
        "minilm table": ["", *short_table("minilm-8", HEAD), ""],
    }
    for name, rows in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        block = "\n".join([begin, *rows, end])
        text = re.sub(f"{begin}.*?{end}", lambda m, block=block: block, text, flags=re.DOTALL)
    return text


PAGES: dict[str, Callable[[], str]] = {
    "docs/methods.md": methods_page,
    "docs/cli.md": cli_page,
    "docs/adaptation.md": adaptation_page,
    "docs/studies.md": studies_page,
    "docs/adaptation.svg": adaptation_tables.curves,
    "docs/results.md": results_page,
    "docs/performance.md": performance_page,
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
