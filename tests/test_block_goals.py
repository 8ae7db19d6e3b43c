"""What blocks are learned towards, a block at a time: the experts' states, or their predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import adarank
import text_zoo
from test_by_block import ALL, FAST, LAYERS, adapted, batches, models, run


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    text_zoo.make_zoo(folder)
    return folder


@pytest.mark.parametrize(("method", "heads"), [("adarank", False), ("adarank", True), ("prodistill", False)])
def test_every_block_comes_nearer_to_its_goal(method: str, heads: bool) -> None:
    """Blocks to what the experts' give, by hooks in whole networks; AdaRank's last, without heads, to their predictions."""
    few = {**ALL, "lambda": 0.1} if method == "adarank" else {"lambda": 0.1}
    faster = {**FAST, "learn_heads": heads} if method == "adarank" else {"lr_lambda": 0.05, "learn_heads": False}
    to_predictions = method == "adarank" and not heads
    kept, start = (adapted("ab", few, {**faster, "steps": steps, "keep": "last"}, method=method) for steps in (40, 0))
    experts, given = models("ab")[1], batches("ab")

    @torch.no_grad()
    def states_apart(result: adarank.Adapted, task: str, layer: int) -> float:
        seen: list[Tensor] = []
        for module in (result.modules[task], experts[task]):
            handle = module.layers[layer].register_forward_hook(lambda layer, taken, output: seen.append(output[0]))  # type: ignore[union-attr, operator]
            module(torch.cat(given[task]))
            handle.remove()
        return float((seen[0] - seen[1]).square().sum() / seen[1].square().sum())

    @torch.no_grad()
    def predictions_apart(result: adarank.Adapted, task: str) -> float:
        merged, expert = (
            module(torch.cat(given[task])).log_softmax(-1) for module in (result.modules[task], experts[task])
        )
        return float((expert.exp() * (expert - merged)).sum(-1).mean())

    assert kept.history.step == 40 * LAYERS
    ahead = LAYERS - 1 if to_predictions else LAYERS
    for task in "ab":
        for layer in range(1, ahead):
            assert states_apart(kept, task, layer) < 0.9 * states_apart(start, task, layer)
        if to_predictions:
            assert predictions_apart(kept, task) < 0.8 * predictions_apart(start, task)


def test_no_block_is_learned_by_the_models_own_certainty(zoo: Path) -> None:
    """A preset's entropy is of whole networks: by block all go to the experts' states."""
    for name, settings, last in (("preset", {"preset": "paper"}, "states"), ("plain", {}, "predictions")):
        report = run(text_zoo, zoo, name, steps=2, **settings)
        assert [block["goal"] for block in report["blocks"]] == ["states", last]
