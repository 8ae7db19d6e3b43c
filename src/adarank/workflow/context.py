"""One run of the loop for a job: what it is given, where its state lies, and what tells it from other runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adarank.adapt.history import Progress
from adarank.adapt.problem import Predictions
from adarank.adapt.settings import AdaptSettings
from adarank.data.task import TaskData
from adarank.io.record import Note
from adarank.io.state import read_state
from adarank.models import TaskModels
from adarank.recipe.job import Job
from adarank.workflow.problem import expert_predictions


@dataclass(frozen=True)
class Run:
    """What adaptation, training and modules are given alike.

    Attributes:
        about: the settings, the inputs' hashes and the seed: what, beside the data, decides every number.
        state: file in which the state is kept, with the experts' predictions beside it. A run continues from it.
        note, progress: told of stages as they begin, and of every step.
    """

    job: Job
    data: Mapping[str, TaskData]
    about: Mapping[str, Any]
    state: Path
    note: Note = lambda text: None
    progress: Progress | None = None

    @cached_property
    def marks(self) -> dict[str, str]:
        """Task -> what tells its data from others."""
        return {task: own.fingerprint() for task, own in self.data.items()}

    @cached_property
    def choices(self) -> dict[str, str]:
        """Tensor -> what happens to it."""
        return {name: choice.action for name, choice in self.job.network.choices.items()}

    def fingerprint(self, marks: Mapping[str, Any], block: str = "adapt") -> str:
        """Identifies what the run is of. Not the machine: it may be taken elsewhere, at the cost of its last bits.

        A state of another run is refused here, before anything is computed.

        Arguments:
            marks: task -> what tells all that is read of it from others, as plain data.
            block: the settings that hold `save_every`, which decides no number.

        Raises:
            RecipeError: the state is damaged, or of another run.
        """
        about = self.about
        settings = {
            **about["settings"],
            block: {k: v for k, v in about["settings"][block].items() if k != "save_every"},
        }
        text = json.dumps([settings, about["inputs"], about["seed"], self.choices, marks], sort_keys=True)
        found = hashlib.sha256(text.encode()).hexdigest()
        if self.state.exists():
            read_state(self.state, found)
        return found

    def expert_predictions(self, models: TaskModels, settings: AdaptSettings) -> dict[str, Predictions]:
        """Task -> its expert's predictions, as far as the settings ask for them. The models hold the base's tensors afterwards."""
        mark = [self.choices, self.about["inputs"], self.marks]
        return expert_predictions(self.job, models, self.data, settings, mark, self.state.parent, self.note)
