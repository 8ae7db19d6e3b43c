"""Adaptation a block at a time: each block learns to give, on the merged stream, what the experts' blocks give on their own.

    z_t  what the blocks before give in the merge;   e_t  what they give in expert t, both on task t's inputs
    b_ℓ, λ_ℓ = argmin Σ_t Σ_x ‖block_ℓ(b, λ; z_t) - block_ℓ^t(e_t)‖² / d_t          d_t: the same sum at the block's start, held out

What the last block gives is read by heads alone, and these look at few of its directions. Where no head is to be learned, as in
models that generate text, it is learned towards the experts' predictions, as a whole network is (`by_predictions` of a method).

Blocks are learned in the order in which they run; then both streams go on through them. Nothing is differentiated but one block,
and what is behind the last. Its weights and factors alone are in memory; streams, factors and what was learned lie in files.
What is outside of the blocks stays as it is at the start, and heads are learned afterwards, as always.

A block that does not come nearer to the experts' on inputs held out keeps its start. At the end the whole is judged as in
every adaptation, beside the start and points on the line to it: batches go through a block after the other there, too.

Xu, Li, Zhang, "Scalable Model Merging with Progressive Layer-wise Distillation", arXiv:2502.12706, has the two streams.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adarank.adapt.agreement import Signals
from adarank.adapt.block_goals import (
    EXPERT,
    MERGED,
    Goal,
    TowardsPredictions,
    TowardsStates,
    all_batches,
    goes_to_predictions,
    judged_by_block,
    nearer,
)
from adarank.adapt.choice import SHARES, Choice, LinePoint, choose_best, fits
from adarank.adapt.history import History, Learned, Progress
from adarank.adapt.learner import LiveLearner, Loss
from adarank.adapt.loop import adapt
from adarank.adapt.origin_choice import with_origin
from adarank.adapt.parts import PartFactors, PartTensors, PartWeights
from adarank.adapt.passage import Passage
from adarank.adapt.problem import Problem
from adarank.adapt.start_search import QUICK_CHECK, Tried, best_of, find_start
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import Interrupted
from adarank.io import processes
from adarank.io.progress import advance, stage
from adarank.io.state import read_state, write_state

if TYPE_CHECKING:
    from adarank.adapt.methods import AdaptiveMethod

_TRIED = "tried"  # the stream of a start, or of a point on the line to it


def adapt_by_block(
    problem: Problem,
    method: AdaptiveMethod,
    network: AlignedCheckpoints,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
    passage: Passage | None = None,
) -> Learned:
    """Learn block after block. Of several processes each takes the steps of its tasks and brings their streams through the
    blocks, and has its share of a block's factors; what they decide is of numbers that all have. All must call it.

    Arguments:
        state, fingerprint, progress: as for `loop.adapt`. What is done is saved after every block.
        passage: over the problem's networks, if there is one.

    Returns:
        What was learned. Without a state the networks hold it; with one blocks are hollow afterwards, and
        merged tensors are composed from the files beside it when they are looked up.

    Raises:
        RecipeError: the networks have no blocks that can be run alone, or the state belongs to another run.
        Interrupted: a signal asked to stop.
    """
    with tempfile.TemporaryDirectory() if state is None else nullcontext(state.parent) as parent:
        folder = Path(parent) / blocks_folder(fingerprint)
        passage = passage or passage_of(problem, network, folder)
        method, agreement = with_origin(
            method, problem, network, passage, folder / "origin.pt" if state else None, state
        )
        # names tell files about one origin from those about the other
        mark = f"-{method.origin}" if agreement else ""
        walk = _Walk(problem, method, network, folder.with_name(folder.name + mark), passage)
        saved = _Saved(state, fingerprint)
        if not saved.restore(walk):
            walk.begin()
        else:
            walk.put_outside()
        while walk.place < len(walk.paths):
            walk.learn(progress)
            saved.save(walk)
            walk.forget()
        walk.finish()
        masks = walk.weights.mask_file(network.tasks, method.origin, {})
        tensors = PartTensors(walk.weights)
        if state is None:
            walk.passage.fill_all(tensors)
            return Learned(walk.history, walk.weights.parameters, masks, walk.blocks, origins=agreement)
    return Learned(walk.history, tensors, masks, walk.blocks, PartFactors(walk.weights), agreement)


def blocks_folder(fingerprint: str) -> str:
    """What the folder beside the state is called that holds streams, factors and what was learned of a run."""
    return f"blocks-{fingerprint[:16]}"


def passage_of(problem: Problem, network: AlignedCheckpoints, folder: Path) -> Passage:
    """The passage of a problem's networks."""
    batches = {task: inputs.step(0)[1] for task, inputs in problem.inputs.items()}
    return Passage(problem.models, network, problem.forward, batches, folder)


class _Walk:
    """The two streams, as far as they have come.

    Attributes:
        paths: the blocks' names, in the order in which they run.
        blocks: of every block that is done, what the record says of it.
    """

    def __init__(
        self, problem: Problem, method: AdaptiveMethod, network: AlignedCheckpoints, folder: Path, passage: Passage
    ) -> None:
        self._problem, self._settings, self.passage = problem, problem.settings, passage
        self._grid, self._tasks = method.grid, processes.share(list(problem.inputs))
        self._by_predictions = method.by_predictions and goes_to_predictions(problem)
        self.paths, self.blocks = passage.paths, list[dict[str, Any]]()
        of_blocks = [[name for name in network.merged() if name in names] for names in map(set, passage.inside)]
        beside = [name for name in network.merged() if name in set(passage.outside)]
        self.weights = PartWeights(method, network, problem.models.shared, self._settings, of_blocks, beside, folder)
        self.history = History({task: [] for task in problem.inputs})

    @property
    def place(self) -> int:
        """The block that is next."""
        return len(self.blocks)

    def begin(self) -> None:
        """Choose the start of all blocks, and judge it."""
        started = time.perf_counter()
        if self._grid.open:
            self.history.starts = find_start(self.weights, self._grid, lambda step: self._tried(step, QUICK_CHECK))
        self.put_outside()
        self.history.judged[0] = self._tried(0)
        self.history.judging_seconds += time.perf_counter() - started

    def put_outside(self) -> None:
        """Put the start in its place outside of the blocks."""
        self.weights.write()
        self.passage.keep_outside()

    def learn(self, progress: Progress | None) -> None:
        """Learn the next block, and bring both streams behind it."""
        started, place = time.perf_counter(), self.place
        with self.passage.held(place):
            goal = self._goal(place)
            self.passage.fill_kept(place)
            live = self.weights.live(place)
            start = {name: tensor.detach().clone() for name, tensor in live.learned().items()}
            live.write()
            before = goal.distances()
            self._take_steps(live, goal.losses(before), progress)
            live.settle()
            after = goal.distances()
            kept = self._settings.keep == "last" or nearer(before, after)
            if not kept:
                with torch.no_grad():
                    for name, tensor in live.learned().items():
                        tensor.copy_(start[name])
                live.write()
            self.weights.rest(live)
            self.weights.keep(place, live)
            for task in self._tasks:
                self.passage.run(MERGED, task, place, all_batches(self._problem, task))
        self.blocks.append(
            {
                "block": self.paths[place],
                "goal": goal.name,
                "before": _rounded(before),
                "after": _rounded(after),
                "kept": kept,
            }
        )
        self.history.seconds += time.perf_counter() - started

    def _goal(self, place: int) -> Goal:
        """What a block is learned towards; brings the experts' stream behind it where that is needed."""
        if self._by_predictions and place == len(self.paths) - 1:
            return TowardsPredictions(self._problem, self.passage, place)
        self._run_experts(place)
        return TowardsStates(self._problem, self.passage, place)

    def _run_experts(self, place: int) -> None:
        with stage(f"Block {place + 1} of {len(self.paths)}: the experts'", len(self._tasks)):
            for task in self._tasks:
                with self.passage.outside_of(task):
                    self.passage.fill_expert(task, place)
                    self.passage.run(EXPERT, task, place, all_batches(self._problem, task))
                advance()

    def forget(self) -> None:
        """Let go of what no later block needs."""
        for stream in (MERGED, EXPERT):
            self.passage.forget(stream, self._tasks, self.place)

    def finish(self) -> None:
        """Judge the whole, and keep what leaves no task behind the start: all of it, a share of the way to it, or the start."""
        history, settings = self.history, self._settings
        step, started = history.step, time.perf_counter()
        merged = replace(self._problem, forward=self.passage.after(MERGED))
        history.judged[step] = dict(merged.judge()(step))
        if settings.keep == "last":
            history.choice = Choice(step, "the last step, as keep: last asks")
        else:
            self._search_line()
            history.choice = choose_best(history.judged, settings.tolerance, history.line_points)
            self.weights.share = history.choice.share if history.choice.step else 0.0
        history.judging_seconds += time.perf_counter() - started

    def _search_line(self) -> None:
        step = self.history.step
        point = LinePoint(step, 1.0, self.history.judged[step])
        for share in SHARES:
            if fits(point, self.history.judged, self._settings.tolerance):
                return
            self.weights.share = share
            point = LinePoint(step, self.weights.share, self._tried(step))
            self.history.line_points.append(point)

    def _tried(self, step: int, most: int | None = None) -> dict[str, Signals]:
        """What is seen of the weights as they would be composed now.

        Arguments:
            most: look at so many inputs per task.
        """
        return dict(judged_by_block(self._problem, self.passage, _TRIED, self._compose, step, most))

    def _compose(self, place: int) -> None:
        self.weights.compose(place)
        self.passage.fill_kept(place)

    def _take_steps(self, live: LiveLearner, losses: Mapping[str, Loss], progress: Progress | None) -> None:
        done = self.history
        before, steps = {task: list(values) for task, values in done.losses.items()}, self._settings.steps

        def tell(of_block: History, _: int) -> None:
            for task, values in of_block.losses.items():
                done.losses[task] = before[task] + values
            if progress:
                progress(done, steps * len(self.paths))

        try:
            adapt(live, losses, self._settings.model_copy(update={"keep": "last"}), progress=tell)
        except Interrupted:
            raise Interrupted(
                f"Stopped in block {self.place + 1} of {len(self.paths)}. Run the same command to continue with that block."
            ) from None


@dataclass(frozen=True)
class _Saved:
    """The state of a walk in its file, saved behind every block."""

    state: Path | None
    fingerprint: str

    def save(self, walk: _Walk) -> None:
        """What is not in files already, once all processes have written theirs. All must call it."""
        processes.meet()
        if self.state is not None and processes.rank() == 0:
            write_state(self.state, self._content(walk), "the state")
        processes.meet()

    def _content(self, walk: _Walk) -> dict[str, Any]:
        history = walk.history
        return {
            "fingerprint": self.fingerprint,
            "losses": history.losses,
            "seconds": history.seconds,
            "resumed_from": history.resumed_from,
            "judged": {task: asdict(signals) for task, signals in history.judged[0].items()},
            "judging_seconds": history.judging_seconds,
            "starts": [asdict(tried) for tried in history.starts],
            "blocks": walk.blocks,
        }

    def restore(self, walk: _Walk) -> bool:
        """Continue from the saved state; False if there is none."""
        if self.state is None or not self.state.exists():
            return False
        content = read_state(self.state, self.fingerprint)
        walk.blocks = content["blocks"]
        history = walk.history = History(content["losses"], seconds=content["seconds"])
        history.resumed_from = [*content["resumed_from"], history.step]
        history.judged[0] = {task: Signals(**signals) for task, signals in content["judged"].items()}
        history.judging_seconds = content["judging_seconds"]
        history.starts = [Tried(**tried) for tried in content["starts"]]
        if history.starts:
            walk.weights.reset(best_of(history.starts).scale, best_of(history.starts).rank)
        walk.weights.forget_from(walk.place)
        return True


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {task: float(f"{value:.5g}") for task, value in values.items()}
