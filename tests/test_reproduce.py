"""The papers' benchmarks: what they list, what they ask for, and made models in the real formats brought through them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import ModelInfo
from safetensors.torch import load_file

from adarank.adapt.presets import PRESETS
from adarank.cli.main import main
from adarank.errors import RecipeError
from adarank.recipe import suites as module
from adarank.recipe.papers import ROWS
from adarank.recipe.reader import parse_recipe
from adarank.recipe.suites import families, rows, suite, suites
from adarank.workflow.reproduce import needed_files, reproduce
from image_zoo import processor
from open_clip_zoo import make_zoo

TABLES = yaml.safe_load((Path(module.__file__).parent / "suite_files" / "published.yaml").read_text())
OF_SETTING = {
    "adarank-b32": "vision-8-b32", "adarank-l14": "vision-8-l14", "roberta": "glue-7-roberta", "gpt2": "glue-7-gpt2",
    "cart-b32": "cart-vision-8-b32", "cart-l14": "cart-vision-8-l14",
}  # fmt: skip
# From the datasets' own papers and pages.
CLASSES = {
    "sun397": 397, "stanford-cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47,
    "oxford_flowers102": 102, "pcam": 2, "fer2013": 7, "oxford-iiit-pet": 37, "stl10": 10, "cifar100": 100, "cifar10": 10,
    "food101": 101, "fashion_mnist": 10, "emnist_letters": 26, "emnist_digits": 10, "kmnist": 10, "rendered-sst2": 2,
}  # fmt: skip


def test_the_catalogues_figures_are_those_of_the_tables() -> None:
    """Two listings of the papers, made apart from each other."""
    for row in ROWS:
        for setting, figure in row.figures.items():
            table = TABLES[OF_SETTING[setting]]
            last = [*table["rows"].get(row.name, [])][-1:]
            printed = [*last, table.get("means", {}).get(row.name), table.get("elsewhere", {}).get(row.name)]
            assert figure in printed, (row.name, setting, figure, printed)


@pytest.mark.parametrize(
    "name", ["vision-8-b32", "vision-8-l14", "fusion-bench-vision-8-b32", "fusion-bench-vision-8-l14"]
)
def test_means_of_tables_are_those_of_their_tasks(name: str) -> None:
    for row, values in TABLES[name]["rows"].items():
        assert abs(np.mean(values[:-1]) - values[-1]) < 0.16, row


@pytest.mark.parametrize("name", suites())
def test_every_row_of_every_suite_is_a_recipe(name: str) -> None:
    chosen = suite(name)
    assert len(chosen.tasks) == int(re.findall(r"-(\d+)-", name)[0])
    for row in rows():
        made = parse_recipe(chosen.recipe(row), Path())
        assert list(made.tasks) == list(chosen.tasks)
        assert made.data.protocol == "transductive"
        assert made.adapt is None or made.adapt.preset is None or made.adapt.preset in PRESETS
    for row, preset in chosen.presets.items():
        assert parse_recipe(chosen.recipe(*rows([row])), Path()).adapt.preset == preset  # type: ignore[union-attr]
    for task, spec in chosen.tasks.items():
        if "classes" in spec:
            assert len(set(spec["classes"])) == CLASSES[task]
            assert all(prompt.count("{}") == 1 for prompt in spec["templates"])


@pytest.mark.parametrize("name", suites())
def test_families_of_checkpoints_are_kept_apart(name: str) -> None:
    chosen = suite(name)
    for table in chosen.published:
        assert table.checkpoints in families()
        assert set(table.means) or set(table.scores)
        assert all(set(of) <= set(chosen.tasks) for of in table.scores.values())
    of_papers = {table.checkpoints for table in chosen.published if "AdaRank" in table.source}
    if name.endswith("-papers"):
        assert of_papers == {chosen.checkpoints}
    elif name.startswith("vision"):  # the papers' are in another layout, and not on the hub as single repositories
        assert of_papers <= {"task-vectors", "tall-masks"}
        assert chosen.checkpoints == "fusion-bench"


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'vision-8-b32'"):
        suite("vision-8-b23")
    with pytest.raises(RecipeError, match="no such row"):
        rows(["CARRT"])
    with pytest.raises(RecipeError, match="scored with every row"):
        rows(["Individual"])
    assert [row.name for row in rows(["cart"])] == ["CART"]


def test_the_ablation_differs_in_what_is_learned_alone() -> None:
    """Table 4: for each baseline neither, λ, masks, both."""
    chosen = suite("vision-8-b32")
    published = next(table for table in chosen.published if table.name == "vision-8-b32")
    cells = rows(["Table 4"])
    figures = {row.name: published.means[row.name] for row in cells}
    assert sorted(figures.values()) == [69.2, 79.9, 80.1, 84.7, 85.9, 87.9, 88.7, 89.2]
    for baseline in ("TA", "CART"):
        of_baseline = [row for row in cells if row.name.startswith(f"{baseline}+AdaRank")]
        methods = [parse_recipe(chosen.recipe(row), Path()).method() for row in of_baseline]
        assert [(m.learn_masks, m.learn_lambda) for m in methods] == [(False, True), (True, False), (True, True)]
        others = [m.model_dump(exclude={"learn_masks", "learn_lambda"}) for m in methods]
        assert others[0] == others[1] == others[2]
        assert len({parse_recipe(chosen.recipe(row), Path()).adapt.preset for row in of_baseline}) == 1  # type: ignore[union-attr]
    masks_only, start = rows(["CART+AdaRank, masks only", "CART at AdaRank's start"])
    large = suite("vision-8-l14")
    assert large.recipe(masks_only)["adapt"]["preset"] == "vit-l14-8-cart"
    assert large.recipe(start)["parameters"] == {"rank": 0.16, "lambda": 3.0}
    adapted = parse_recipe(chosen.recipe(masks_only), Path()).method()
    assert parse_recipe(chosen.recipe(start), Path()).method().model_dump().items() >= {"rank": adapted.rank, "scale": adapted.scale}.items()  # fmt: skip
    assert not {row.name for row in rows()} & {row.name for row in cells if "only" in row.name}


def test_a_budget_is_a_share_of_the_scored_inputs() -> None:
    small, whole = (parse_recipe(suite("vision-8-b32").recipe(row), Path()) for row in rows(["data budget"]))
    assert (small.data.budget, whole.data.budget) == (0.01, None)
    assert small.adapt == whole.adapt
    with pytest.raises(RecipeError, match="1% of data: adapts on a share of the inputs that are scored"):
        suite("vision-8-b32").recipe(rows(["TA+AdaRank, 1% of data"])[0], "disjoint")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def snapshot(cache: Path, repository: str) -> Path:
    """Where the files of a repository lie in a cache of the hub."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0a1b")
    (folder / "blobs").mkdir(exist_ok=True)
    place = folder / "snapshots" / "0a1b"
    place.mkdir(parents=True, exist_ok=True)
    return place


def test_a_dry_run_has_the_sizes_of_what_is_here(cache: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("config.json", "model.safetensors", "flax_model.msgpack", "pytorch_model.bin"):
        (snapshot(cache, "tanganke/gpt2_cola") / name).write_bytes(b"x" * len(name))
    data = tmp_path / "here" / "nyu-mll" / "glue" / "cola"
    data.mkdir(parents=True)
    (data / "validation.parquet").write_bytes(b"rows")
    assert main(["reproduce", "glue-7-gpt2", "--dry-run", "--from", str(tmp_path / "here"), "--json"]) == 0
    files = {
        (f["repository"], f["file"]): (f["bytes"], f["here"]) for f in json.loads(capsys.readouterr().out)["files"]
    }
    assert files["tanganke/gpt2_cola", "model.safetensors"] == (17, True)
    assert files["tanganke/gpt2_cola", "config.json"] == (11, True)
    assert files["nyu-mll/glue", "cola/validation.parquet"] == (4, True)
    assert files["tanganke/gpt2_rte", "*"] == (None, False)
    repositories = {
        "openai-community/gpt2",
        "nyu-mll/glue",
        *(f"tanganke/gpt2_{t}" for t in suite("glue-7-gpt2").tasks),
    }
    assert {repository for repository, _ in files} == repositories
    assert ("tanganke/gpt2_cola", "pytorch_model.bin") not in files  # one set of weights
    assert main(["reproduce", "glue-7-gpt2", "--dry-run"]) == 0
    assert "not known offline" in capsys.readouterr().out


@pytest.mark.parametrize("tower", ["B-32", "L-14"])
@pytest.mark.parametrize(("count", "family"), [(8, "task_vectors"), (14, "tall_masks"), (20, "tall_masks")])
def test_the_papers_own_models_and_data_are_listed(
    cache: Path, tmp_path: Path, tower: str, count: int, family: str
) -> None:
    name = f"{count}-{tower.replace('-', '').lower()}"
    listed = needed_files(f"vision-{name}-papers", tmp_path)
    assert {(file.repository, file.file) for file in listed if file.source == "model"} == {
        (f"{family}/ViT-{tower}", f"{model}/*") for model in ("base", *TABLES[f"vision-{name}"]["tasks"])
    }
    datasets_of = {file.repository for file in listed if file.source == "dataset"}
    assert len(datasets_of) == count
    assert datasets_of & {"tanganke/emnist_letters", "torchvision/emnist_digits"} == ({"torchvision/emnist_digits"} if count == 20 else set())  # fmt: skip


def test_the_papers_heads_have_torchvisions_classes() -> None:
    """Spelled as in `torchvision.datasets`; FusionBench spells them otherwise."""
    tasks = suite("vision-20-b32-papers").tasks
    assert tasks["kmnist"]["classes"] == ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
    assert tasks["fashion_mnist"]["classes"][0] == "T-shirt/top"
    assert tasks["food101"]["classes"][0] == "apple_pie"
    for task in ("oxford-iiit-pet", "cifar100"):
        assert tasks[task]["classes"] == suite("vision-14-l14-papers").tasks[task]["classes"]
    assert tasks["oxford-iiit-pet"]["classes"][1] == "American Bulldog"
    assert "crab" in tasks["cifar100"]["classes"]


def test_the_hub_tells_sizes_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        f"{task}/roberta-base_lr1e-05/{file}"
        for task in ("cola", "rte")
        for file in ("config.json", "pytorch_model.bin", "optimizer.pt")
    ]
    siblings = [{"rfilename": name, "size": len(name)} for name in names]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, files_metadata: ModelInfo(id=name, siblings=siblings))
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, files_metadata: 1 / 0)
    files = {f.file: f.bytes for f in needed_files("glue-7-roberta") if f.repository.startswith("vanillaOVO")}
    assert files == {name: len(name) for name in names if "optimizer" not in name}
    assert not cache.exists()


def make_clip_suite(cache: Path, here: Path, name: str) -> None:
    """Tiny models under the suite's names in a cache of the hub, and data in the datasets' formats under `here`."""
    chosen = suite(name)
    torch.manual_seed(0)
    words = sorted({word for spec in chosen.tasks.values() for text in (*spec["classes"], *spec["templates"])
                    for word in re.findall(r"\w+|[^\w\s]", text.lower())})  # fmt: skip
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {
        **tower,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 40,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    base = transformers.CLIPModel(config).eval()
    place = snapshot(cache, chosen.base)
    base.save_pretrained(place)
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=40).save_pretrained(place)
    processor().save_pretrained(place)
    for number, (task, expert) in enumerate(chosen.experts.items()):
        model = transformers.CLIPVisionModel(config.vision_config)
        state = {k: v for k, v in base.state_dict().items() if k.startswith("vision_model.")}
        model.load_state_dict(
            {k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}, strict=False
        )
        model.save_pretrained(snapshot(cache, expert))
        spec, rng = chosen.tasks[task], np.random.default_rng(number)
        images = [
            {"image": image, "label": int(rng.integers(len(spec["classes"])))}
            for image in rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        ]
        content = datasets.Dataset.from_list(
            images, features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        )
        _put(content, here, spec["data"])


def make_glue_suite(cache: Path, here: Path, name: str) -> None:
    chosen = suite(name)
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"])}
    tokens = transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=30)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40,
             "vocab_size": len(vocabulary), "pad_token_id": 0}  # fmt: skip
    if name == "glue-7-gpt2":
        kinds = transformers.GPT2Config, transformers.GPT2Model, transformers.GPT2ForSequenceClassification
    else:
        small |= {"intermediate_size": 16}
        kinds = transformers.RobertaConfig, transformers.RobertaModel, transformers.RobertaForSequenceClassification
    settings, bodies, classifiers = kinds
    body = bodies(settings(**small))
    for model, place in [(body, snapshot(cache, chosen.base))]:
        model.save_pretrained(place)
        tokens.save_pretrained(place)
    for number, (task, expert) in enumerate(chosen.experts.items()):
        classes = 3 if task == "mnli" else 2
        model = classifiers(settings(**small, num_labels=classes))
        model.base_model.load_state_dict(
            {k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v for k, v in body.state_dict().items()},
            strict=False,
        )
        organisation, repository, *inside = expert.split("/")
        place = snapshot(cache, f"{organisation}/{repository}") / "/".join(inside)
        model.save_pretrained(place)
        tokens.save_pretrained(place)
        rng, columns = np.random.default_rng(number), chosen.tasks[task]["columns"]
        rows_of = [
            {
                **{column: " ".join(rng.choice(list("abcdefgh"), 6)) for column in columns.values()},
                "label": int(i % classes),
            }
            for i in range(24)
        ]
        _put(datasets.Dataset.from_list(rows_of), here, chosen.tasks[task]["data"])


def _put(content: Any, here: Path, data: dict[str, Any]) -> None:
    """A split of a configuration in a folder, as repositories of datasets have it."""
    folder, config = here / data["dataset"], data.get("config", "default")
    (folder / config).mkdir(parents=True, exist_ok=True)
    content.to_parquet(folder / config / f"{data['split']}.parquet")
    card = folder / "README.md"
    known = yaml.safe_load(card.read_text().split("---\n")[1])["configs"] if card.exists() else []
    entry = {
        "config_name": config,
        "data_files": [{"split": data["split"], "path": f"{config}/{data['split']}.parquet"}],
    }
    card.write_text(f"---\n{yaml.safe_dump({'configs': [*known, entry]})}---\n")


def test_image_towers_on_the_hub_go_through_a_suite(cache: Path, tmp_path: Path, capsys: Any) -> None:
    make_clip_suite(cache, tmp_path / "here", "vision-8-b32")
    command = ["reproduce", "vision-8-b32", "--row", "Weight Averaging", "--row", "CART", "--limit", "12", "--from", str(tmp_path / "here"),
               "--to", str(tmp_path / "made")]  # fmt: skip
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["rows"]) == ["Pretrained", "Individual", "Weight Averaging", "CART"]
    assert set(result["inputs"].values()) == {12}  # of 20
    row = result["rows"]["Weight Averaging"]
    assert row["mean"] == pytest.approx(np.mean(list(row["scores"].values())))
    # the same checkpoints' published figures are compared, the papers' stand by themselves
    assert list(row["differences"]) == ["fusion-bench-vision-8-b32"]
    assert row["differences"]["fusion-bench-vision-8-b32"]["mean"] == pytest.approx(row["mean"] - 66.5)
    assert row["differences"]["fusion-bench-vision-8-b32"]["dtd"] == pytest.approx(row["scores"]["dtd"] - 50.9)
    assert result["published"]["vision-8-b32"]["means"]["CART+AdaRank"] == 89.2
    merged = load_file(tmp_path / "made" / "weight-averaging" / "model.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    experts = [
        load_file(next(snapshot(cache, e).glob("*.safetensors"))) for e in suite("vision-8-b32").experts.values()
    ]
    torch.testing.assert_close(
        merged[name], sum(e.get(name, e.get(name.removeprefix("vision_model."))) for e in experts) / 8
    )
    written = (tmp_path / "made" / "cart" / "adarank.json").stat().st_mtime_ns
    assert main([*command, "--format", "md"]) == 0  # what is merged is scored again, and not merged
    assert (tmp_path / "made" / "cart" / "adarank.json").stat().st_mtime_ns == written
    assert "difference \\[1\\]" in capsys.readouterr().out


def test_the_papers_checkpoints_go_through_a_suite(cache: Path, tmp_path: Path) -> None:
    """Models in open_clip's layout, in folders of the suite's names."""
    here, chosen = tmp_path / "here", suite("vision-8-b32-papers")
    zoo = make_zoo(tmp_path / "zoo", "model.")
    (here / chosen.base).parent.mkdir(parents=True)
    (zoo / "models" / "base").rename(here / chosen.base)
    for number, (task, expert) in enumerate(chosen.experts.items()):
        shutil.copytree(zoo / "models" / ("digits", "shapes")[number % 2], here / expert)
        classes, rng = len(chosen.tasks[task]["classes"]), np.random.default_rng(number)
        rows_of = [{"image": image, "label": int(rng.integers(classes))} for image in rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)]  # fmt: skip
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        _put(datasets.Dataset.from_list(rows_of, features=features), here, chosen.tasks[task]["data"])
    listed = {each.file for each in needed_files(chosen.name, here) if each.repository == "task_vectors/ViT-B-32"}
    assert {"base/open_clip_model.safetensors", "SUN397/open_clip_model.safetensors"} <= listed
    result = reproduce(chosen.name, tmp_path / "made", ["CART"], folder=here, device="cpu")
    assert {table.name for table in result.comparable()} == {"vision-8-b32", "vision-8-b32-later", "cart-vision-8-b32"}
    assert result.plain()["rows"]["CART"]["differences"]["vision-8-b32"]["mean"] == pytest.approx(result.means["CART"] - 84.7)  # fmt: skip
    assert "model.visual.transformer.resblocks.0.attn.in_proj_weight" in load_file(tmp_path / "made" / "cart" / "model.safetensors")  # fmt: skip


@pytest.mark.parametrize(("name", "of_cola", "mean"), [("glue-7-roberta", -3.59, 67.62), ("glue-7-gpt2", 5.87, 59.97)])
def test_text_experts_go_through_a_suite(cache: Path, tmp_path: Path, name: str, of_cola: float, mean: float) -> None:
    make_glue_suite(cache, tmp_path / "here", name)
    result = reproduce(
        name,
        tmp_path / "made",
        ["AdaMerging", "EMR-Merging"],
        steps=2,
        folder=tmp_path / "here",
        device="cpu",
    )
    assert not result.failed
    assert result.table.metric("cola") == "matthews"
    assert set(result.table.counts.values()) == {24}  # all of them are scored
    assert {result.table.metric(task) for task in result.suite.tasks if task != "cola"} == {"accuracy"}
    record = json.loads((tmp_path / "made" / "adamerging" / "adarank.json").read_text())
    assert record["adaptation"]["steps"] == 2
    assert record["adaptation"]["protocol"] == "transductive"
    published = {table.name: table for table in result.comparable()}
    assert published[name].scores["AdaMerging"]["cola"] == of_cola
    assert result.plain()["rows"]["AdaMerging"]["differences"][name]["mean"] == pytest.approx(
        result.means["AdaMerging"] - mean
    )
