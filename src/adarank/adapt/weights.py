"""Adaptation of merged weights by a method: all of them at a time, or a block at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from adarank.adapt.by_block import adapt_by_block
from adarank.adapt.history import Learned, Progress
from adarank.adapt.methods import AdaptiveMethod
from adarank.adapt.origin_choice import with_origin
from adarank.adapt.passage import Passage
from adarank.adapt.problem import Problem
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.io import processes
from adarank.io.process_memory import give_back
from adarank.io.record import Note


def adapt_weights(
    problem: Problem,
    method: AdaptiveMethod,
    network: AlignedCheckpoints,
    device: torch.device | str,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
    note: Note = lambda text: None,
    passage: Passage | None = None,
    factors: Path | None = None,
) -> Learned:
    """Learn what the method learns, in place; by block as `adapt_by_block` says.

    Arguments:
        state, fingerprint, progress: as for `loop.adapt`.
        note: called with each stage as it begins.
        passage: over the problem's networks, where a block is learned at a time and one is there.
        factors: folder from whose files origins, task vectors and spectra are mapped; None to hold them in memory.
    """
    if method.settings.by == "block":
        note("Adapting, block by block")
        learned = adapt_by_block(problem, method, network, state, fingerprint, progress, passage)
        _check_alike(learned)
        return learned
    kept = state.with_name(f"origin-{fingerprint[:16]}.pt") if state else None
    method, agreement = with_origin(method, problem, network, kept=kept, state=state)
    if agreement and factors:  # names tell files about one origin from those about the other
        factors = factors.with_name(f"{factors.name}-{method.origin}")
    note("Decomposing the task vectors" if method.spectra else "Reading the task vectors")
    start = method.start(network, problem.models.shared, method.settings, device, factors)
    live = method.on(start, problem.models)
    give_back()
    note("Adapting")
    history = problem.adapt(live, method.grid, state, fingerprint, progress)
    live.settle()
    live.zero_grad()
    masks = live.mask_file(network.tasks, method.origin, {})
    learned = Learned(history, live.parameters, masks, factors=live.factors, origins=agreement)
    _check_alike(learned)
    return learned


def _check_alike(learned: Learned) -> None:
    """Refuse to go on where processes have learned different masks or λ."""
    masks = learned.masks
    numbers = [*masks.masks.values(), *masks.lam.values()] if masks is not None else []
    bits = [tensor.detach().cpu().numpy().tobytes() for tensor in numbers]
    processes.check_agreement("masks and λ", [hashlib.sha256(part).hexdigest() for part in bits])
