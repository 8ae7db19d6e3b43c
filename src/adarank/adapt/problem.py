"""What experts say of the batches that `adarank.adapt` is given, and how near merged modules come to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adarank.adapt.agreement import Judge, Signals, signals
from adarank.adapt.objectives import NEED_EXPERT
from adarank.adapt.schedule import Course
from adarank.adapt.settings import AdaptSettings
from adarank.models.predict import Forward


@dataclass
class Asked:
    """The experts' predictions on the batches, each computed once, as the modules are copied.

    Attributes:
        targets: task -> the expert's logits of each batch that adaptation will see.
        watched: task -> batches that steps are judged on, with the expert's logits.
    """

    call: Forward
    batches: Mapping[str, Sequence[Any]]
    held_out: Mapping[str, Sequence[Any]]
    settings: AdaptSettings
    named: bool
    targets: dict[str, list[Tensor]] = field(default_factory=dict)
    watched: dict[str, list[tuple[Any, Tensor]]] = field(default_factory=dict)

    @torch.no_grad()
    def expert(self, task: str, module: nn.Module) -> nn.Module:
        """A copy of the expert, once it has been asked."""
        own = copy.deepcopy(module).float().eval()
        if self.named and NEED_EXPERT & self.settings.weights(task).keys():
            seen = range(min(Course(self.settings).longest, len(self.batches[task])))
            self.targets[task] = [self.call(own, self.batches[task][i]) for i in seen]
        looked_at = self.held_out.get(task) or self.batches[task]
        known = dict(enumerate(self.targets.get(task, []) if not self.held_out.get(task) else []))
        if 0 not in known:
            known[0] = self.call(own, looked_at[0])
        # evenly spread, as many as have `check_inputs` inputs together: batches may come sorted by their classes
        count = min(len(looked_at), max(1, self.settings.check_inputs // max(1, len(known[0]))))
        spread = [i * len(looked_at) // count for i in range(count)]
        self.watched[task] = [(looked_at[i], known[i] if i in known else self.call(own, looked_at[i])) for i in spread]
        return own

    def judge(self, modules: Mapping[str, nn.Module]) -> Judge:
        """Compares the modules' predictions with the experts'."""

        @torch.no_grad()
        def judged(step: int) -> dict[str, Signals]:
            found = {}
            for task, pairs in self.watched.items():
                own = torch.cat([self.call(modules[task], batch) for batch, _ in pairs])
                found[task] = signals(own, torch.cat([expert for _, expert in pairs]).to(own.device))
            return found

        return judged
