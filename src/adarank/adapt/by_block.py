"""Adaptation a block at a time: each block learns to give, on the merged stream, what the experts' blocks give on their own.

    z_t  what the blocks before give in the merge;   e_t  what they give in expert t, both on task t's inputs
    b_ℓ, λ_ℓ = argmin Σ_t Σ_x ‖block_ℓ(b, λ; z_t) - block_ℓ^t(e_t)‖² / d_t          d_t: the same sum at the block's start, held out

Blocks are learned in the order in which they run; then both streams go on through them. Nothing is differentiated but one
block, whose factors alone are in memory; streams, factors and what was learned lie in files. What is outside of the blocks
stays as it is at the start, and heads are learned afterwards, as always.

A block that does not come nearer to the experts' on inputs held out keeps its start. At the end the whole is judged as in
every adaptation, beside the start and points on the line to it.

Xu, Li, Zhang, "Scalable Model Merging with Progressive Layer-wise Distillation", arXiv:2502.12706, has the two streams.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adarank.adapt.agreement import Judge, Signals
from adarank.adapt.choice import SHARES, Choice, LinePoint, choose_best, fits
from adarank.adapt.history import History, Learned, Progress
from adarank.adapt.learner import LiveLearner, Loss
from adarank.adapt.loop import adapt
from adarank.adapt.parts import PartFactors, PartWeights
from adarank.adapt.problem import Problem
from adarank.adapt.start_search import Tried, best_of, find_start
from adarank.adapt.streams import Streams
from adarank.alignment.task_vectors import AlignedCheckpoints, member_tensors
from adarank.errors import Interrupted
from adarank.io.progress import advance, stage
from adarank.io.state import read_state, write_state
from adarank.models.chain import Chain, Given, find_chain, hidden, positions

if TYPE_CHECKING:
    from adarank.adapt.methods import AdaptiveMethod

MERGED, EXPERT = "merged", "expert"
_SMALLEST = 1e-9  # a start's distance, relative to the length of what the expert gives, below which it is rounding


def adapt_by_block(
    problem: Problem,
    method: AdaptiveMethod,
    network: AlignedCheckpoints,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Learned:
    """Learn in place, block after block.

    Arguments:
        state, fingerprint, progress: as for `loop.adapt`. What is done is saved after every block.

    Raises:
        RecipeError: the networks have no blocks that can be run alone, or the state belongs to another run.
        Interrupted: a signal asked to stop.
    """
    with tempfile.TemporaryDirectory() if state is None else nullcontext(state.parent) as parent:
        walk = _Walk(problem, method, network, Path(parent) / f"blocks-{fingerprint[:16]}")
        saved = _Saved(state, fingerprint)
        if not saved.restore(walk):
            walk.begin()
        walk.weights.write()
        while walk.place < len(walk.paths):
            walk.learn(progress)
            saved.save(walk)
            walk.forget()
        walk.finish()
        masks = walk.weights.mask_file(network.tasks, method.origin, {})
    factors = {} if state is None else PartFactors(walk.weights)
    return Learned(walk.history, walk.weights.parameters, masks, walk.blocks, factors)


class _Walk:
    """The two streams, as far as they have come.

    Attributes:
        paths: the blocks' names, in the order in which they run.
        blocks: of every block that is done, what the record says of it.
    """

    def __init__(self, problem: Problem, method: AdaptiveMethod, network: AlignedCheckpoints, folder: Path) -> None:
        self._problem, self._settings, self._network = problem, problem.settings, network
        self._shared, self._grid = problem.models.shared, method.grid
        self._device = next(iter(self._shared.values())).device
        merged = [self._shared[name] for name in network.merged()]
        self._chains = {
            task: find_chain(problem.models.modules[task], problem.forward, inputs.step(0)[1], merged)
            for task, inputs in problem.inputs.items()
        }
        first = next(iter(self._chains.values()))
        self.paths, self.blocks = first.paths, list[dict[str, Any]]()
        self._inside = [self._names_in(first, place) for place in range(len(first))]
        outside = sorted(self._shared.keys() - {name for names in self._inside for name in names})
        of_blocks = [[name for name in network.merged() if name in names] for names in self._inside]
        parts = [*of_blocks, *([name] for name in network.merged() if name in outside)]
        self.weights = PartWeights(method, network, self._shared, self._settings, parts, folder, self._device)
        self._streams = Streams(folder / "streams", self._device)
        self.history = History({task: [] for task in problem.inputs})
        self._apart = {task: self._differing(task, outside) for task in problem.inputs}

    @property
    def place(self) -> int:
        """The block that is next."""
        return len(self.blocks)

    def begin(self) -> None:
        """Choose the start of all blocks, and judge it."""
        judge, started = self._problem.judge(), time.perf_counter()
        if self._grid.open:
            self.history.starts = find_start(self.weights, self._grid, self._problem.quick_check())
        self.weights.write()
        self.history.judged[0] = dict(judge(0))
        self.history.judging_seconds += time.perf_counter() - started

    def learn(self, progress: Progress | None) -> None:
        """Learn the next block, and bring both streams behind it. The networks hold it as it is kept."""
        started, place = time.perf_counter(), self.place
        with stage(f"Block {place + 1} of {len(self.paths)}: the experts'", len(self._chains)):
            for task in self._chains:
                with self._expert(task, place):
                    self._run(EXPERT, task, place)
                advance()
        live = self.weights.live(place)
        start = {name: tensor.detach().clone() for name, tensor in live.learned().items()}
        live.write()
        before = self._distances(place)
        units = {task: max(before[task], _SMALLEST) for task in before}
        self._take_steps(live, {task: self._loss(task, place, units[task]) for task in units}, progress)
        live.settle()
        after = self._distances(place)
        nearer = self._settings.keep == "last" or sum(after[t] / units[t] for t in units) < len(units)
        if not nearer:
            with torch.no_grad():
                for name, tensor in live.learned().items():
                    tensor.copy_(start[name])
            live.write()
        self.weights.rest(live)
        self.weights.keep(place, live)
        for task in self._chains:
            self._run(MERGED, task, place)
        self.blocks.append(
            {"block": self.paths[place], "before": _rounded(before), "after": _rounded(after), "kept": nearer}
        )
        self.history.seconds += time.perf_counter() - started

    def forget(self) -> None:
        """Let go of what no later block needs."""
        chain = next(iter(self._chains.values()))
        needed = chain.needed(self.place)
        for place in range(self.place):
            if place not in needed:
                self._streams.forget(place)

    def finish(self) -> None:
        """Judge the whole, and keep what leaves no task behind the start: all of it, a share of the way to it, or the start."""
        history, settings = self.history, self._settings
        judge, step, started = self._problem.judge(), history.step, time.perf_counter()
        self.weights.write()
        history.judged[step] = dict(judge(step))
        if settings.keep == "last":
            history.choice = Choice(step, "the last step, as keep: last asks")
        else:
            self._search_line(judge)
            history.choice = choose_best(history.judged, settings.tolerance, history.line_points)
            self.weights.share = history.choice.share if history.choice.step else 0.0
            self.weights.write()
        history.judging_seconds += time.perf_counter() - started

    def _search_line(self, judge: Judge) -> None:
        step = self.history.step
        point = LinePoint(step, 1.0, self.history.judged[step])
        for share in SHARES:
            if fits(point, self.history.judged, self._settings.tolerance):
                return
            self.weights.share = share
            self.weights.write()
            point = LinePoint(step, self.weights.share, dict(judge(step)))
            self.history.line_points.append(point)

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

    def _loss(self, task: str, place: int, unit: float) -> Loss:
        chain, inputs = self._chains[task], self._problem.inputs[task]

        def loss(step: int) -> Tensor:
            number = step % self._batches_of(task)
            _, batch = inputs.step(number)
            given = self._streams.read(MERGED, chain.needed(place), self._key(task, False, number))
            return self._distance(task, place, batch, given, self._key(task, False, number)) / unit

        return loss

    def _distance(self, task: str, place: int, batch: Any, given: Mapping[int, Given], key: str) -> Tensor:
        """‖z - e‖² / ‖e‖² over the positions that count: what the block gives in the merge, and what the expert's gave."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        merged = positions(hidden(self._chains[task].run(place, batch, given)), mask)
        expert = positions(hidden(self._streams.read(EXPERT, [place], key)[place]), mask).to(merged)
        return (merged - expert).square().sum() / expert.square().sum().clamp_min(_SMALLEST)

    @torch.no_grad()
    def _distances(self, place: int) -> dict[str, float]:
        """task -> mean distance on the judged batches, with what the networks hold."""
        distances = {}
        for task, chain in self._chains.items():
            values = []
            for key, batch in self._batches(task, judged=True):
                given = self._streams.read(MERGED, chain.needed(place), key)
                values.append(float(self._distance(task, place, batch, given, key)))
            distances[task] = sum(values) / len(values)
        return distances

    @torch.no_grad()
    def _run(self, stream: str, task: str, place: int) -> None:
        """Bring one of a task's streams behind a block, with the weights that the networks hold."""
        chain = self._chains[task]
        for judged in (False, True):
            for key, batch in self._batches(task, judged):
                given = self._streams.read(stream, chain.needed(place), key)
                self._streams.keep(stream, place, key, chain.run(place, batch, given))

    def _batches(self, task: str, judged: bool) -> Iterator[tuple[str, Any]]:
        """(key, batch): those that steps see, or those that are held out."""
        inputs = self._problem.inputs[task]
        chunks = inputs.judged_on() if judged else (inputs.step(number) for number in range(self._batches_of(task)))
        return ((self._key(task, judged, number), batch) for number, (_, batch) in enumerate(chunks))

    def _batches_of(self, task: str) -> int:
        """How many batches steps see: those of the first pass, again and again."""
        return min(self._problem.inputs[task].one_pass, max(1, self._settings.steps))

    def _key(self, task: str, judged: bool, number: int) -> str:
        return f"{list(self._chains).index(task)}-{'judged' if judged else 'adapt'}-{number}"

    @contextmanager
    def _expert(self, task: str, place: int) -> Iterator[None]:
        """While it is open, the networks hold a task's expert in a block and outside of blocks."""
        names = [*self._inside[place], *self._apart[task]]
        held = {name: self._shared[name].detach().clone() for name in names}
        self._problem.models.fill(member_tensors(self._network, self._network.experts[task], names))
        try:
            yield
        finally:
            self._problem.models.fill(held.items())

    def _names_in(self, chain: Chain, place: int) -> list[str]:
        block = chain.block(place)
        inside = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
        return [name for name, tensor in self._shared.items() if id(tensor) in inside]

    def _differing(self, task: str, names: Sequence[str]) -> list[str]:
        """Tensors that an expert may have otherwise than the merge: those that are merged, and kept ones that differ."""
        merged, expert = set(self._network.merged()), member_tensors(self._network, self._network.experts[task], names)
        return [
            name
            for name, tensor in expert
            if name in merged or not torch.equal(tensor.to(self._shared[name]), self._shared[name])
        ]


@dataclass(frozen=True)
class _Saved:
    """The state of a walk in its file, saved behind every block."""

    state: Path | None
    fingerprint: str

    def save(self, walk: _Walk) -> None:
        """What is not in files already."""
        if self.state is None:
            return
        history = walk.history
        content: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "losses": history.losses,
            "seconds": history.seconds,
            "resumed_from": history.resumed_from,
            "judged": {task: asdict(signals) for task, signals in history.judged[0].items()},
            "judging_seconds": history.judging_seconds,
            "starts": [asdict(tried) for tried in history.starts],
            "blocks": walk.blocks,
        }
        write_state(self.state, content, "the state")

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
