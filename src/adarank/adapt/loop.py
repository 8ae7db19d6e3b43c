"""The adaptation loop: one forward and backward per task, one closed-form pull-back, one Adam step.

The loop knows no data, no model and no objective: a task is a function from the step's number to a scalar loss. That
makes every step a pure function of (settings, step), so an interrupted run continues exactly where it was.
"""

from __future__ import annotations

import math
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adarank.adapt.live import LiveWeights
from adarank.checkpoint import DAMAGED
from adarank.errors import AdaptationError, Interrupted, OutputError, RecipeError
from adarank.settings import Settings

_STATE = {"fingerprint", "lam", "logits", "optimiser", "rng", "losses", "kept", "seconds", "resumed_from"}
Loss = Callable[[int], Tensor]
"""step -> scalar loss of one task, with its graph."""


class AdaptSettings(Settings):
    """How adaptation runs. The defaults are the released settings of AdaRank for vision models.

    Arguments:
        steps: Adam steps; each sees one batch of every task.
        batch_size: inputs per task and step.
        lr_masks, lr_lambda: Adam step sizes of mask logits and of λ.
        objective: `entropy` of the predictions (the papers'), or `self-label`: divergence from each expert's own
            predictions on the same inputs.
        schedule: `constant` (the papers') or `cosine` down to zero.
        betas: Adam's decay rates.
        temperature: τ of the mask's sigmoid.
        logit: mask logits start at plus and minus this.
        clamp: λ is used clamped to this range.
        save_every: steps between two saves of the state.
    """

    steps: int = Field(500, ge=0, description="Adam steps")
    batch_size: int = Field(16, ge=1, description="inputs per task and step")
    lr_masks: float = Field(1e-3, ge=0, description="Adam step size of the mask logits")
    lr_lambda: float = Field(1e-3, ge=0, description="Adam step size of λ")
    objective: Literal["entropy", "self-label"] = Field("entropy", description="what is minimised")
    schedule: Literal["constant", "cosine"] = Field("constant", description="of both step sizes")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates")
    temperature: float = Field(10.0, gt=0, description="τ of the mask's sigmoid")
    logit: float = Field(0.1, gt=0, description="mask logits start at ±this")
    clamp: tuple[float, float] | None = Field(None, description="range in which λ is used")
    save_every: int = Field(25, ge=1, description="steps between two saves of the state")

    @model_validator(mode="after")
    def _ranges(self) -> AdaptSettings:
        if self.clamp is not None and self.clamp[0] > self.clamp[1]:
            raise ValueError(f"clamp: {self.clamp[0]} is above {self.clamp[1]}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: both must be in [0, 1), got {self.betas}")
        return self

    def factor(self, step: int) -> float:
        """What step sizes are multiplied by at a step, counted from 0."""
        return 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps)))


@dataclass
class History:
    """What happened, step by step.

    Attributes:
        losses: task -> loss at each step.
        kept: share of components kept after each step.
        seconds: time spent in steps, over all the runs that a resumed adaptation took.
        resumed_from: steps at which runs took up a saved state.
    """

    losses: dict[str, list[float]]
    kept: list[float] = field(default_factory=list)
    seconds: float = 0.0
    resumed_from: list[int] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.kept)


Progress = Callable[[History, int], None]
"""Called after each step with the history so far and the number of steps."""


def adapt(
    live: LiveWeights,
    losses: Mapping[str, Loss],
    settings: AdaptSettings,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> History:
    """Learn λ and masks, in place; the network holds the final merged weights afterwards.

    Arguments:
        live: the merged weights.
        losses: task -> loss of a step. Their gradients add up.
        state: file in which the state is kept, and from which an interrupted run continues.
        fingerprint: identifies inputs and settings; a state with another one is refused.

    Raises:
        AdaptationError: a loss is not finite; names task and step.
        Interrupted: a signal asked to stop; the state was saved.
        RecipeError: the state file belongs to another run.
    """
    run = _Run(live, settings, History({task: [] for task in losses}), state, fingerprint)
    run.restore()
    live.write()
    with _stop_on_signal() as stopped:
        while run.history.step < settings.steps:
            started = time.perf_counter()
            run.take_step(losses)
            run.history.seconds += time.perf_counter() - started
            if progress:
                progress(run.history, settings.steps)
            if stopped and run.history.step < settings.steps:
                run.save()
                again = "Run the same command to continue." if state else "No state was kept."
                raise Interrupted(f"Stopped at step {run.history.step} of {settings.steps}. {again}")
            if run.history.step % settings.save_every == 0:
                run.save()
    return run.history


@dataclass
class _Run:
    """An optimiser over the live weights, with its state on disk."""

    live: LiveWeights
    settings: AdaptSettings
    history: History
    state: Path | None
    fingerprint: str

    def __post_init__(self) -> None:
        groups = []
        if self.live.learn.lam:
            groups.append({"params": [self.live.lam], "lr": self.settings.lr_lambda, "start": self.settings.lr_lambda})
        if self.live.learn.masks and self.live.logits.numel():
            groups.append({"params": [self.live.logits], "lr": self.settings.lr_masks, "start": self.settings.lr_masks})
        if not groups:
            raise RecipeError("adapt: neither λ nor masks are learned. Use a data-free method, or learn one of them.")
        self.optimiser = torch.optim.Adam(groups, betas=self.settings.betas)

    def take_step(self, losses: Mapping[str, Loss]) -> None:
        step = self.history.step
        self.live.zero_grad()
        values = []
        for loss in losses.values():
            value = loss(step)
            value.backward()
            values.append(value.detach())
        found = dict(zip(losses, torch.stack(values).tolist(), strict=True))
        self._check(found)
        self.live.pull_back()
        self._check_gradients()
        for task, value in found.items():
            self.history.losses[task].append(value)
        for group in self.optimiser.param_groups:
            group["lr"] = group["start"] * self.settings.factor(step)
        self.optimiser.step()
        self.live.write()
        self.history.kept.append(self.live.kept_share())

    def _check(self, values: Mapping[str, float]) -> None:
        bad = [task for task, value in values.items() if not math.isfinite(value)]
        if bad:
            where = f"; the last good state is {self.state}" if self.state and self.state.exists() else ""
            raise AdaptationError(
                f"Adaptation stopped: the loss of task '{bad[0]}' is {values[bad[0]]} at step {self.history.step + 1}{where}. "
                "Lower the step sizes, or check that task's inputs."
            )

    def _check_gradients(self) -> None:
        """A finite loss may have an infinite slope: one Adam step would spoil the state for good."""
        gradients = [p.grad for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise AdaptationError(
                f"Adaptation stopped: the losses of step {self.history.step + 1} are finite, but their gradient is not. "
                "Lower the step sizes, or check the tasks' inputs."
            )

    def save(self) -> None:
        if self.state is None:
            return
        partial = self.state.with_suffix(".partial")
        content: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "lam": self.live.lam.detach(),
            "logits": self.live.logits.detach(),
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": self.history.losses,
            "kept": self.history.kept,
            "seconds": self.history.seconds,
            "resumed_from": self.history.resumed_from,
        }
        try:
            self.state.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, partial)
            partial.replace(self.state)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError on a full disk
            raise OutputError(
                f"{self.state}: the state of adaptation cannot be saved ({error}). Free space or give another output path."
            ) from None

    def restore(self) -> None:
        if self.state is None or not self.state.exists():
            return
        content = self._read(self.state)
        if content["fingerprint"] != self.fingerprint:
            raise RecipeError(
                f"{self.state}: the saved state belongs to another run (inputs or settings differ). Delete it to start anew, or give another output path."
            )
        with torch.no_grad():
            self.live.lam.copy_(content["lam"])
            self.live.logits.copy_(content["logits"])
        self.optimiser.load_state_dict(content["optimiser"])
        torch.set_rng_state(content["rng"])
        past = [*content["resumed_from"], len(content["kept"])]
        self.history = History(content["losses"], content["kept"], content["seconds"], past)

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True)
        except (pickle.UnpicklingError, *DAMAGED) as error:
            raise RecipeError(f"{path}: the saved state is damaged ({error}). Delete it to start anew.") from None
        if not isinstance(content, dict) or not content.keys() >= _STATE:
            raise RecipeError(f"{path}: not a saved state of adaptation. Delete it to start anew.")
        return content


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGINT or SIGTERM came; a second one interrupts at once."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[int(number)] = signal.signal(number, note)
    except ValueError:  # not in the main thread: signals stay whoever's they are
        pass
    try:
        yield caught
    finally:
        for caught_number, handler in previous.items():
            signal.signal(caught_number, handler)
