"""What happens to which tensor: by its name, shape and dtype, and as patterns say."""

from __future__ import annotations

import pytest
import torch

from adarank.alignment.selection import Select, choose, matching
from adarank.errors import RecipeError
from adarank.io.checkpoint import TensorInfo
from make import assert_accounted, family, network


@pytest.mark.parametrize(("name", "shape", "dtype", "text", "action"), [
    ("layer.weight", (4, 3), torch.float32, True, "decompose"),
    ("layer.weight", (4, 3), torch.float32, False, "decompose"),
    ("layer.bias", (4,), torch.float32, True, "scale"), ("conv.weight", (4, 3, 2, 2), torch.float32, True, "scale"),
    ("layer.weight", (1, 3), torch.float32, True, "scale"), ("factor", (), torch.bfloat16, True, "scale"),
    ("embeddings.word.weight", (9, 3), torch.float32, True, "keep"), ("wte.weight", (9, 3), torch.float32, True, "keep"),
    ("embeddings.word.weight", (9, 3), torch.float32, False, "scale"),
    ("embeddings.LayerNorm.bias", (3,), torch.float32, True, "scale"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), torch.float32, True, "scale"),
    ("layers.0.blocks.1.attn.relative_position_bias_table", (49, 4), torch.float32, False, "scale"),
    ("visual_projection.weight", (4, 6), torch.float32, False, "scale"), ("visual.proj", (6, 4), torch.float32, False, "scale"),
    ("text_projection", (6, 4), torch.float32, False, "scale"), ("text_projection.weight", (4, 6), torch.float32, False, "scale"),
    ("mm_projector.weight", (6, 4), torch.float32, False, "decompose"),
    ("position_ids", (1, 9), torch.int64, True, "keep"), ("mask", (4, 4), torch.bool, False, "keep"),
])  # fmt: skip
def test_the_default_action_is_read_off_the_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, text: bool, action: str
) -> None:
    assert choose(TensorInfo(name, shape, dtype, "f"), Select(), text).action == action


@pytest.mark.parametrize(("select", "name", "action"), [
    (Select(scale=("layer.0.*",)), "layer.0.dense.weight", "scale"),
    (Select(keep=("*.bias",)), "layer.1.dense.bias", "keep"),
    (Select(decompose=("conv.*",)), "conv.weight", "decompose"),
    (Select(decompose=("embed*",)), "embeddings.word_embeddings.weight", "decompose"),
    (Select(average=("embed*", "layer.1.*")), "embeddings.word_embeddings.weight", "average"),
    (Select(keep=("layer.[1-9].*",)), "layer.1.dense.weight", "keep"),
])  # fmt: skip
def test_a_pattern_overrides_the_default(select: Select, name: str, action: str) -> None:
    base, experts = family(2)
    net = network(base, experts, select, text_tasks=True)
    assert net.choices[name].action == action
    assert "recipe" in net.choices[name].reason
    others = network(base, experts, text_tasks=True).choices
    changed = {n for n in others if others[n].action != net.choices[n].action}
    assert all(net.choices[n].action == action for n in changed)
    assert_accounted(net)


def test_every_pattern_that_matches_nothing_is_named() -> None:
    base, experts = family(2)
    select = Select(keep=("layr.*", "layer.0.*"), scale=("Norm.*",), head=("clasifier.*",))
    with pytest.raises(RecipeError) as caught:
        network(base, experts, select)
    assert all(part in str(caught.value) for part in ("'layr.*'", "'Norm.*'", "'clasifier.*'"))
    assert "'layer.0.*'" not in str(caught.value)


@pytest.mark.parametrize("action", list(Select.model_fields))
def test_patterns_of_every_action_outlast_a_lost_model(action: str) -> None:
    select = Select(**{action: ["here.*", "*.lost"]})
    assert matching(select, ["here.weight"]) == Select(**{action: ["here.*"]})
