"""The settings that the papers released, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from adarank.adapt.settings import AdaptSettings
from adarank.errors import RecipeError
from adarank.settings import nearest, parse

if TYPE_CHECKING:
    from adarank.adapt.methods import AdaptiveMethod

A = TypeVar("A", bound="AdaptiveMethod")

# What all the papers do: entropy, constant step sizes, all the steps that are set, the last one kept. Everything that
# the result depends on is written down, so that a default that changes changes no preset. Step size and batch size are
# those of AdaRank's Appendix A on images; what it has on text, and how many steps, is `AdaRank.paper_loop`.
_PAPER: dict[str, Any] = {
    "by": "model", "objective": "entropy", "objectives": {}, "schedule": "constant", "keep": "last", "lr_masks": 1e-3,
    "lr_lambda": 1e-3, "batch_size": 16, "steps": 200, "learn_heads": False,
}  # fmt: skip
# Two batches of 16 a step, as the released loop really uses. AdaMerging++ takes the same.
_ADAMERGING = {**_PAPER, "batch_size": 32, "steps": 500}
_CLAMPED = {"lambda": 0.3, "clamp": (0.0, 1.0)}


def _preset(
    origin: str, scale: float, rank: float, batch_size: int, steps: int, lr: float = 1e-3
) -> dict[str, dict[str, Any]]:
    return {
        "parameters": {"origin": origin, "lambda": scale, "rank": rank},
        "adapt": {**_PAPER, "batch_size": batch_size, "steps": steps, "lr_masks": lr, "lr_lambda": lr},
    }


# The values of the released configurations, by model and number of tasks; all else is the method's `paper`. For ViT-L/14
# with 20 tasks about the base the released file has λ 1.0 and rank 0.3, which look exchanged; both are kept as released.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"parameters": {}, "adapt": _PAPER},
    "vit-b32-8-ta": _preset("pretrained", 0.3, 1.0, 16, 10_000),
    "vit-b32-8-cart": _preset("average", 2.3, 0.16, 16, 10_000),
    "vit-b32-14-ta": _preset("pretrained", 0.3, 1.0, 16, 10_000),
    "vit-b32-14-cart": _preset("average", 2.8, 0.32, 16, 10_000),
    "vit-b32-20-ta": _preset("pretrained", 0.05, 1.0, 16, 10_000),
    "vit-b32-20-cart": _preset("average", 2.4, 0.32, 16, 10_000),
    "vit-l14-8-ta": _preset("pretrained", 0.3, 1.0, 4, 10_000),
    "vit-l14-8-cart": _preset("average", 3.0, 0.16, 4, 10_000),
    "vit-l14-14-ta": _preset("pretrained", 0.3, 1.0, 2, 100_000),
    "vit-l14-14-cart": _preset("average", 1.25, 0.16, 2, 100_000),
    "vit-l14-20-ta": _preset("pretrained", 1.0, 0.3, 2, 100_000),
    "vit-l14-20-cart": _preset("average", 1.0, 0.16, 2, 100_000),
    "roberta-7-ta": _preset("pretrained", 0.3, 1.0, 8, 5_000, 5e-5),
    "roberta-7-cart": _preset("average", 1.6, 0.04, 8, 5_000, 1e-4),
    "gpt2-7-ta": _preset("pretrained", 0.3, 1.0, 8, 5_000, 5e-5),
    "gpt2-7-cart": _preset("average", 1.3, 0.01, 8, 5_000, 5e-5),
    "adamerging": {"parameters": _CLAMPED, "adapt": _ADAMERGING},
    "adamerging-task": {"parameters": {**_CLAMPED, "lambda_per": "task"}, "adapt": _ADAMERGING},
}


def with_preset(
    kind: type[A], parameters: Mapping[str, Any], adapt: Mapping[str, Any], preset: str | None, text: bool = False
) -> tuple[A, AdaptSettings]:
    """An adaptive method and its loop's settings: preset first, then what is given by hand.

    Arguments:
        text: the tasks are of texts, so that `paper` is what the papers have for language models.

    Raises:
        RecipeError: an unknown preset, or settings that do not fit.
    """
    if preset is not None and preset not in PRESETS:
        raise RecipeError(f"adapt: unknown preset '{preset}'.{nearest(preset, PRESETS)}")
    values = PRESETS[preset] if preset else {"parameters": {}, "adapt": {}}
    preferred = {key: field.alias for key, field in kind.model_fields.items() if field.alias}
    given = {preferred.get(key, key): value for key, value in parameters.items()}
    # released starts are of plain task vectors: with another basis it is that of its static method
    released = values["parameters"] if given.get("basis", "task_vectors") == "task_vectors" else {}
    start = {**kind.paper(given, text), **released} if preset else {}
    loop = {**kind.defaults, **values["adapt"], **(kind.paper_loop(text) if preset == "paper" else {})}
    method = parse(kind, {**start, **given}, f"parameters of '{kind.name}'")
    return method, parse(AdaptSettings, {**loop, **adapt, **_blocks(loop, adapt)}, "adapt")


def _blocks(loop: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks of settings that both have: what is given by hand changes its own keys alone."""
    shared = {key: (loop[key], given[key]) for key in loop.keys() & given.keys()}
    return {
        key: {**of, **by_hand}
        for key, (of, by_hand) in shared.items()
        if isinstance(of, dict) and isinstance(by_hand, dict)
    }
