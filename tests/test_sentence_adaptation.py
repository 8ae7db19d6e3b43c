"""Sentence encoders with tasks: vectors as `sentence-transformers` makes them, adapted to the experts', scored on pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import adarank
from adarank.data.spec import TaskSpec
from adarank.errors import CheckpointError, DataError
from adarank.io.checkpoint import Checkpoint
from adarank.models.sentence_encoders import SentenceEncoders, pooling
from head_zoo import ADAPT, SMALL, moved, recipe, tokenizer, words, write_rows
from make import randn

KIND = "sentence-similarity"
PAIRS = {"columns": {"text_pair": "other"}}


def encoder(folder: Path, body: Any, dense: dict[str, torch.Tensor], **pooled: Any) -> None:
    """A folder as `SentenceTransformer.save` lays it out: BERT, Pooling, Dense with tanh, Normalize."""
    body.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    parts = ["Transformer", "Pooling", "Dense", "Normalize"]
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    files: dict[str, Any] = {
        "modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{part}"}
                         for i, (path, part) in enumerate(zip(paths, parts, strict=True))],
        "sentence_bert_config.json": {"max_seq_length": 20},
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, **pooled},
        "2_Dense/config.json": {"in_features": 16, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file(dense, folder / "2_Dense" / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer()), **SMALL)
    body = transformers.BertModel(config)
    dense = {"linear.weight": randn(1, 8, 16), "linear.bias": randn(2, 8)}
    encoder(folder / "models" / "base", body, dense)
    for task in ("a", "b"):
        expert = transformers.BertModel(config)
        expert.load_state_dict(moved(body.state_dict()))
        encoder(folder / "models" / task, expert, moved(dense))
        rng = random.Random(task)
        write_rows(folder / "data" / f"{task}.jsonl", [
            {"text": " ".join(words(rng)), "other": " ".join(words(rng)), "label": round(5 * rng.random(), 1)} for _ in range(60)
        ])  # fmt: skip
    return folder


@torch.no_grad()
def vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    """(texts, 8) by the formulas, one text at a time, from the folder's files alone."""
    body, tokens = transformers.BertModel.from_pretrained(folder).eval(), tokenizer()
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    means = [body(**tokens(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return functional.normalize((torch.stack(means) @ dense["linear.weight"].T + dense["linear.bias"]).tanh())


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data" / f"{task}.jsonl").read_text().splitlines()]


def test_vectors_are_those_of_the_modules_in_turn(zoo: Path) -> None:
    family, texts = SentenceEncoders(), [row["text"] for row in rows_of(zoo, "a")[:5]]
    module = family.load(Checkpoint(zoo / "models" / "a"))
    spec = TaskSpec(name="a")
    examples, _ = family.encode({"text": texts}, spec, zoo / "models" / "a")
    given = family.logits(module, examples.batch(range(5)))
    assert given.shape == (5, 1, 8)
    assert torch.allclose(given[:, 0], vectors(zoo / "models" / "a", texts), atol=1e-5)


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_pairs_are_scored_by_their_cosines(zoo: Path, metric: str) -> None:
    path = recipe(
        zoo, KIND, f"{metric}.yaml", task={**PAIRS, "metric": metric}, data={"adapt": 0, "select": 0, "test": 1}
    )
    table = adarank.evaluate_recipe(path, [])
    for task in ("a", "b"):
        rows = rows_of(zoo, task)
        sides = [vectors(zoo / "models" / task, [row[column] for row in rows]) for column in ("text", "other")]
        correlate = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}[metric]
        wanted = correlate((sides[0] * sides[1]).sum(-1).numpy(), [row["label"] for row in rows]).statistic
        assert table.rows["experts"][task] == pytest.approx(100 * wanted, abs=0.05)


@pytest.mark.parametrize("pairs", [True, False])
def test_adaptation_turns_vectors_towards_the_experts(zoo: Path, tmp_path: Path, pairs: bool) -> None:
    task = PAIRS if pairs else {}
    if not pairs:  # similarities are of two texts
        for name in ("a", "b"):
            write_rows(zoo / "data" / f"{name}-alone.jsonl", [{"text": row["text"]} for row in rows_of(zoo, name)])
    models = [{"model": f"models/{n}", "task": {"name": n, "data": f"data/{n}{'' if pairs else '-alone'}.jsonl", **task}} for n in ("a", "b")]  # fmt: skip
    adarank.merge_recipe(
        recipe(zoo, KIND, "cart.yaml", models=models, merge_method="cart", parameters=ADAPT["parameters"]),
        tmp_path / "cart",
    )
    adarank.merge_recipe(recipe(zoo, KIND, "adapted.yaml", models=models, **ADAPT), tmp_path / "adapted")

    def cosine(out: Path) -> float:
        each = [
            (vectors(out, texts) * vectors(zoo / "models" / name, texts)).sum(-1).mean()
            for name in ("a", "b")
            for texts in [[row["text"] for row in rows_of(zoo, name)[:30]]]
        ]
        return float(torch.stack(each).mean())

    assert 1 - cosine(tmp_path / "adapted") < 0.9 * (1 - cosine(tmp_path / "cart"))
    names = {f.relative_to(zoo / "models" / "a").as_posix() for f in (zoo / "models" / "a").rglob("*") if f.is_file()}
    assert names <= {f.relative_to(tmp_path / "adapted").as_posix() for f in (tmp_path / "adapted").rglob("*")}


def test_blocks_are_adapted_and_a_task_is_extracted(zoo: Path, tmp_path: Path) -> None:
    by_block = {**ADAPT, "adapt": {**ADAPT["adapt"], "by": "block", "steps": 8}}
    path, out = recipe(zoo, KIND, "blocks.yaml", task=PAIRS, **by_block), tmp_path / "out"
    first = adarank.merge_recipe(path, out)["adaptation"]["blocks"][0]
    assert sum(first["after"].values()) < sum(first["before"].values())
    adarank.extract(out, "a", tmp_path / "a")
    texts = [row["text"] for row in rows_of(zoo, "a")[:5]]
    assert torch.equal(vectors(tmp_path / "a", texts), vectors(out, texts))
    assert (tmp_path / "a" / "modules.json").read_text() == (out / "modules.json").read_text()
    assert (tmp_path / "a" / "1_Pooling" / "config.json").is_file()


def test_a_folder_without_modules_is_read_by_the_mean(tmp_path: Path) -> None:
    body = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer()), **SMALL)).eval()
    body.save_pretrained(tmp_path / "plain")
    module = SentenceEncoders().load(Checkpoint(tmp_path / "plain"))
    tokens = tokenizer()("red one", return_tensors="pt")
    given = SentenceEncoders().logits(module, {key: value[:, None] for key, value in tokens.items()})
    assert torch.allclose(given[0, 0], body(**tokens).last_hidden_state[0].mean(0), atol=1e-6)


@pytest.mark.parametrize(("mode", "wanted"), [
    ("cls_token", lambda t, n: t[0]), ("lasttoken", lambda t, n: t[n - 1]), ("max_tokens", lambda t, n: t[:n].amax(0)),
    ("mean_tokens", lambda t, n: t[:n].mean(0)), ("mean_sqrt_len_tokens", lambda t, n: t[:n].sum(0) / n**0.5),
    ("weightedmean_tokens", lambda t, n: (t[:n] * torch.arange(1, n + 1)[:, None]).sum(0) / (n * (n + 1) / 2)),
])  # fmt: skip
def test_poolings_leave_padding_out(mode: str, wanted: Any) -> None:
    tokens, mask = randn(3, 2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    given = pooling({f"pooling_mode_{mode}": True}, "here")(tokens, mask)
    for row, count in enumerate((3, 5)):
        assert torch.allclose(given[row], wanted(tokens[row], count), atol=1e-6)


def test_poolings_are_joined() -> None:
    tokens, mask = randn(4, 2, 3, 4), torch.ones(2, 3)
    given = pooling({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "here")(tokens, mask)
    assert torch.equal(given, torch.cat([tokens[:, 0], tokens.mean(1)], dim=-1))


def test_unknown_modules_and_poolings_are_refused(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pooling that is known"):
        pooling({"pooling_mode": "star"}, "here")
    body = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer()), **SMALL))
    encoder(tmp_path / "odd", body, {"linear.weight": randn(1, 8, 16), "linear.bias": randn(2, 8)})
    listed = json.loads((tmp_path / "odd" / "modules.json").read_text())
    listed[3]["type"] = "sentence_transformers.models.LSTM"
    (tmp_path / "odd" / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"3_Normalize: modules of kind LSTM can be merged, and neither"):
        SentenceEncoders().load(Checkpoint(tmp_path / "odd"))


def test_similarities_of_single_texts_are_refused(zoo: Path) -> None:
    with pytest.raises(DataError, match="similarities are of two texts"):
        adarank.evaluate_recipe(recipe(zoo, KIND, "single.yaml"), [])


def test_a_task_of_a_bundle_is_a_whole_sentence_encoder(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, KIND, "emr.yaml", task=PAIRS, merge_method="emr", data={"adapt": 0, "select": 0, "test": 1})
    adarank.merge_recipe(path, tmp_path / "out")
    given = next(row for name, row in adarank.evaluate_recipe(path, [tmp_path / "out"]).rows.items() if "out" in name)
    adarank.extract(tmp_path / "out", "a", tmp_path / "a")
    rows = rows_of(zoo, "a")
    sides = [vectors(tmp_path / "a", [row[column] for row in rows]) for column in ("text", "other")]
    wanted = scipy.stats.spearmanr((sides[0] * sides[1]).sum(-1).numpy(), [row["label"] for row in rows]).statistic
    assert given["a"] == pytest.approx(100 * wanted, abs=0.05)
    assert (tmp_path / "a" / "1_Pooling" / "config.json").is_file()
