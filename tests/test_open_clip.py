"""Merges and adaptation in open_clip's own layout: judged by PyTorch's attention, by `CLIPModel` and by NumPy's SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

import adarank
from adarank.adapt import AdaptSettings
from adarank.errors import RecipeError
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.build_networks import build_models
from adarank.workflow.load_tasks import load_tasks
from clip_zoo import CLASSES, recipe
from open_clip_zoo import SIDE, Clip, make_zoo

IMAGES = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
PACKED = "visual.transformer.resblocks.1.attn.in_proj_weight"
WEIGHTS = "open_clip_model.safetensors"
ADAPT: dict[str, Any] = {"merge_method": "adarank", "parameters": {"rank": 0.25, "lambda": 0.8, "origin": "pretrained"},
                         "adapt": {"steps": 4, "batch_size": 4, "learn_heads": False, "keep": "last"}}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="module")
def adapted(zoo: Path) -> Path:
    adarank.merge_recipe(recipe(zoo, "adapt.yaml", **ADAPT), zoo / "adapted")
    return zoo / "adapted"


def state(zoo: Path, model: str) -> dict[str, Tensor]:
    return load_file(zoo / "models" / model / WEIGHTS)


@torch.no_grad()
def by_clip(folder: Path, zoo: Path, classes: tuple[str, ...]) -> Tensor:
    """Logits of a converted model as CLIP of `transformers` gives them."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(zoo / "models" / "base")
    prompts = [f"a photo of a {name}." for name in classes]
    text = tokens(prompts, padding=True, truncation=True, max_length=7, return_tensors="pt")
    out: Tensor = model(text["input_ids"], IMAGES, text["attention_mask"]).logits_per_image
    return out


@torch.no_grad()
def logits(module: Any) -> Tensor:
    out: Tensor = module(pixel_values=IMAGES).logits
    return out


def test_adapted_outputs_load_and_score(zoo: Path, adapted: Path, tmp_path: Path) -> None:
    merged, base = load_file(adapted / "model.safetensors"), state(zoo, "base")
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in base.items()}
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert PACKED in moved
    assert all(name.startswith("visual.") for name in moved)
    adarank.convert(adapted / "model.safetensors", tmp_path / "converted")
    for task, classes in CLASSES.items():
        scored = logits(adarank.load_task(adapted, task))
        torch.testing.assert_close(scored, by_clip(tmp_path / "converted", zoo, classes), atol=1e-3, rtol=1e-3)
    table = adarank.evaluate_recipe(zoo / "adapt.yaml", [adapted])
    assert set(table.rows) == {"base", "experts", str(adapted)}


def test_the_packed_matrix_is_decomposed_as_one(zoo: Path, tmp_path: Path) -> None:
    job = open_job(load_recipe(recipe(zoo, "cart.yaml", parameters={"rank": 0.25, "lambda": 1.5})))
    actions = {name: choice.action for name, choice in job.network.choices.items()}
    assert {actions[name] for name in ("visual.proj", "visual.conv1.weight", "visual.positional_embedding")} == {
        "scale"
    }
    assert {actions[name] for name in ("text_projection", "token_embedding.weight", "logit_scale")} == {"keep"}
    decomposed = {name.partition("resblocks.")[2][2:] for name, action in actions.items() if action == "decompose"}
    assert decomposed == {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    adarank.merge_recipe(zoo / "cart.yaml", tmp_path / "out")
    experts = [state(zoo, task)[PACKED].double().numpy() for task in CLASSES]
    mean = np.mean(experts, axis=0)
    wanted = mean.copy()
    for expert in experts:
        u, s, vh = np.linalg.svd(expert - mean, full_matrices=False)
        kept = int(0.25 * len(s))
        wanted += 1.5 * (u[:, :kept] * s[:kept]) @ vh[:kept]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged[PACKED].double(), torch.from_numpy(wanted), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_packed_matrix(zoo: Path) -> None:
    job = open_job(load_recipe(recipe(zoo, "adapt.yaml", **ADAPT)))
    models = build_models(job)
    live: Any = job.method.start(job.network, models.shared, AdaptSettings(), "cpu")  # type: ignore[attr-defined]
    live.write()
    head = models.heads["digits"]["classifier.weight"]
    models.modules["digits"](pixel_values=IMAGES).logits.logsumexp(-1).sum().backward()
    row = list(live.blocks).index(PACKED)
    lam, mask = live.used_lam()[row], live.masks()[PACKED]
    grad = models.shared[PACKED].grad
    assert grad is not None
    gradient = live.blocks[PACKED].gradient(grad, lam, mask, True)
    # the same number by autograd through the network of PyTorch's own attention
    clip, start = Clip().eval(), {name: tensor.detach() for name, tensor in models.shared.items()}
    free_lam, free_mask = lam.clone().requires_grad_(), mask.to(lam).clone().requires_grad_()
    base, total = state(zoo, "base")[PACKED], state(zoo, "base")[PACKED].clone()
    for task, (name, part) in enumerate(zip(CLASSES, free_mask.chunk(2), strict=True)):
        u, s, vh = torch.linalg.svd(state(zoo, name)[PACKED] - base, full_matrices=False)
        total = total + free_lam[task] * (u * (part * s)) @ vh
    torch.testing.assert_close(total, start[PACKED], atol=1e-4, rtol=1e-4)
    tower = {name.removeprefix("visual."): tensor for name, tensor in {**start, PACKED: total}.items()}
    features = functional.normalize(functional_call(clip.visual, tower, (IMAGES,)), dim=-1)
    (features @ head.T).logsumexp(-1).sum().backward()
    assert free_lam.grad is not None
    assert free_mask.grad is not None
    torch.testing.assert_close(gradient.lam, free_lam.grad, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(gradient.mask, free_mask.grad, atol=1e-3, rtol=1e-2)


def test_both_layouts_merge_alike_where_nothing_is_decomposed(zoo: Path, tmp_path: Path) -> None:
    change: dict[str, Any] = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}}
    adarank.merge_recipe(recipe(zoo, "plain.yaml", **change), tmp_path / "packed")
    for model in ("base", *CLASSES):
        adarank.convert(zoo / "models" / model / WEIGHTS, tmp_path / "models" / model)
    transformers.AutoTokenizer.from_pretrained(zoo / "models" / "base").save_pretrained(tmp_path / "models" / "base")
    (tmp_path / "data").symlink_to(zoo / "data")
    adarank.merge_recipe(recipe(tmp_path, **change), tmp_path / "apart")
    for task in CLASSES:
        packed, apart = (logits(adarank.load_task(tmp_path / out, task)) for out in ("packed", "apart"))
        torch.testing.assert_close(packed, apart, atol=1e-3, rtol=1e-3)


def test_names_keep_what_stands_before_them(tmp_path: Path) -> None:
    folder = make_zoo(tmp_path / "zoo", "model.")
    plain = state(folder, "shapes")  # an expert that was saved without the prefix, and in another form
    (folder / "models" / "shapes" / WEIGHTS).unlink()
    torch.save({n.removeprefix("model."): t for n, t in plain.items()}, folder / "models" / "shapes" / "finetuned.pt")
    adarank.merge_recipe(recipe(folder, merge_method="average"), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(merged) == set(state(folder, "base"))
    clip = Clip().eval()
    clip.load_state_dict({name.removeprefix("model."): tensor for name, tensor in merged.items()})
    module: Any = adarank.load_task(tmp_path / "out", "digits")
    with torch.no_grad():
        wanted = functional.normalize(clip.visual(IMAGES), dim=-1) @ module.classifier.weight.T
    torch.testing.assert_close(logits(module), wanted, atol=1e-4, rtol=1e-4)


def test_a_base_without_its_text_tower_is_refused(tmp_path: Path) -> None:
    folder = make_zoo(tmp_path, keep_text=False)
    with pytest.raises(RecipeError, match=r"with its text tower; missing from .*resblocks.0.attn.in_proj_weight"):
        open_job(load_recipe(recipe(folder)))


def test_layouts_that_differ_are_named(zoo: Path, tmp_path: Path) -> None:
    adarank.convert(zoo / "models" / "digits" / WEIGHTS, tmp_path / "digits")
    mixed = recipe(zoo, "mixed.yaml")
    mixed.write_text(mixed.read_text().replace("models/digits", str(tmp_path / "digits")))
    with pytest.raises(RecipeError, match=r"task 'digits': .* laid out as by transformers, .*base as by open_clip"):
        open_job(load_recipe(mixed))


def test_conversion_may_leave_every_tensor_as_it_is(zoo: Path, tmp_path: Path) -> None:
    given = state(zoo, "base")
    save_file({f"model.{name}": tensor for name, tensor in given.items()}, tmp_path / "whole.safetensors")
    adarank.convert(tmp_path / "whole.safetensors", tmp_path / "out", layout="open_clip")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(given)
    assert all(torch.equal(written[name], tensor) for name, tensor in given.items())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(np.full((SIDE, SIDE, 3), 255, dtype=np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("method", "change"), [
    ("surgery", {"adapt": {"steps": 2, "batch_size": 4}, "parameters": {"rank": 4}}),
    ("wemoe", {"adapt": {"steps": 2, "batch_size": 4}}),
    ("emr", {}),
    ("adarank", {**ADAPT, "adapt": {"steps": 2, "batch_size": 4, "objective": "features", "learn_heads": True}}),
    ("adarank", {**ADAPT, "adapt": {"steps": 2, "batch_size": 4, "by": "block"}}),
])  # fmt: skip
def test_what_looks_inside_networks_takes_packed_ones(zoo: Path, tmp_path: Path, method: str, change: Any) -> None:
    path = recipe(zoo, "inside.yaml", **{**change, "merge_method": method})
    adarank.merge_recipe(path, tmp_path / "out")
    assert set(adarank.evaluate_recipe(path, [tmp_path / "out"]).rows) >= {"base", "experts"}
    adarank.load_task(tmp_path / "out", "shapes")


def test_regmean_fits_the_packed_matrix_to_what_it_is_given(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, "regmean.yaml", merge_method="regmean", parameters={"off_diagonal": 1.0})
    adarank.merge_recipe(path, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[PACKED].double()
    clip, left = Clip().eval(), torch.zeros_like(merged)
    data = load_tasks(open_job(load_recipe(path)))
    size = 0.0
    for task in CLASSES:
        clip.load_state_dict(state(zoo, task))
        given: list[Tensor] = []
        handle = clip.visual.transformer.resblocks[1].ln_1.register_forward_hook(lambda m, a, out: given.append(out))  # noqa: B023
        with torch.no_grad():
            clip.visual(data[task].examples.batch(data[task].splits.rows["adapt"])["pixel_values"])
        handle.remove()
        x = given[0].flatten(0, 1).double()
        gram, expert = x.T @ x / len(x), state(zoo, task)[PACKED].double()
        left += (merged - expert) @ gram
        size += float((expert @ gram).abs().max())
    assert float(left.abs().max()) < 1e-3 * size  # the normal equations Σ (W - W_t) G_t = 0
    mean = sum(state(zoo, task)[PACKED].double() for task in CLASSES) / len(CLASSES)
    assert float((merged - mean).abs().max()) > 1e-3


def test_one_task_is_taken_out_of_an_output(adapted: Path, tmp_path: Path) -> None:
    adarank.extract(adapted, "shapes", tmp_path / "shapes")
    alone, merged = load_file(tmp_path / "shapes" / "model.safetensors"), load_file(adapted / "model.safetensors")
    assert set(alone) == set(merged)
    assert all(torch.equal(alone[name], tensor) for name, tensor in merged.items())
    assert torch.equal(*(logits(adarank.load_task(place, "shapes")) for place in (adapted, tmp_path / "shapes")))


def test_heads_from_files_need_no_text_tower(zoo: Path, tmp_path: Path) -> None:
    folder = make_zoo(tmp_path / "zoo", keep_text=False)
    made = build_models(open_job(load_recipe(recipe(zoo, "made.yaml"))))
    files = {}
    for task in CLASSES:
        rows = made.heads[task]["classifier.weight"].detach()
        head = torch.nn.Linear(rows.shape[1], rows.shape[0])
        head.load_state_dict({"weight": rows, "bias": torch.zeros(len(rows))})
        torch.save(head, tmp_path / f"head_{task}.pt")  # as task_vectors saves them
        files[task] = {"head_file": str(tmp_path / f"head_{task}.pt"), "classes": None}
    adarank.merge_recipe(recipe(folder, tasks=files, merge_method="average"), tmp_path / "by_files")
    adarank.merge_recipe(recipe(zoo, "made.yaml", merge_method="average"), tmp_path / "by_text")
    for task in CLASSES:
        by_files, by_text = (logits(adarank.load_task(tmp_path / out, task)) for out in ("by_files", "by_text"))
        assert torch.equal(by_files, by_text)
    assert adarank.verify(tmp_path / "by_files").ok
    wrong = {**files, "shapes": {**files["shapes"], "classes": ["one", "two"], "templates": ["{}"]}}
    with pytest.raises(
        RecipeError, match=r"(?s)templates change nothing of a head_file.*has 3 rows, and classes names 2"
    ):
        open_job(load_recipe(recipe(folder, "wrong.yaml", tasks=wrong)))
    torch.save({"weight": torch.ones(2, 24), "bias": torch.ones(2)}, tmp_path / "biased.pt")
    biased = {**files, "digits": {"head_file": str(tmp_path / "biased.pt")}}
    with pytest.raises(RecipeError, match="'bias', which is not zero"):
        open_job(load_recipe(recipe(folder, "wrong.yaml", tasks=biased)))
