"""Checkpoints of open_clip become folders that compute the same, and nothing that a pickle names is run."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import adarank
from adarank.cli.main import main
from adarank.errors import CheckpointError
from adarank.io.pickled_modules import load_module_state
from open_clip_zoo import SIDE, Block, Clip, QuickGELU, Transformer, Visual


class ImageEncoder(nn.Module):
    """As task_vectors pickles it: the model inside, with things that are no tensors beside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train_preprocess, self.cache_dir = {"resize": (SIDE, SIDE)}, "/somewhere"


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip().eval()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that the pickles name, and that fails when anything is taken of it afterwards."""
    module = ModuleType("src_modeling")
    for kind in (ImageEncoder, Clip, Visual, Transformer, Block, QuickGELU):
        monkeypatch.setattr(kind, "__module__", "src_modeling")
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "src_modeling", module)
    return module


def saved(content: Any, file: Path, old: bool = False) -> Path:
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    sys.modules.pop("src_modeling", None)  # it cannot be imported where the file is read
    return file


IMAGES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("old", [False, True])
def test_a_pickled_encoder_becomes_a_tower_of_equal_outputs(
    clip: Clip, elsewhere: ModuleType, tmp_path: Path, old: bool
) -> None:
    tower = nn.Module()
    tower.visual, tower.logit_scale = clip.visual, clip.logit_scale
    file = saved(ImageEncoder(tower), tmp_path / "finetuned.pt", old)
    record = adarank.convert(file, tmp_path / "out")
    assert record["converted"]["architecture"] == "CLIPVisionModelWithProjection"
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).image_embeds, clip.visual(IMAGES), atol=1e-4, rtol=1e-4)
    assert adarank.verify(tmp_path / "out").ok


@pytest.mark.parametrize("form", ["state", "wrapped", "safetensors"])
def test_a_whole_state_dict_becomes_a_whole_clip(clip: Clip, tmp_path: Path, form: str) -> None:
    state = clip.state_dict()
    file = tmp_path / ("zeroshot.safetensors" if form == "safetensors" else "zeroshot.pt")
    if form == "safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    else:
        torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}} if form == "wrapped" else state, file)
    assert main(["convert", str(file), str(tmp_path / "out"), "--json"]) == 0
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[28, 3, 4, 5, 29, 0, 0], [28, 9, 29, 0, 0, 0, 0]])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=IMAGES)
        text, image = (functional.normalize(x, dim=-1) for x in (clip.text(ids), clip.visual(IMAGES)))
    torch.testing.assert_close(out.text_embeds, text, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.logits_per_image, clip.logit_scale.exp() * image @ text.T, atol=1e-3, rtol=1e-4)


def test_a_model_without_its_text_layers_is_a_tower(clip: Clip, tmp_path: Path) -> None:
    """As task_vectors saves models: of the text tower all but its transformer is there."""
    state = {f"model.{n}": t for n, t in clip.state_dict().items() if not n.startswith("transformer.")}
    torch.save(state, tmp_path / "zeroshot.pt")
    record = adarank.convert(tmp_path / "zeroshot.pt", tmp_path / "out")
    assert record["converted"]["architecture"] == "CLIPVisionModelWithProjection"
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).image_embeds, clip.visual(IMAGES), atol=1e-4, rtol=1e-4)


def test_settings_beside_the_weights_decide_what_shapes_do_not(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    save_file(clip.state_dict(), tmp_path / "given" / "open_clip_model.safetensors")
    settings = {"model_cfg": {"vision_cfg": {"head_width": 32}, "text_cfg": {"heads": 4}}, "preprocess_cfg": {"mean": [0.5] * 3}}  # fmt: skip
    (tmp_path / "given" / "open_clip_config.json").write_text(json.dumps(settings))
    adarank.convert(tmp_path / "given" / "open_clip_model.safetensors", tmp_path / "kept", layout="open_clip")
    adarank.convert(tmp_path / "kept" / "model.safetensors", tmp_path / "out")  # what the first wrote says the same
    config = transformers.CLIPConfig.from_pretrained(tmp_path / "out")
    assert (config.vision_config.hidden_act, config.text_config.hidden_act) == ("gelu", "gelu")
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (4, 4)
    assert list(transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == [0.5] * 3


@pytest.mark.parametrize("content", ["[]", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": {"head_width": "wide"}}}'])
def test_settings_that_are_none_are_named(clip: Clip, tmp_path: Path, content: str) -> None:
    torch.save(clip.state_dict(), tmp_path / "whole.pt")
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        adarank.convert(tmp_path / "whole.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Runs:
    """What runs a command when it is unpickled as pickles usually are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("old", [False, True])
def test_no_code_of_a_pickle_runs(clip: Clip, tmp_path: Path, old: bool) -> None:
    torch.save(
        {"bad": Runs(tmp_path / "ran"), **clip.state_dict()},
        tmp_path / "bad.pt",
        _use_new_zipfile_serialization=not old,
    )
    state = load_module_state(tmp_path / "bad.pt")
    assert set(state) == set(clip.state_dict())
    assert not (tmp_path / "ran").exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(CheckpointError):
        load_module_state(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


def test_names_of_a_module_are_those_of_its_state_dict(clip: Clip, elsewhere: ModuleType, tmp_path: Path) -> None:
    state = load_module_state(saved(ImageEncoder(clip), tmp_path / "whole.pt"))
    wanted = {f"model.{name}": tensor for name, tensor in clip.state_dict().items()}
    assert set(state) == set(wanted)
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_what_is_no_clip_is_refused(clip: Clip, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    torch.save({**clip.state_dict(), "visual.attnpool.weight": torch.ones(2)}, tmp_path / "resnet.pt")
    torch.save({"visual.conv1.weight": torch.ones(4, 3, 2, 2)}, tmp_path / "part.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4")
    for name, words in [
        ("other", "no image tower of open_clip"),
        ("resnet", "have no place"),
        ("part", r"part.pt: laid out .* 'visual.positional_embedding' is missing"),
        ("damaged", "damaged"),
        ("missing", "no such file"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            adarank.convert(tmp_path / f"{name}.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
