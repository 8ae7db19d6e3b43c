"""Kinds of parameters that adaptive methods have, and which of them go together."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from adarank.adapt.start_search import AUTO
from adarank.adapt.tying import LambdaPer
from adarank.settings import nearest
from adarank.spectral.bases import BASES


def _number_or_auto(given: Any) -> Any:
    if given != AUTO and (isinstance(given, bool) or not isinstance(given, (int, float))):
        raise ValueError("a number or auto was needed")
    return given


def _share_or_auto(given: Any) -> Any:
    if _number_or_auto(given) != AUTO and not 0 < given <= 1:
        raise ValueError("a share above 0 and at most 1, or auto, was needed")
    return given


def known_basis(given: str) -> str:
    """The name of a basis, if there is one of that name; else a `ValueError`."""
    if given not in BASES:
        raise ValueError(f"unknown basis.{nearest(given, BASES)}")
    return given


Number = Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)]
OriginSetting = Literal["pretrained", "average", "auto"]
Share = Annotated[float | Literal["auto"], BeforeValidator(_share_or_auto)]


def block_problems(lambda_per: LambdaPer, adapt: Collection[str]) -> list[str]:
    """What means nothing where a block is learned at a time, in sentences.

    Arguments:
        adapt: names of the loop's settings that are given by hand.
    """
    problems = [
        f"adapt.{key}: by: block minimises the distance to what the experts' blocks give, of the last, where no head is learned, to their predictions. Remove {key}, or use by: model."
        for key in ("objective", "objectives", "self_label")
        if key in adapt
    ]
    if lambda_per in ("task", "model"):
        problems.append(
            f"lambda_per: one λ for each {lambda_per} cannot be learned a block at a time. Use tensor, layer or shared-layer, or by: model."
        )
    return problems


def with_its_origin(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of `adarank` with the origin that goes without saying: of another basis the base, of numbers as in CART the average."""
    if values.get("basis", "task_vectors") != "task_vectors":
        origin = values.get("origin", AUTO)
        return {"rank": 1.0, **values, "origin": "pretrained" if origin == AUTO else origin}
    numbers = [name for name in ("rank", "lambda", "scale") if values.get(name, AUTO) != AUTO]
    return {"origin": "average", **values} if numbers else values
