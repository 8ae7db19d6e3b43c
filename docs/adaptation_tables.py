"""The tables and curves of adaptation.md, from the records of the kinds "studies" and "run" of both test beds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any

from records import FOLDER, Records

BEDS = ("demo-8", "minilm-8")
Run = Mapping[str, Any]


@cache
def studies_of(bed: str) -> dict[str, Any]:
    """What all runs of a test bed have in common, and under `runs`: study -> name -> run."""
    records = Records(FOLDER / f"{bed}.jsonl")
    runs: dict[str, dict[str, Run]] = {}
    for run in records.find(kind="run"):
        runs.setdefault(run["study"], {})[run["name"]] = run
    return {**(records.first(kind="studies") or {}), "runs": runs}


def agreement(check: Run) -> float:
    return 100 * statistics.mean(check["signals"]["agreement"])


def score(check: Run) -> float:
    return statistics.mean(check["scores"])


def kept(run: Run) -> Run:
    """What is kept: a step, or a point of the line search from it towards the start."""
    chosen = (run["step_kept"], run["share_kept"])
    return next(own for own in run["checks"] + run["way_back"] if (own["step"], own["share"]) == chosen)


def steps() -> list[str]:
    """How long the runs are."""
    found = {bed: next(iter(studies_of(bed)["runs"]["objectives"].values())) for bed in BEDS if studies_of(bed)["runs"]}
    return [", ".join(f"{run['settings']['adapt']['steps']} steps on {bed}" for bed, run in found.items())]


def tables() -> list[str]:
    """A table per study: one row per run, the columns of both test beds."""
    lines = []
    names = dict.fromkeys(name for bed in BEDS for name in studies_of(bed)["runs"] if name != "subsets")
    for name in names:
        beds = [bed for bed in BEDS if name in studies_of(bed)["runs"]]
        lines += [f"### {name[0].upper()}{name[1:]}", "",
                  "| | " + " | ".join(f"{bed}: agreement, start → kept | test, start → kept | test, last" for bed in beds) + " |",
                  "|---" * (1 + 3 * len(beds)) + "|"]  # fmt: skip
        default = {bed: studies_of(bed)["runs"]["objectives"]["self-label"] for bed in beds}
        rows = dict.fromkeys(row for bed in beds for row in studies_of(bed)["runs"][name])
        if name != "objectives":
            lines.append("| by default | " + " | ".join(_cells(default[bed]) for bed in beds) + " |")
        for row in rows:
            runs = [studies_of(bed)["runs"][name].get(row) for bed in beds]
            label = row.replace("way back", "line search")  # as records made before the term call it
            lines.append(f"| {label} | " + " | ".join(_cells(run) if run else "| |" for run in runs) + " |")
        lines.append("")
    return lines[:-1]


# what one has or wants, what to say in the recipe, and the run that shows what it comes to
CHOICES = (
    ("nothing in particular", "nothing", "objectives", "self-label"),
    ("the paper's binary masks", "`mask: binary`", "learned", "binary masks"),
    ("two to three times the time", "`batch_size: 32`", "batch", "32 inputs"),
    ("the expert's features as well as its predictions", "`objective: {self-label: 1.0, features: 0.5}`", "objectives", "self-label and features"),
    ("λ alone, with the components of the start", "`learn_masks: false`", "learned", "λ alone"),
    ("no component that the start leaves out", "`returnable: false`", "learned", "top components alone"),
    ("few numbers to learn: one λ per task", "`lambda_per: task`", "λ shared", "per task"),
    ("task vectors about the base, not the average", "`origin: pretrained`", "bases", "TA"),
    ("TSV-M's orthogonal directions", "`basis: tsv_m`", "bases", "TSV-M"),
    ("Iso-C's flat spectrum", "`basis: iso_c`", "bases", "Iso-C"),
    ("Iso-CTS' shared and task-specific directions", "`basis: iso_cts`", "bases", "Iso-CTS"),
    ("a tenth of the inputs", "nothing", "data", "10%"),
    ("16 inputs of each task", "nothing", "data", "16 inputs a task"),
    ("no loss of agreement for any task", "`tolerance: 0`", "keeping", "tolerance 0"),
    ("classes in other proportions than in use", "nothing", "faults", "classes out of balance"),
    ("noisy inputs", "nothing", "faults", "noise on every input"),
    ("a task without inputs", "nothing", "faults", "last task without data"),
    ("the papers' objective", "`objective: entropy`", "objectives", "entropy"),
)  # fmt: skip


def choices() -> list[str]:
    """What to say for what one has, with the test scores that it came to."""
    lines = ["| you have, or want | set | " + " | ".join(f"{bed}: start → kept (last step)" for bed in BEDS) + " |",
             "|---" * (2 + len(BEDS)) + "|"]  # fmt: skip
    for want, say, study, label in CHOICES:
        runs = [studies_of(bed)["runs"].get(study, {}).get(label) for bed in BEDS]
        cells = [f"{score(r['checks'][0]):.1f} → {score(kept(r)):.1f} ({score(r['checks'][-1]):.1f})" if r else "" for r in runs]  # fmt: skip
        lines.append(f"| {want} | {say} | " + " | ".join(cells) + " |")
    return lines


def _cells(run: Run) -> str:
    first, best, last = run["checks"][0], kept(run), run["checks"][-1]
    count = len(run["collapse_seen"])
    gone = f", {count} task{'s' if count > 1 else ''} collapsed" if count else ""
    back = " (rolled back)" if run["rolled_back"] else ""
    return (f"{agreement(first):.1f} → {agreement(best):.1f}{back} | {score(first):.1f} → {score(best):.1f} | {score(last):.1f}{gone}")  # fmt: skip


def signals() -> list[str]:
    beds = [bed for bed in BEDS if studies_of(bed).get("correlations")]
    lines = ["| signal | " + " | ".join(f"{bed}: means | {bed}: per task" for bed in beds) + " |",
             "|---" * (1 + 2 * len(beds)) + "|"]  # fmt: skip
    found = {bed: studies_of(bed)["correlations"] for bed in beds}
    for name in found[beds[0]] if beds else ():
        lines.append(f"| {name} | " + " | ".join(f"{found[b][name]['all_checks']:.2f} | {found[b][name]['per_task']:.2f}" for b in beds) + " |")  # fmt: skip
    counts = ", ".join(f"{found[bed]['agreement']['checks']} checks on {bed}" for bed in beds)
    return [*lines, "", f"{counts}."]


def subsets() -> list[str]:
    """How many tasks of all subsets agree less, the least change, and the change of the mean test score."""
    if not any("subsets" in studies_of(bed)["runs"] for bed in BEDS):
        return ["Not run yet."]
    lines = ["| test bed | subsets | rolled back | tasks that agree less | least change of a task's agreement | test: worst, median, best change | test mean below the start |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for bed in BEDS:
        runs = list(studies_of(bed)["runs"].get("subsets", {}).values())
        if not runs:
            continue
        moved = [100 * change for run in runs for change in _moved(run)]
        changes = sorted(score(kept(run)) - score(run["checks"][0]) for run in runs)
        lines.append(f"| {bed} | {len(runs)} | {sum(run['rolled_back'] for run in runs)} | "
                     f"{sum(change < 0 for change in moved)} of {len(moved)} | {min(moved):+.1f} points | "
                     f"{changes[0]:+.1f}, {statistics.median(changes):+.1f}, {changes[-1]:+.1f} | {sum(c < 0 for c in changes)} |")  # fmt: skip
    return lines


def _moved(run: Run) -> list[float]:
    first, best = (check["signals"]["agreement"] for check in (run["checks"][0], kept(run)))
    return [after - before for before, after in zip(first, best, strict=True)]


LINES = {"self-label": "#e4572e", "features": "#76b041", "infomax": "#f2a541", "filtered-entropy": "#4c78a8", "entropy": "#555555"}  # fmt: skip


def curves() -> str:
    """Two panels per test bed: agreement with the experts and test score at each check, a line per objective."""
    beds = [bed for bed in BEDS if "objectives" in studies_of(bed)["runs"]]
    width, height, gap = 300, 170, 60
    total = (2 * (width + gap) + 140, len(beds) * (height + gap) + 30)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]}" height="{total[1]}" font-family="sans-serif" font-size="12">',
             f'<rect width="{total[0]}" height="{total[1]}" fill="#ffffff"/>']  # fmt: skip
    for row, bed in enumerate(beds):
        runs = studies_of(bed)["runs"]["objectives"]
        for column, (title, value) in enumerate((("agreement with the experts, %", agreement), ("test score", score))):
            left, top = gap + column * (width + gap), 30 + row * (height + gap)
            parts += _panel(runs, f"{bed}: {title}", value, (left, top, width, height))
    for number, (name, colour) in enumerate(LINES.items()):
        x, y = total[0] - 135, 44 + 20 * number
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 18}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 4}" fill="#333">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(runs: Mapping[str, Run], title: str, value: Any, box: tuple[int, int, int, int]) -> list[str]:
    left, top, width, height = box
    most = max(own["step"] for run in runs.values() for own in run["checks"])
    parts = [f'<text x="{left}" y="{top - 8}" fill="#333">{title}</text>']
    for tick in range(0, 101, 25):
        y = top + height * (1 - tick / 100)
        parts.append(f'<line x1="{left}" y1="{y:g}" x2="{left + width}" y2="{y:g}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:g}" fill="#666" text-anchor="end">{tick}</text>')
    parts.append(f'<text x="{left}" y="{top + height + 16}" fill="#666">0</text>')
    parts.append(f'<text x="{left + width}" y="{top + height + 16}" fill="#666" text-anchor="end">step {most}</text>')
    for name, colour in LINES.items():
        if name in runs:
            points = [(left + width * own["step"] / most, top + height * (1 - value(own) / 100)) for own in runs[name]["checks"]]  # fmt: skip
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return parts
