"""What a method is given that runs by a recipe: its job, the tasks' data, where its state lies, and what tells it from other runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.adapt.history import History, Progress
from adarank.adapt.learner import Loss, Memory
from adarank.adapt.passage import Passage
from adarank.adapt.problem import Predictions
from adarank.adapt.settings import AdaptSettings
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.data.task import TaskData
from adarank.io.record import Note
from adarank.io.state import read_state
from adarank.method import Context, MergeMethod, Outline, Result
from adarank.models import Family, TaskModels
from adarank.recipe.job import Job
from adarank.recipe.plan import in_force
from adarank.spectral.mask_file import FILE as MASKS_FILE
from adarank.workflow.adapt import adapt_job, report
from adarank.workflow.build_networks import build_models, family_of
from adarank.workflow.calibrate import with_statistics
from adarank.workflow.problem import expert_predictions, head_features, problem_of, table_inputs


def _silent(text: str) -> None:
    """Take a message and do nothing."""


@dataclass(frozen=True)
class RecipeContext(Context):
    """A job's context.

    Attributes:
        about: the settings, the inputs' hashes and the seed: what, beside the data, decides every number.
        state: file in which the state is kept, with the experts' predictions and statistics beside it. A run continues from it.
        note, progress: called with each stage as it begins, and after every step.
        ready: networks that are loaded already, and may be filled.
        keeps_heads: heads stay the experts', whatever the settings say: another method is put on the result.
    """

    job: Job
    data: Mapping[str, TaskData] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    state: Path | None = None
    note: Note = _silent
    progress: Progress | None = None
    ready: TaskModels | None = None
    keeps_heads: bool = False

    @property
    def network(self) -> AlignedCheckpoints:
        """The job's checkpoints, aligned."""
        return self.job.network

    @property
    def device(self) -> torch.device | str:
        """The recipe's device."""
        return self.job.recipe.device

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return self.job.recipe.seed

    @property
    def family(self) -> Family:
        """The kind of the tasks' models; a `RecipeError` if there are no tasks."""
        return family_of(self.job)

    def outline(self) -> Outline:
        """What headers tell, in the dtypes that the recipe asks for."""
        return self.job.outline()

    def models(self) -> TaskModels:
        """The networks in `ready`, else one per task, filled with the base's tensors."""
        return build_models(self.job) if self.ready is None else self.ready

    @cached_property
    def marks(self) -> dict[str, str]:
        """Task -> what tells its data from others."""
        return {task: of.fingerprint() for task, of in self.data.items()}

    @cached_property
    def choices(self) -> dict[str, str]:
        """Tensor -> what happens to it."""
        return {name: choice.action for name, choice in self.job.network.choices.items()}

    @property
    def folder(self) -> Path | None:
        """Where the state lies; None if none is kept."""
        return self.state.parent if self.state else None

    def fingerprint(self, marks: Mapping[str, Any] | None = None, block: str = "adapt") -> str:
        """Identifies what the run is of. Not the machine: it may be taken elsewhere, at the cost of its last bits.

        Raises:
            RecipeError: the state is damaged, or of another run.
        """
        about, marks = self.about, self.marks if marks is None else marks
        settings = {
            **about["settings"],
            block: {k: v for k, v in about["settings"][block].items() if k != "save_every"},
        }
        text = json.dumps([settings, about["inputs"], about["seed"], self.choices, marks], sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        if self.state and self.state.exists():
            read_state(self.state, fingerprint)
        return fingerprint

    def with_statistics(self, method: Any) -> tuple[Any, dict[str, Any]]:
        """The method with statistics of the experts on the tasks' data, kept beside the state; and the record's report of them."""
        return with_statistics(method, self.job, self.models, self.data, self._statistics_folder(), self.note)

    def _statistics_folder(self) -> Path | None:
        """Of these very checkpoints."""
        of = hashlib.sha256(json.dumps(self.about.get("inputs"), sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / of if self.folder else None

    def adapted(self, method: Any) -> Result:
        """The merged tensors of the kept step, its masks as a file, and the record's report of the loop."""
        adaptation = adapt_job(self, method)
        masks = adaptation.masks
        return Result(
            adaptation.tensors(),
            heads=adaptation.heads,
            files={MASKS_FILE: masks.save} if masks else {},
            block="adaptation",
            report=adaptation.report,
        )

    def another(self, method: MergeMethod) -> tuple[Result, dict[str, Any]]:
        """What another method gives on the same job, with a state in a folder `start`; and its settings in force."""
        settings = in_force(method, self.job.recipe)
        about, state = (
            {**self.about, "settings": settings},
            self.state and self.state.parent / "start" / self.state.name,
        )
        changed = replace(self, job=replace(self.job, method=method), about=about, state=state, keeps_heads=True)
        return method.run(changed), settings

    def expert_predictions(
        self, models: TaskModels, settings: AdaptSettings, passage: Passage | None = None
    ) -> dict[str, Predictions]:
        """Task -> its expert's predictions, kept beside the state. The models hold the base's tensors afterwards.

        Arguments:
            passage: over the models, which runs experts a block at a time.
        """
        mark = [self.choices, self.about["inputs"], self.marks]
        return expert_predictions(self.job, models, self.data, settings, mark, self.folder, self.note, passage)

    def losses(
        self, models: TaskModels, settings: AdaptSettings, predictions: Mapping[str, Predictions], memory: Memory
    ) -> dict[str, Loss]:
        """Task -> its objective on the rows of a step."""
        return problem_of(self.job, models, self.data, settings, predictions, memory).losses()

    def judge(
        self, models: TaskModels, settings: AdaptSettings, predictions: Mapping[str, Predictions]
    ) -> Callable[[int], Any]:
        """Step -> each task's signals: what the models hold now beside the experts' predictions."""
        return problem_of(self.job, models, self.data, settings, predictions).judge()

    def judged_rows(self, task: str, settings: AdaptSettings) -> list[int]:
        """Rows of select, or of adapt where select is empty; `check_inputs` at most."""
        judged, split = table_inputs(self.job, self.data, settings)[task].judged
        return list(judged.splits.rows[split])

    def features(self, models: TaskModels, task: str, settings: AdaptSettings, pool: Any = None) -> Tensor:
        """(rows, width) what a task's head is given by what the models hold, for the rows adapted on and judged on."""
        return head_features(self.job, models, self.data, settings, task, pool)

    def report(self, history: History, settings: AdaptSettings, kept: Any = None) -> dict[str, Any]:
        """What the record says of the loop."""
        return report(history, self.job, settings, self.data, kept)
