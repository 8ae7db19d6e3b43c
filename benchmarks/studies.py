"""What adaptation's choices come to: objectives, bases, what is learned, data budgets, faults, numbers of tasks.

    python benchmarks/studies.py minilm-8|demo-8 FOLDER [--studies NAME …] [--runs NAME …] [--threads 2]

FOLDER as for table.py. Every run is judged at its checks as the tool does, on unlabelled select inputs; beside that, and
seen by nothing but this study, test inputs are scored there with labels. Each run is a record of the kind "run" in
records/BED.jsonl, beside one of the kind "studies" of what all have in common; a run that is recorded is not repeated.
Runs are shorter than adarank's default, all of a test bed equally (`SIZES`), so compare them with one another. In all else
they are what adarank does by default, unless their label says otherwise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, SIGNALS, Record, Records, columns
from scipy.stats import spearmanr
from table_bench import Bench
from table_rows import BEDS

from adarank.adapt.agreement import Judged, first_collapse, worse
from adarank.adapt.choice import LinePoint
from adarank.adapt.history import History
from adarank.adapt.learner import Loss
from adarank.adapt.loop import adapt
from adarank.adapt.problem import Predictions
from adarank.data.splits import Splits
from adarank.data.task import Batch, Examples, TaskData
from adarank.io.record import machine, versions
from adarank.recipe.job import open_job
from adarank.workflow.build_networks import build_models, network_tensors
from adarank.workflow.evaluate import score_all, score_experts
from adarank.workflow.problem import expert_predictions, problem_of


@dataclass(frozen=True)
class Size:
    """How much a run does.

    Attributes:
        watched: select inputs per task that steps are judged on.
        scored: test inputs per task.
    """

    steps: int
    checks: int
    watched: int
    scored: int


SIZES = {"demo-8": Size(60, 3, 128, 200), "minilm-8": Size(60, 3, 128, 200)}
BINARY = {"mask": "binary"}  # the paper's
Data = dict[str, TaskData]


@dataclass(frozen=True)
class Variant:
    """One run of a study: what differs from the default.

    Attributes:
        change: the adaptation inputs that it sees, made from all of them; labels are the experts' answers.
        fresh: tasks whose inputs it alters, so that their experts must be asked again.
        silent: tasks without adaptation data.
        tasks: the tasks merged; None is all.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Data], Data] = lambda data: data
    fresh: bool = False
    silent: tuple[int, ...] = ()
    tasks: tuple[str, ...] | None = None
    checks: int | None = None


def budget(count: int) -> Callable[[Data], Data]:
    """At most `count` adaptation inputs of each task."""
    return lambda data: {task: own.spread("adapt", count) for task, own in data.items()}


def share(part: float) -> Callable[[Data], Data]:
    """That share of each task's adaptation inputs, one at least."""
    return lambda data: {t: own.spread("adapt", max(1, round(part * len(own.splits.rows["adapt"])))) for t, own in data.items()}  # fmt: skip


def imbalanced(data: Data) -> Data:
    """Of each task, a tenth of the inputs of every class but its most frequent one. Classes are what `labels` say."""
    found = {}
    for task, own in data.items():
        rows = own.splits.rows["adapt"]
        most = statistics.mode(own.labels[row] for row in rows)
        rare = [row for row in rows if own.labels[row] != most]
        kept = {row for row in rows if own.labels[row] == most} | set(rare[::10])
        found[task] = adapting_on(own, tuple(row for row in rows if row in kept))
    return found


def adapting_on(own: TaskData, rows: tuple[int, ...]) -> TaskData:
    return replace(own, splits=Splits({**own.splits.rows, "adapt": rows}, own.splits.dropped))


class Noisy:
    """Examples with noise: pixels plus normal noise of standard deviation 1, or three tokens of ten replaced at random."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.lengths = examples, examples.lengths

    def batch(self, rows: Any) -> Batch:
        batch = dict(self.examples.batch(rows))
        generator = torch.Generator().manual_seed(sum(rows))
        if "pixel_values" in batch:
            pixels = batch["pixel_values"]
            batch["pixel_values"] = pixels + torch.randn(pixels.shape, generator=generator)
            return batch
        ids = batch["input_ids"]
        hit = (torch.rand(ids.shape, generator=generator) < 0.3) & (ids > 999)  # below are special tokens
        batch["input_ids"] = torch.where(hit, torch.randint(1000, 30_000, ids.shape, generator=generator), ids)
        return batch

    def content(self) -> bytes:
        return self.examples.content()


def noisy(data: Data) -> Data:
    """Every adaptation input with noise."""
    return {task: replace(own, examples=Noisy(own.examples)) for task, own in data.items()}


def foreign(data: Data) -> Data:
    """The last task's adaptation inputs are another task's."""
    *_, other, task = data
    return {**data, task: replace(data[other], name=task)}


def studies(tasks: list[str]) -> dict[str, dict[str, Variant]]:
    """study -> run -> what differs."""
    dense = {"origin": "pretrained", "rank": 1.0, "lambda": 0.3}
    often = {"check_every": "auto"}
    return {
        "objectives": {
            "self-label": Variant(),
            "self-label, hard": Variant(adapt={"self_label": {"hard": True}}),
            "self-label, T = 2": Variant(adapt={"self_label": {"temperature": 2.0}}),
            "self-label and features": Variant(adapt={"objective": {"self-label": 1.0, "features": 0.5}}),
            "features": Variant(adapt={"objective": "features"}),
            "self-label and infomax": Variant(adapt={"objective": {"self-label": 1.0, "infomax": 0.2}}),
            "infomax": Variant(adapt={"objective": "infomax"}),
            "filtered-entropy": Variant(adapt={"objective": "filtered-entropy"}),
            "entropy": Variant(adapt={"objective": "entropy"}),
        },
        "learned": {
            "λ alone": Variant({"learn_masks": False}),
            "masks alone": Variant({"learn_lambda": False}),
            "top components alone": Variant({"returnable": False}),
            "binary masks": Variant(BINARY),
            "binary masks alone": Variant({**BINARY, "learn_lambda": False}),
            "binary masks, top components alone": Variant({**BINARY, "returnable": False}),
        },
        "λ shared": {f"per {own}": Variant({"lambda_per": own}) for own in ("layer", "task", "model")},
        "bases": {
            "TA, its usual start": Variant(dense),
            "TA": Variant({"origin": "pretrained", "rank": "auto", "lambda": "auto"}),
            "TSV-M": Variant({"basis": "tsv_m"}),
            "Iso-C": Variant({"basis": "iso_c"}),
            "Iso-CTS": Variant({"basis": "iso_cts"}),
        },
        "step sizes": {
            "masks 1e-3, λ 1e-3": Variant(adapt={"lr_masks": 1e-3, "lr_lambda": 1e-3}),
            "masks 5e-3, λ 1e-2": Variant(adapt={"lr_masks": 5e-3, "lr_lambda": 1e-2}),
            "masks 1e-2, λ 1e-2": Variant(adapt={"lr_masks": 1e-2, "lr_lambda": 1e-2}),
            "masks 2e-2, λ 2e-2": Variant(adapt={"lr_masks": 2e-2, "lr_lambda": 2e-2}),
            "constant": Variant(adapt={"schedule": "constant"}),
        },
        "keeping": {
            "tolerance 0": Variant(adapt={"tolerance": 0.0}),
        },
        "data": {
            "16 inputs a task": Variant(adapt=often, change=budget(16)),
            "1%": Variant(adapt=often, change=share(0.01)),
            "10%": Variant(adapt=often, change=share(0.1)),
        },
        "batch": {f"{size} inputs": Variant(adapt={"batch_size": size}) for size in (4, 32)},
        "faults": {
            "noise on every input": Variant(change=noisy, fresh=True),
            "classes out of balance": Variant(change=imbalanced),
            "last task without data": Variant(silent=(-1,)),
            "last task with another's inputs": Variant(change=foreign, fresh=True),
        },
        "tasks": {f"first {count}": Variant(tasks=tuple(tasks[:count])) for count in (2, 4)},
        "subsets": {draw: Variant(tasks=own, checks=4) for own, draw in subsets(tasks).items()},
    }


def subsets(tasks: list[str], count: int = 20) -> dict[tuple[str, ...], str]:
    """So many different subsets of two to six tasks, each with the number of the draw that it came from."""
    chooser = random.Random(0)
    found: dict[tuple[str, ...], str] = {}
    draw = 0
    while len(found) < count:
        chosen = chooser.sample(tasks, chooser.randint(2, 6))
        found.setdefault(tuple(t for t in tasks if t in chosen), f"{draw:02d}")
        draw += 1
    return found


class Studies:
    """All runs of a test bed.

    Attributes:
        common: the record of what they have in common: the experts' scores, what ran, and the correlations over all runs.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.size, self.records = bench, SIZES[bench.bed.name], bench.records
        blank: Record = {"kind": "studies", "name": "all", "seed": 0}
        self.common = self.records.first(**blank) or blank
        self.asked = bench.folder / "studies"
        self.asked.mkdir(parents=True, exist_ok=True)

    def experts(self) -> None:
        """What each task's own expert scores on the inputs that all runs are scored on."""
        if "experts" not in self.common:
            scores = score_experts(self.bench.job, self.bench.models, self._scored(list(self.bench.data)), "test")
            self.bench.models.fill(network_tensors(self.bench.job, "base"))
            self.common["experts"] = {task: round(score, 2) for task, score in scores.items()}
            self.records.write(self.common)

    def _scored(self, tasks: list[str]) -> dict[str, TaskData]:
        return {task: self.bench.data[task].spread("test", self.size.scored) for task in tasks}

    def run(self, study: str, label: str, variant: Variant) -> None:
        if self.records.first(kind="run", study=study, name=label):
            return
        tasks = list(variant.tasks or self.bench.data)
        default = self.records.first(kind="run", study="objectives", name="self-label")
        start = {} if default is None or variant.tasks or "basis" in variant.parameters else default["start"]
        parameters = {**start, **variant.parameters}
        loop = {"steps": self.size.steps, "check_every": self.size.steps // (variant.checks or self.size.checks),
                "check_inputs": self.size.watched, **variant.adapt}  # fmt: skip
        content = self._adapt(label, tasks, parameters, loop, variant)
        self.records.write({"kind": "run", "study": study, "name": label, "seed": 0, **content})
        self.common |= {
            "correlations": correlations(list(self.bench.data), self.records.find(kind="run")),
            "command": f"python benchmarks/studies.py {self.bench.bed.name} FOLDER",
            "scored_per_task": self.size.scored, "inputs": self.bench.inputs, "versions": versions(), "machine": machine(),
        }  # fmt: skip
        self.records.write(self.common)
        chosen = (content["step_kept"], content["share_kept"])
        kept = next(c for c in content["checks"] + content["way_back"] if (c["step"], c["share"]) == chosen)
        print(f"{study} / {label}: agreement {mean(content['checks'][0], 'agreement'):.3f} -> {mean(kept, 'agreement'):.3f}, "
              f"test {score(content['checks'][0]):.1f} -> {score(kept):.1f} (last {score(content['checks'][-1]):.1f})",
              flush=True)  # fmt: skip

    def _adapt(self, label: str, tasks: list[str], parameters: Any, loop: Any, variant: Variant) -> dict[str, Any]:
        recipe = self.bench.recipe({"merge_method": "adarank", "parameters": parameters, "adapt": loop})
        if variant.tasks:
            recipe = recipe.model_copy(update={"models": [m for m, t in zip(recipe.models, recipe.experts, strict=True) if t in tasks]})  # fmt: skip
        job = open_job(recipe)
        models = build_models(job) if variant.tasks else self.bench.models
        method, settings = job.method, job.method.settings
        whole = {task: self.bench.data[task] for task in tasks}
        every = self._expert_predictions(settings)
        # adapt inputs may have no labels: their classes are what the experts say
        answered = {task: replace(own, labels=tuple(every[task].logits.argmax(dim=-1).tolist())) for task, own in whole.items()}  # fmt: skip
        data = variant.change(answered)
        predictions = every if not variant.fresh else expert_predictions(job, models, data, settings)
        live = method.start(job.network, models.shared, settings, "cpu")
        learnt, judged = (
            problem_of(job, models, data, settings, predictions),
            problem_of(job, models, whole, settings, every),
        )
        losses: dict[str, Loss] = learnt.losses()
        for place in variant.silent:
            del losses[tasks[place]]
        plain, quick_check = judged.judge(), judged.quick_check()
        test = self._scored(tasks)
        scores: dict[int, list[dict[str, float]]] = {}  # a step's own first, then those of points on the line to it

        def judge(step: int) -> Judged:
            scores.setdefault(step, []).append(score_all(job, models, test, "test"))
            return plain(step)

        one_pass = min(data[task].one_pass(settings.batch_size) for task in losses)
        history = adapt(live, losses, settings, judge=judge, memory=learnt.memory, grid=method.grid, quick_check=quick_check, one_pass=one_pass)  # fmt: skip
        return report(history, scores, parameters, loop, tasks)

    def _expert_predictions(self, settings: Any) -> dict[str, Predictions]:
        """All experts' predictions, features too, on all inputs: computed once per test bed."""
        job, models = self.bench.job, self.bench.models
        wide = settings.model_copy(update={"objective": {"self-label": 1.0, "features": 1.0}})
        return expert_predictions(job, models, self.bench.data, wide, self.bench.inputs, self.asked)


def report(
    history: History, scores: Mapping[int, list[dict[str, float]]], parameters: Any, loop: Any, tasks: list[str]
) -> dict[str, Any]:
    """A run as its record has it; scores and signals of a check are lists over `tasks`."""
    choice = history.choice
    assert choice is not None
    best = max(history.starts, key=lambda own: own.value, default=None)

    def check(own: LinePoint) -> dict[str, Any]:
        signals = columns({task: judged.numbers() for task, judged in own.judged.items()}, tasks, SIGNALS)
        scored = scores[own.step].pop(0)
        return {"step": own.step, "share": own.share, "scores": [round(scored[task], 2) for task in tasks],
                "signals": {name: [round(value, 4) for value in values] for name, values in signals.items()}}  # fmt: skip

    return {
        "settings": {"parameters": dict(parameters), "adapt": dict(loop)},
        "tasks": tasks,
        "start": {"rank": best.rank, "lambda": best.scale} if best else {},
        "starts_tried": len(history.starts),
        "checks": [check(LinePoint(step, 1.0, judged)) for step, judged in sorted(history.judged.items())],
        "way_back": [check(back) for back in history.line_points],
        "step_kept": choice.step,
        "share_kept": choice.share,
        "rolled_back": choice.rolled_back,
        "worse_at_kept": worse(history.judged_kept, history.judged[0], 0.0),
        "collapse_seen": first_collapse(history.judged),
        "components_kept": round(history.kept[-1], 5) if history.kept else 1.0,
        "seconds_in_steps": round(history.seconds, 1),
    }


def mean(check: Mapping[str, Any], name: str) -> float:
    return statistics.mean(check["signals"][name])


def score(check: Mapping[str, Any]) -> float:
    return statistics.mean(check["scores"])


def correlations(tasks: list[str], runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Spearman's ρ between each signal and the labelled score.

    `all_checks`: means over tasks, all runs' checks together, runs of all tasks alone. `per_task`: for each task, over all
    checks of those runs; the mean of these.
    """
    found = {}
    checks = [check for run in runs if run["tasks"] == tasks for check in run["checks"]]
    for name, sign in SIGNALS.items() if len(checks) > 2 else ():
        all_checks = spearmanr([sign * mean(own, name) for own in checks], [score(own) for own in checks])
        own_tasks = []
        for place in range(len(tasks)):
            x = [sign * check["signals"][name][place] for check in checks]
            y = [check["scores"][place] for check in checks]
            if len(set(x)) > 1 and len(set(y)) > 1:
                own_tasks.append(float(spearmanr(x, y).statistic))
        found[name] = {"all_checks": float(all_checks.statistic), "per_task": statistics.mean(own_tasks or [0.0]),
                       "checks": len(checks)}  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=Path, metavar="FILE", help="default: records/BED.jsonl")
    parser.add_argument("--studies", nargs="*", default=[])
    parser.add_argument("--runs", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = Records(options.records or FOLDER / f"{options.bed}.jsonl")
    bed_studies = Studies(Bench(BEDS[options.bed], options.folder, records))
    bed_studies.experts()
    for study, variants in studies(list(bed_studies.bench.data)).items():
        for label, variant in variants.items():
            if (not options.studies or study in options.studies) and (not options.runs or label in options.runs):
                bed_studies.run(study, label, variant)


if __name__ == "__main__":
    sys.exit(main())
