"""What task vectors are counted from where that is left open: the base or the experts' average, whichever is nearer to the experts.

    W_o = argmax over W₀, W̄ of mean_t agreement of f(W) with expert t, on unlabelled inputs

The average of experts that lie far apart is worse than the base that all of them came from, and adaptation about it sets out
from there. Either is judged on the inputs that starts are compared on; nothing is decomposed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import Tensor

from adarank.adapt.agreement import Judged, mean_agreement
from adarank.adapt.block_goals import judged_by_block
from adarank.adapt.passage import Passage
from adarank.adapt.problem import Problem
from adarank.adapt.start_search import QUICK_CHECK
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import RecipeError
from adarank.io import processes
from adarank.io.progress import advance, stage
from adarank.io.state import read_kept, write_state

if TYPE_CHECKING:
    from adarank.adapt.methods import AdaptiveMethod

Origin = Literal["average", "pretrained"]
ORIGINS: tuple[Origin, ...] = ("average", "pretrained")  # of equals the first
_STREAM = "origin"
M = TypeVar("M", bound="AdaptiveMethod")


def compare_origins(
    problem: Problem, network: AlignedCheckpoints, passage: Passage | None = None
) -> dict[Origin, float]:
    """Origin -> its mean agreement with the experts, in [0, 1]. The networks hold the base afterwards.

    Arguments:
        passage: over the problem's networks, where these are run a block at a time.
    """

    device = next(iter(problem.models.shared.values())).device

    def tensors(kind: Origin, names: Iterable[str]) -> dict[str, Tensor]:
        merged = set(network.merged())
        return {name: network.origin(name, kind, device) for name in names if name in merged}

    with stage("Comparing the base with the average", len(ORIGINS)):
        agreement = {}
        for kind in ORIGINS:
            of_kind = partial(tensors, kind)
            _fill(problem, of_kind, network.merged() if passage is None else passage.outside)
            agreement[kind] = mean_agreement(_judged(problem, passage, of_kind))
            advance()
    return agreement


def with_origin(
    method: M,
    problem: Problem,
    network: AlignedCheckpoints,
    passage: Passage | None = None,
    kept: Path | None = None,
    state: Path | None = None,
) -> tuple[M, dict[Origin, float]]:
    """The method with its origin chosen, and how often either agrees with the experts; as it is where its settings name one.

    Arguments:
        kept: file in which the agreement is kept, so that a run that goes on never chooses otherwise; None to keep it nowhere.
        state: the run's saved state, which is about the origin that was chosen.

    Raises:
        RecipeError: there is a state, and what was chosen is missing or damaged.
    """
    if method.origin != "auto":
        return method, {}
    if network.base is None:
        return method.model_copy(update={"origin": "average"}), {}
    agreement = processes.from_first(lambda: read_kept(kept) if kept else None)
    if agreement is None and state and state.exists():
        raise RecipeError(
            f"{kept}: missing or damaged; it says which origin {state} is about. Delete {state.parent} to start anew."
        )
    if agreement is None:
        agreement = compare_origins(problem, network, passage)
        if kept and processes.rank() == 0:
            write_state(kept, {str(kind): value for kind, value in agreement.items()}, "the choice of the origin")
    return method.model_copy(update={"origin": max(ORIGINS, key=lambda kind: agreement[kind])}), agreement


def _fill(problem: Problem, tensors: Callable[[Iterable[str]], dict[str, Tensor]], names: Iterable[str]) -> None:
    for name in names:  # one at a time: an average is as large as the tensor itself
        problem.models.fill(tensors([name]).items())


def _judged(problem: Problem, passage: Passage | None, tensors: Callable[[Iterable[str]], dict[str, Tensor]]) -> Judged:
    if passage is None:
        return problem.quick_check()(0)

    def fill(place: int) -> None:
        passage.fill(place, tensors(passage.inside[place]))

    return judged_by_block(problem, passage, _STREAM, fill, 0, QUICK_CHECK)
