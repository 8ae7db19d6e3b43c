"""What happened in a run of the loop, step by step, and what `adarank.adapt` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adarank.adapt.agreement import Signals
from adarank.adapt.choice import Choice, LinePoint
from adarank.adapt.start_search import Tried
from adarank.spectral.blocks import Blocks
from adarank.spectral.mask_file import MaskFile

if TYPE_CHECKING:
    from adarank.adapt.heads import HeadFit
    from adarank.adapt.origin_choice import Origin


@dataclass
class History:
    """What happened, step by step.

    Attributes:
        losses: task -> loss at each step.
        kept: share of components kept after each step, if that is learned.
        seconds: time spent in steps, over all the runs that a resumed adaptation took.
        resumed_from: steps at which runs continued from a saved state.
        judged: step -> task -> signals, without labels.
        judging_seconds: time spent in judging.
        choice: which step's weights were kept, once adaptation is over.
        starts: the starts that were compared, if there was a choice.
        line_points: points on the line to the start that were judged.
    """

    losses: dict[str, list[float]]
    kept: list[float] = field(default_factory=list)
    seconds: float = 0.0
    resumed_from: list[int] = field(default_factory=list)
    judged: dict[int, dict[str, Signals]] = field(default_factory=dict)
    judging_seconds: float = 0.0
    choice: Choice | None = None
    starts: list[Tried] = field(default_factory=list)
    line_points: list[LinePoint] = field(default_factory=list)

    @property
    def judged_kept(self) -> Mapping[str, Signals]:
        """task -> signals of the weights that are kept."""
        assert self.choice is not None  # adaptation is over
        share, step = self.choice.share, self.choice.step
        at_point = [point.judged for point in self.line_points if (point.step, point.share) == (step, share)]
        return at_point[0] if at_point else self.judged[step]

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return len(next(iter(self.losses.values()), ()))


Progress = Callable[[History, int], None]
"""Called after each step with the history so far and the number of steps."""


@dataclass(frozen=True)
class Learned:
    """What adaptation gave. The networks hold what is kept.

    Attributes:
        parameters: merged tensor -> the parameter that holds it.
        masks: masks and λ; None if what is learned is something else.
        blocks: by block: of each its name, its distances before and after, and whether what was learned is kept.
        factors: merged tensor -> origin, task vectors and spectra; by block read when looked up, and none where no state is kept.
        origins: origin -> how often it agrees with the experts, where task vectors are counted from the better one.
    """

    history: History
    parameters: Mapping[str, Tensor]
    masks: MaskFile | None
    blocks: Sequence[Mapping[str, Any]] = ()
    factors: Mapping[str, Blocks] = field(default_factory=dict)
    origins: Mapping[Origin, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapted:
    """What `adapt` returns.

    Attributes:
        modules: task -> the merged network with that task's head, in float32 and evaluation mode. They share memory.
        state: tensor name -> merged tensor, in float32, heads not among them.
        masks: masks and λ; `masks.save(path)` writes the file that the method `masked` applies. None if a method learns
            something else.
        history: losses and components kept, step by step; judgements; which step was kept and why (`history.choice`).
        heads: task -> what learning its head gave, for those that were to be learned.
        origins: origin -> how often it agrees with the experts, where task vectors are counted from the better one.

    Example:
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        adapted = adarank.adapt(base, {"a": a, "b": b}, {task: [torch.randn(16, 8)] for task in "ab"}, settings={"steps": 3})
        classes = adapted.modules["a"](torch.randn(5, 8)).argmax(dim=-1)
        base.load_state_dict(adapted.state)
        print(adapted.history.choice, adapted.masks.kept_share())
    """

    modules: Mapping[str, nn.Module]
    state: dict[str, Tensor]
    masks: MaskFile | None
    history: History
    heads: Mapping[str, HeadFit] = field(default_factory=dict)
    origins: Mapping[Origin, float] = field(default_factory=dict)
