"""Nothing of a checkpoint runs, nobody is asked on the terminal, and a local recipe opens no connection."""

from __future__ import annotations

import builtins
import io
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

import clip_zoo
import image_zoo
import text_zoo
from adarank import from_bundle
from adarank.cli.main import main
from adarank.errors import AdaRankError
from adarank.io.hub import resolve
from adarank.outputs.merged import load_task

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, ViTImageProcessor
class Config(BertConfig): model_type = 'unheard-of'
class Model(BertForSequenceClassification): pass
class Tokens(BertTokenizerFast): pass
class Processor(ViTImageProcessor): pass
"""
MAPS: dict[str, dict[str, Any]] = {
    "config.json": {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForSequenceClassification": "code.Model",
                    "AutoModelForImageClassification": "code.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Tokens", "code.Tokens"]},
    "preprocessor_config.json": {"AutoImageProcessor": "code.Processor"},
}  # fmt: skip
TYPES = {
    "config.json": "model_type",
    "tokenizer_config.json": "tokenizer_class",
    "preprocessor_config.json": "image_processor_type",
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A user who says yes to every question; returns the questions."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return questions


def bring_code(folder: Path, file: str, marker: Path, **changes: Any) -> None:
    """Give a model's folder code that leaves a mark when it is imported, and a configuration that names it."""
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, "auto_map": MAPS[file], **changes}))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_text_model_never_runs(
    tmp_path: Path, eager: list[str], file: str, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo, marker = text_zoo.make_zoo(tmp_path), tmp_path / "ran"
    recipe = text_zoo.recipe(zoo, **text_zoo.ADAPT)
    other = {} if known else {TYPES[file]: "unheard-of"}
    bring_code(zoo / "models" / "mood", file, marker, **other)
    codes = [
        main([command, str(recipe), *given])
        for command, *given in (["plan"], ["merge", str(tmp_path / "out")], ["evaluate"])
    ]
    told = capsys.readouterr().err
    assert not marker.exists()
    assert not eager
    if file == "config.json" and not known:
        assert codes == [1, 1, 1]
        assert "never runs code of a checkpoint" in told
        assert "trust_remote_code" not in told
    assert set(codes) <= {0, 1}
    assert known is False or set(codes) == {0}


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_beside_an_image_model_never_runs(
    tmp_path: Path, eager: list[str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo, marker = image_zoo.make_zoo(tmp_path), tmp_path / "ran"
    bring_code(zoo / "models" / "digits", file, marker, **{TYPES[file]: "unheard-of"})
    for command in ("merge", "evaluate"):
        given = [str(tmp_path / "out")] if command == "merge" else []
        assert main([command, str(image_zoo.recipe(zoo, **image_zoo.ADAPT)), *given]) == 1
    assert "never runs" in capsys.readouterr().err
    assert not marker.exists()
    assert not eager
    assert not (tmp_path / "out").exists()


def test_code_that_an_output_or_a_bundle_names_never_runs(tmp_path: Path, eager: list[str]) -> None:
    zoo, marker = text_zoo.make_zoo(tmp_path), tmp_path / "ran"
    assert main(["merge", str(text_zoo.recipe(zoo)), str(tmp_path / "out")]) == 0
    bring_code(tmp_path / "out" / "heads" / "mood", "config.json", marker, model_type="unheard-of")
    bring_code(tmp_path / "out", "config.json", marker, model_type="unheard-of")
    bring_code(zoo / "models" / "mood", "config.json", marker)  # of a known type: transformers' own class is used
    bundled = text_zoo.recipe(zoo, "bundle.yaml", merge_method="emr", parameters={})
    assert main(["merge", str(bundled), str(tmp_path / "bundle")]) == 0
    with pytest.raises(AdaRankError, match="never runs code"):
        load_task(tmp_path / "out", "mood")
    assert type(from_bundle(tmp_path / "bundle", "mood")).__module__.startswith("transformers.")
    assert not marker.exists()
    assert not eager


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_from_the_hub_are_refused(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = text_zoo.make_zoo(tmp_path)
    file = zoo / "models" / "mood" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: "kernels-community/attention"}))
    assert main(["plan", str(text_zoo.recipe(zoo))]) == 1
    assert "is code on the hub, and adarank never runs" in capsys.readouterr().err


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What asks for a connection or an address, from whatever thread. The hub's client thinks that it is online."""
    asked: list[str] = []

    def refused(name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            asked.append(f"{name} {given[-2:]}")
            raise OSError("no network in this test")

        return call

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refused(name))
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused(name))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_SAFETENSORS_CONVERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


def test_a_hub_id_asks_the_network_as_the_watch_notices(calls: list[str]) -> None:
    with pytest.raises(AdaRankError, match="not a local path"):
        resolve("nobody/nothing-at-all")
    assert calls


def test_text_recipes_open_no_connection(tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file

    zoo = text_zoo.make_zoo(tmp_path)
    old = zoo / "models" / "mood"  # an older file, which transformers likes to have converted by the hub
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    (zoo / "models" / "colour" / "additional_chat_templates").mkdir()
    recipe, bundled = text_zoo.recipe(zoo, **text_zoo.ADAPT), text_zoo.recipe(zoo, "b.yaml", merge_method="emr")
    for command in (
        ["plan", str(recipe)],
        ["merge", str(recipe), str(tmp_path / "out")],
        ["merge", str(bundled), str(tmp_path / "bundle")],
        ["evaluate", str(recipe), str(tmp_path / "out"), str(tmp_path / "bundle")],
        ["extract", str(tmp_path / "bundle"), str(tmp_path / "one"), "--task", "mood"],
        ["inspect", str(tmp_path / "one")],
    ):
        assert main(command) == 0, capsys.readouterr().err
    load_task(tmp_path / "out", "mood")
    from_bundle(tmp_path / "bundle", "colour")
    assert not calls


def test_image_recipes_and_datasets_open_no_connection(tmp_path: Path, calls: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    zoo = image_zoo.make_zoo(tmp_path)
    with np.load(zoo / "data" / "digits.npz") as arrays:
        columns = {"image": [row.tolist() for row in arrays["image"][:12]], "label": arrays["label"][:12].tolist()}
    datasets.Dataset.from_dict(columns).save_to_disk(str(zoo / "data" / "saved"))
    models = [image_zoo.expert("digits", data="data/saved"), image_zoo.expert("shapes")]
    recipe = image_zoo.recipe(zoo, models=models)
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    assert main(["evaluate", str(recipe), str(tmp_path / "out")]) == 0
    assert not calls


def test_zero_shot_recipes_open_no_connection(tmp_path: Path, calls: list[str]) -> None:
    zoo = clip_zoo.make_zoo(tmp_path)
    recipe = clip_zoo.recipe(zoo)
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    assert main(["evaluate", str(recipe), str(tmp_path / "out")]) == 0
    assert not calls


def test_the_hub_is_asked_again_after_a_local_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(AdaRankError):
        load_task(tmp_path, "a")
    zoo = text_zoo.make_zoo(tmp_path)
    main(["evaluate", str(text_zoo.recipe(zoo))])
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
