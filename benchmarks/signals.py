"""Objectives side by side, and how well each label-free signal ranks their steps.

    python benchmarks/signals.py minilm-8|demo-8 FOLDER [--steps 75] [--threads 2]

FOLDER as for table.py. From CART's start, each objective adapts on unlabelled inputs with the bed's step sizes; at every
check the signals are taken on unlabelled select inputs, and, apart from them, the labelled scores of test inputs, which
nothing but this study ever sees.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from table import BEDS, ROOT, Bench

from adarank.adapt.judge import Judged
from adarank.adapt.loop import Memory, adapt
from adarank.adaptation import task_losses
from adarank.data.task import TaskData
from adarank.experts import expert_outputs, judge_of
from adarank.plan import open_job
from adarank.record import machine, versions
from adarank.scoring import score_all
from adarank.writer import write_json

CHECKS = 5
SCORED = 300  # test inputs per task
RUNS: dict[str, dict[str, Any]] = {
    "self-label": {"objective": "self-label"},
    "entropy": {"objective": "entropy"},
    "infomax": {"objective": "infomax"},
    "filtered-entropy": {"objective": "filtered-entropy"},
    "self-label, hard": {"objective": "self-label", "self_label": {"hard": True}},
    "self-label and infomax": {"objective": {"self-label": 1.0, "infomax": 0.2}},
}
SIGNALS = {"agreement": 1, "divergence": -1, "histogram": -1, "entropy": -1}  # which way is better


def run(bench: Bench, label: str, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """One adaptation, judged with and without labels on the way."""
    start = bench.search("CART")
    loop = {**bench.bed.adapt["average"], "steps": steps, "check_every": steps // CHECKS, "keep": "last", **changes}
    parameters = {"origin": "average", **start}
    job = open_job(bench.recipe({"merge_method": "adarank", "parameters": parameters, "adapt": loop}))
    method, settings = job.recipe.adaptation()
    data, models = bench.data, bench.models
    test = {task: spread(own) for task, own in data.items()}
    experts = expert_outputs(job, models, data, settings)
    live = method.start(job.network, models.shared, settings, "cpu")
    memory: Memory = {}
    losses = task_losses(job, models, data, settings, experts, memory)
    plain = judge_of(job, models, data, settings, experts)
    seen: list[dict[str, Any]] = []

    def judge(step: int) -> Judged:
        judged = plain(step)
        scores = score_all(job, models, test, "test")
        signals = {task: {name: getattr(own, name) for name in SIGNALS} for task, own in judged.items()}
        seen.append({"step": step, "signals": signals, "scores": scores})
        print(f"{label} step {step}: agreement {mean(signals, 'agreement'):.3f}, test {sum(scores.values()) / len(scores):.1f}",
              flush=True)  # fmt: skip
        return judged

    history = adapt(live, losses, settings, judge=judge, memory=memory)
    return {"run": label, "settings": {"parameters": parameters, "adapt": loop}, "checks": seen,
            "seconds_in_steps": round(history.seconds, 1)}  # fmt: skip


def spread(own: TaskData) -> TaskData:
    """The task with at most SCORED test inputs, spread evenly over the split."""
    return own.spread("test", SCORED)


def mean(signals: dict[str, dict[str, float]], name: str) -> float:
    return statistics.mean(own[name] for own in signals.values())


def correlations(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Spearman's ρ between each signal and the labelled score: of means over tasks, all runs' checks together; and per
    run and task, the mean of the ρ over a run's checks (runs in which a task's score moves)."""
    found = {}
    for name, sign in SIGNALS.items():
        means = [
            (sign * mean(c["signals"], name), statistics.mean(c["scores"].values())) for r in runs for c in r["checks"]
        ]
        own = []
        for r in runs:
            for task in r["checks"][0]["scores"]:
                x = [sign * c["signals"][task][name] for c in r["checks"]]
                y = [c["scores"][task] for c in r["checks"]]
                if len(set(x)) > 1 and len(set(y)) > 1:
                    own.append(float(spearmanr(x, y).statistic))
        found[name] = {
            "all_checks": float(spearmanr(*zip(*means, strict=True)).statistic),
            "per_task_and_run": statistics.mean(own),
            "pairs": len(own),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=Path, default=ROOT / "records")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(BEDS[options.bed], options.folder, options.records / options.bed)
    path = options.records / options.bed / "signals.json"
    runs: list[dict[str, Any]] = []
    for label, changes in RUNS.items():
        runs.append(run(bench, label, changes, options.steps))
        content = {"runs": runs, "correlations": correlations(runs), "scored_per_task": SCORED, "seed": 0,
                   "command": f"python benchmarks/signals.py {options.bed} FOLDER --steps {options.steps}",
                   "inputs": bench.inputs, "versions": versions(), "machine": machine()}  # fmt: skip
        write_json(path, content)


if __name__ == "__main__":
    sys.exit(main())
