"""Masks: the file, the bits, the start; presets and settings: known by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import adarank
from adarank.adapt import ADAPTIVE, PRESETS, AdaptSettings
from adarank.adapt.presets import with_preset
from adarank.errors import CheckpointError, RecipeError
from adarank.methods import METHODS
from adarank.settings import Settings, parse
from adarank.sparsify.threshold import top_count
from adarank.spectral.mask_file import MaskFile
from adarank.spectral.masks import hard, kept, random_mask, scattered, soft, straight_through, top_mask
from make import generator, randn


def bits(seed: int, count: int, share: float = 0.5) -> Tensor:
    return torch.rand(count, generator=generator(seed)) < share


def mask_file(sizes: dict[str, tuple[int, ...]], tasks: int, soft: bool = False) -> MaskFile:
    lam = {name: randn(i, tasks) for i, name in enumerate([*sizes, "norm.weight"])}
    made = (lambda seed, count: randn(seed + 50, count)) if soft else bits
    masks = {name: made(i, sum(own)) for i, (name, own) in enumerate(sizes.items())}
    return MaskFile("average", tuple(f"t{i}" for i in range(tasks)), lam, masks, sizes, {"seed": 3, "note": "é"})


@given(st.integers(1, 4), st.lists(st.integers(1, 23), max_size=3), st.booleans())
def test_a_masks_file_reloaded_is_bit_for_bit_the_same(
    tmp_path_factory: pytest.TempPathFactory, tasks: int, ranks: list[int], soft: bool
) -> None:
    first = mask_file({f"m{i}.weight": (rank,) * tasks for i, rank in enumerate(ranks)}, tasks, soft)
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    first.save(path)
    second = MaskFile.load(path)
    assert (second.origin, second.tasks, second.about) == (first.origin, first.tasks, first.about)
    assert second.sizes == first.sizes
    assert list(second.lam) == list(first.lam)
    assert all(torch.equal(second.lam[n], first.lam[n]) for n in first.lam)
    assert set(second.masks) == set(first.masks)
    assert all(second.masks[n].dtype == first.masks[n].dtype for n in first.masks)
    assert all(torch.equal(second.masks[n], first.masks[n]) for n in first.masks)
    assert second.kept_share() == first.kept_share()


def test_kept_components_are_counted_per_task() -> None:
    file = mask_file({"m": (3, 3)}, 2)
    masks = MaskFile("average", file.tasks, file.lam, {"m": torch.tensor([1, 0, 1, 1, 1, 1]).bool()}, file.sizes, {})
    assert masks.kept("m") == [2, 3]
    assert masks.kept_share() == pytest.approx(5 / 6)


def test_of_soft_masks_what_is_nearer_to_kept_counts() -> None:
    values = torch.tensor([1.2, 0.499, -2.0, 0.5, 0.0, 3.0])
    masks = MaskFile("average", ("a", "b"), {"m": torch.ones(2)}, {"m": values}, {"m": (3, 3)}, {})
    assert masks.kept("m") == [1, 2]
    assert masks.kept_share() == pytest.approx(0.5)


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9), st.sampled_from([0.1, 0.3, 2.0]))
def test_a_soft_mask_counts_as_kept_where_the_binary_one_is(values: list[float], logit: float) -> None:
    logits = torch.tensor([*values, logit, -logit])
    mask = soft(logits, logit)
    assert mask[-2:].tolist() == [1.0, 0.0]
    clear = logits.abs() > 1e-6
    assert torch.equal(kept(mask)[clear], hard(logits)[clear])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_masks_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "masks.safetensors"
    mask_file({"m": (9, 9)}, 2).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="masks"):
        MaskFile.load(path)


def test_a_missing_masks_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none"):
        MaskFile.load(tmp_path / "none.safetensors")


HEADER = {"origin": "average", "tasks": ["a"], "tensors": ["w"], "about": {}, "sizes": {"w": [9]}}
FORMAT = "adarank-masks-1"
FOREIGN: dict[str, tuple[dict[str, str], dict[str, Tensor]]] = {
    "weights": ({"format": "pt"}, {"w": torch.ones(2)}),
    "other version": ({"format": "adarank-masks-0", "header": json.dumps(HEADER)}, {}),
    "no header": ({"format": FORMAT}, {"lambda": torch.ones(1, 1)}),
    "header is no JSON": ({"format": FORMAT, "header": "{"}, {"lambda": torch.ones(1, 1)}),
    "no lambda": ({"format": FORMAT, "header": json.dumps(HEADER)}, {"mask.w": torch.zeros(2, dtype=torch.uint8)}),
    "no mask": ({"format": FORMAT, "header": json.dumps(HEADER)}, {"lambda": torch.ones(1, 1)}),
    "too few bits": ({"format": FORMAT, "header": json.dumps(HEADER)},
                     {"lambda": torch.ones(1, 1), "mask.w": torch.zeros(1, dtype=torch.uint8)}),
    "lambda of another length": ({"format": FORMAT, "header": json.dumps(HEADER)},
                                 {"lambda": torch.ones(3, 1), "mask.w": torch.zeros(2, dtype=torch.uint8)}),
    "lambda of another number of tasks": ({"format": FORMAT, "header": json.dumps(HEADER)},
                                          {"lambda": torch.ones(1, 4), "mask.w": torch.zeros(2, dtype=torch.uint8)}),
    "soft mask of another length": ({"format": "adarank-masks-2", "header": json.dumps(HEADER)},
                                    {"lambda": torch.ones(1, 1), "mask.w": torch.zeros(8)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_or_damaged_masks_file_is_refused(tmp_path: Path, kind: str) -> None:
    metadata, tensors = FOREIGN[kind]
    save_file(tensors or {"x": torch.ones(1)}, tmp_path / "masks.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"masks\.safetensors"):
        MaskFile.load(tmp_path / "masks.safetensors")


def test_a_component_is_kept_from_exactly_zero() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    logits = torch.tensor([0.0, -0.0, tiny, -tiny, 5.0, -5.0])
    assert hard(logits).tolist() == [True, True, True, False, True, False]


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=9), st.sampled_from([0.3, 1.0, 10.0]))
def test_the_straight_through_slope_is_autograds_of_the_sigmoid(values: list[float], temperature: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    upstream = randn(1, len(values), dtype=torch.float64)
    torch.sigmoid(logits / temperature).backward(upstream)
    found = straight_through(upstream, logits.detach(), temperature)
    torch.testing.assert_close(found, logits.grad, rtol=1e-9, atol=1e-15)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 10**6))
def test_random_masks_keep_each_tasks_density(sizes: list[int], share: float, seed: int) -> None:
    own = tuple(sizes)
    mask = bits(seed, sum(own), share)
    shuffled = random_mask(mask, own, generator(seed))
    assert [int(p.sum()) for p in shuffled.split(own)] == [int(p.sum()) for p in mask.split(own)]
    assert shuffled.dtype == torch.bool
    assert torch.equal(shuffled, random_mask(mask, own, generator(seed)))


def test_random_masks_move_the_kept_components() -> None:
    mask = torch.arange(64) < 32
    assert not torch.equal(random_mask(mask, (64,), generator(0)), mask)
    assert not torch.equal(random_mask(mask, (64,), generator(0)), random_mask(mask, (64,), generator(1)))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.floats(0.01, 1))
def test_top_masks_keep_the_first_components_of_each_task(sizes: list[int], share: float) -> None:
    own = tuple(sizes)
    for part in top_mask(own, share).split(own):
        count = int(part.sum())
        assert count == (top_count(share, part.numel()) if part.numel() else 0)
        assert part[:count].all()


# Presets and settings


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_parses_for_every_adaptive_method(preset: str, method: str) -> None:
    found, settings = with_preset(ADAPTIVE[method], {}, {}, preset)
    for key, value in PRESETS[preset]["parameters"].items():
        assert found.model_dump(by_alias=True)[key] == value
    beside = ADAPTIVE[method].paper_loop(text=False) if preset == "paper" else {}
    for key, value in {**PRESETS[preset]["adapt"], **beside}.items():
        assert settings.model_dump(mode="json")[key] == value


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_keeps_to_the_papers(preset: str) -> None:
    """Entropy for every task, constant step sizes, the last step."""
    settings = with_preset(ADAPTIVE["adarank"], {}, {}, preset)[1]
    assert settings.weights("any") == {"entropy": 1.0}
    assert (settings.schedule, settings.keep) == ("constant", "last")


def test_the_defaults_follow_the_experts_and_keep_the_best_step() -> None:
    assert (AdaptSettings().objective, AdaptSettings().keep, AdaptSettings().tolerance) == ("self-label", "best", 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_by_hand_overrides_the_preset(preset: str) -> None:
    found, settings = with_preset(ADAPTIVE["adarank"], {"lambda": 9.5, "rank": 0.77}, {"steps": 3}, preset)
    assert (found.scale, found.rank, settings.steps) == (9.5, 0.77, 3)
    assert settings.batch_size == PRESETS[preset]["adapt"].get("batch_size", AdaptSettings().batch_size)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_setting_overrides_the_preset_under_either_name(method: str) -> None:
    preset = "roberta-7-cart"
    assert with_preset(ADAPTIVE[method], {"scale": 9.5}, {}, preset)[0].scale == 9.5


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'roberta-7-cart'"):
        with_preset(ADAPTIVE["adarank"], {}, {}, "roberta-7-crt")


@pytest.mark.parametrize(("kind", "key", "nearest"), [
    (AdaptSettings, "step", "steps"), (AdaptSettings, "batchsize", "batch_size"), (AdaptSettings, "lr_mask", "lr_masks"),
    (ADAPTIVE["adarank"], "lamda", "lambda"), (ADAPTIVE["adarank"], "learn_mask", "learn_masks"),
    (METHODS["cart"], "rnk", "rank"),
])  # fmt: skip
def test_an_unknown_key_is_answered_with_the_nearest(kind: type[Settings], key: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}: unknown key. Did you mean '{nearest}'"):
        parse(kind, {key: 1}, "settings")


def test_all_problems_of_the_settings_come_at_once() -> None:
    with pytest.raises(RecipeError, match="3 problem") as caught:
        parse(AdaptSettings, {"steps": -1, "batch_size": "many", "tempo": 3}, "adapt")
    assert all(part in str(caught.value) for part in ("adapt:", "steps", "batch_size", "tempo", "'many'"))


@pytest.mark.parametrize("values", [
    {"steps": 1.5}, {"steps": None}, {"lr_masks": -1}, {"lr_lambda": "x"}, {"schedule": "square"},
    {"lr_masks": float("nan")}, {"lr_masks": float("inf")}, {"lr_masks": "much"}, {"lr_masks": True},
])  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        parse(AdaptSettings, values, "adapt")


@pytest.mark.parametrize("clamp", [[1], [1.0, 0.0], 1, ["a", "b"]])
def test_a_range_of_lambda_that_makes_no_sense_is_refused(clamp: Any) -> None:
    with pytest.raises(RecipeError, match="clamp"):
        parse(ADAPTIVE["adamerging"], {"clamp": clamp}, "parameters")


def test_the_loop_has_at_most_fourteen_settings() -> None:
    assert len(AdaptSettings.model_fields) <= 14


def test_settings_that_are_no_more_are_refused_with_what_is() -> None:
    """All at once, beside what is wrong with the others."""
    assert not AdaptSettings.replaced.keys() & AdaptSettings.model_fields.keys()
    with pytest.raises(RecipeError) as caught:
        parse(AdaptSettings, {**dict.fromkeys(AdaptSettings.replaced, 1), "steps": -1}, "adapt")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(AdaptSettings.replaced) + 2
    for name, instead in AdaptSettings.replaced.items():
        assert any(f"{name}: is no setting any more: {instead}." in line for line in lines)


@pytest.mark.parametrize("name", ["adamerging", "cart++"])
def test_methods_without_masks_cannot_be_asked_to_learn_them(name: str) -> None:
    with pytest.raises(RecipeError, match="learn_masks"):
        with_preset(ADAPTIVE[name], {"learn_masks": True}, {}, None)


@pytest.mark.parametrize("kind", [*ADAPTIVE.values(), *METHODS.values(), AdaptSettings])
def test_settings_cannot_be_changed_after_they_are_made(kind: type[Settings]) -> None:
    fields = kind.model_fields.values()
    if not fields or any(field.is_required() for field in fields):
        return
    made = kind()
    with pytest.raises(ValueError, match="frozen"):
        setattr(made, next(iter(type(made).model_fields)), 1)


@pytest.mark.parametrize(
    ("parameters", "preset", "start"),
    [
        ({}, "paper", ("average", 0.16, 2.3)),
        ({"origin": "pretrained"}, "paper", ("pretrained", 1.0, 0.3)),
        ({"basis": "tsv_m"}, "paper", ("pretrained", 1.0, 1.0)),
        ({"basis": "iso_cts"}, "vit-b32-8-cart", ("pretrained", 1.0, 1.0)),
        ({"basis": "iso_c", "lambda": 0.7}, "roberta-7-cart", ("pretrained", 1.0, 0.7)),
        ({"origin": "pretrained", "rank": 0.5}, "paper", ("pretrained", 0.5, 0.3)),
        ({}, "vit-b32-20-ta", ("pretrained", 1.0, 0.05)),
        ({}, "gpt2-7-cart", ("average", 0.01, 1.3)),
    ],
)
def test_a_preset_starts_where_the_papers_start(
    parameters: dict[str, Any], preset: str, start: tuple[str, float, float]
) -> None:
    method, settings = with_preset(ADAPTIVE["adarank"], parameters, {}, preset)
    assert (method.origin, method.rank, method.scale) == start
    assert settings.objective == "entropy"


def test_random_starts_are_as_dense_as_top_ones_and_stay_put(problem: Any) -> None:
    base, experts, batches = problem

    def masks(**parameters: Any) -> torch.Tensor:
        start = {"rank": 0.5, "lambda": 0.7, "mask": "binary", "learn_masks": False, **parameters}
        adapted = adarank.adapt(base, experts, batches, settings={"steps": 3, "learn_heads": False}, parameters=start)
        return adapted.masks.masks["weight"]

    top, random = masks(), masks(first="random")
    sizes = (4, 4)
    assert [int(part.sum()) for part in random.split(sizes)] == [int(part.sum()) for part in top.split(sizes)] == [2, 2]
    assert torch.equal(random, masks(first="random"))
    assert any(not torch.equal(top, masks(first="random", seed=seed)) for seed in range(4))


@pytest.mark.parametrize("mask", ["soft", "binary"])
def test_shuffled_masks_keep_density_and_lambda(problem: Any, mask: str) -> None:
    base, experts, batches = problem
    start = {"rank": 0.25, "lambda": 0.7, "mask": mask}
    adapted = adarank.adapt(base, experts, batches, settings={"steps": 3, "learn_heads": False}, parameters=start)
    merges = [
        adarank.merge(base, experts, "masked", {"masks": adapted.masks, "shuffled": True, "seed": seed})["weight"]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(merges[0], merges[1])
    assert any(not torch.allclose(merges[0], other) for other in merges[2:])
    values, sizes = adapted.masks.masks["weight"], adapted.masks.sizes["weight"]
    for part, whole in zip(scattered(values, sizes, 0, "weight").split(sizes), values.split(sizes), strict=True):
        assert torch.equal(part.sort().values, whole.sort().values)
    plain = adarank.merge(base, experts, "masked", {"masks": adapted.masks})
    torch.testing.assert_close(plain["weight"], adapted.state["weight"])
