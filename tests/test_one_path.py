"""Recipe and Python adapt alike: one problem given both ways gives the same masks and λ, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adarank
from adarank.recipe.reader import load_recipe
from adarank.spectral.mask_file import FILE, MaskFile
from adarank.workflow.build_networks import family_of
from adarank.workflow.load_tasks import load_tasks
from text_zoo import ADAPT, make_zoo, recipe

STEPS = 6
FAST = {"keep": "last", "steps": STEPS, "lr_masks": 0.05, "lr_lambda": 0.05}
# A row's logits may differ in the last bit by the rows beside it. So a step sees all rows, as whoever predicts them does.
WHOLE = {"check_every": 3, "batch_size": 36}
KEEP = ["*embeddings*"]
GIVEN = {"rank": 0.25, "lambda": 1.0}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def by_recipe(
    zoo: Path, folder: Path, parameters: Mapping[str, Any], loop: Mapping[str, Any]
) -> tuple[MaskFile, dict[str, Any]]:
    """Masks and λ, and the report."""
    path = recipe(zoo, **{**ADAPT, "parameters": dict(parameters), "adapt": dict(loop), "select": {"keep": KEEP}})
    report = adarank.merge_recipe(load_recipe(path), folder / "out")["adaptation"]
    return MaskFile.load(folder / "out" / FILE), report


def by_modules(zoo: Path, parameters: Mapping[str, Any], loop: Mapping[str, Any]) -> adarank.Adapted:
    """The same networks and inputs, handed over as modules and batches."""
    job = adarank.open_job(load_recipe(recipe(zoo, **ADAPT)))
    family, data = family_of(job), load_tasks(job)
    base = transformers.AutoModel.from_pretrained(zoo / "models" / "base")
    experts = {task: family.load(expert) for task, expert in job.experts.items()}
    count = 1 if loop.get("by") == "block" else STEPS  # blocks see the batches of one pass again and again
    batches = {task: [own.adapt_batch(step, loop["batch_size"]) for step in range(count)] for task, own in data.items()}
    held_out = {task: [batch for _, batch in own.scored_batches("select", 10**9)] for task, own in data.items()}
    given = {"forward": family.logits, "select": adarank.Select(keep=tuple(KEEP)), "held_out": held_out}
    return adarank.adapt(base, experts, batches, "adarank", parameters, loop, **given)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a start that is found": ({}, {**WHOLE, **FAST}),
    "features": (GIVEN, {**WHOLE, **FAST, "objective": {"features": 1.0, "self-label": 0.5}}),
    "features of layers": (
        GIVEN,
        {**WHOLE, **FAST, "objective": {"features": 1.0}, "self_label": {"layers": ["*encoder.layer.0"]}},
    ),
    "block by block": ({"lambda": 1.0}, {**WHOLE, **FAST, "by": "block"}),
    "a running mean": (GIVEN, {**WHOLE, **FAST, "objective": "infomax"}),
    "the paper's preset": ({}, {**WHOLE, **FAST, "preset": "paper"}),
}


@pytest.mark.parametrize("case", CASES)
def test_recipe_and_python_give_the_same_masks(zoo: Path, tmp_path: Path, case: str) -> None:
    written, report = by_recipe(zoo, tmp_path, *CASES[case])
    adapted = by_modules(zoo, *CASES[case])
    for one, other in ((written.lam, adapted.masks.lam), (written.masks, adapted.masks.masks)):
        assert one.keys() == other.keys()  # their order is that of the file, or of the module
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert len({float(value) for values in written.lam.values() for value in values}) > 10  # something was learned
    assert report["starts"] == [start.named() for start in adapted.history.starts]
    assert report["step_kept"] == adapted.history.choice.step
