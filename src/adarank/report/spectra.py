"""Spectra, effective ranks and the overlap of task vectors, before and after masks and λ, as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from adarank.report.figures import spectrum

NONE = (
    "The method learned no masks, so there is no before and after. "
    "adarank analyse ranks RECIPE and adarank analyse interference RECIPE have these figures of the experts."
)


def described(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the record says of spectra and overlap; None of a method that learns no masks, or decomposed no matrix."""
    return (record.get("adaptation") or {}).get("spectra")


def ranks(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """Effective ranks of every matrix and group, and each group's mean spectrum as a chart."""
    groups = spectra["groups"]
    rows = [
        {
            "name": name,
            "cells": [
                {"before": before, "after": after, "of": count}
                for before, after, count in zip(of["rank"], of["rank_kept"], of["components"], strict=True)
            ],
        }
        for name, of in spectra["matrices"].items()
    ]
    charts = []
    for place, group in enumerate(groups):
        before, after = mean_share(spectra, "rank", place), mean_share(spectra, "rank_kept", place)
        label = f"{group}: mean singular values along the rank. 95% of the energy in {100 * before:.1f}% of the components before, {100 * after:.1f}% after."
        charts.append(
            {"task": group, "chart": spectrum(label, spectra["spectra"][group], spectra["spectra_kept"][group])}
        )
    return {"groups": groups, "rows": rows, "charts": charts}


def overlap(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """Cosines of each pair of groups, and singular-task interference of each matrix, before and after."""
    groups = spectra["groups"]
    pairs = [
        {
            "name": f"{groups[one]} and {groups[other]}",
            "before": spectra["cosines"][one][other],
            "after": spectra["cosines_kept"][one][other],
        }
        for one, other in combinations(range(len(groups)), 2)
    ]
    cosines = [
        {
            "name": group,
            "cells": [None if here == there else spectra["cosines_kept"][here][there] for there in range(len(groups))],
        }
        for here, group in enumerate(groups)
    ]
    most = max((abs(pair["after"]) for pair in pairs), default=0.0) or 1.0
    matrices = [
        {"name": name, "before": of["interference"], "after": of["interference_kept"]}
        for name, of in spectra["matrices"].items()
    ]
    return {"groups": groups, "pairs": pairs, "cosines": cosines, "most": most, "matrices": matrices}


def mean_share(spectra: Mapping[str, Any], key: str, place: int | None = None) -> float:
    """Mean over matrices (and groups, if none is given) of an effective rank ÷ the number of components."""
    shares = [
        rank / count
        for of in spectra["matrices"].values()
        for group, (rank, count) in enumerate(zip(of[key], of["components"], strict=True))
        if count and place in (None, group)
    ]
    return _mean(shares)


def in_words(spectra: Mapping[str, Any]) -> list[str]:
    """Sentences: how ranks and overlap changed."""
    before, after = mean_share(spectra, "rank"), mean_share(spectra, "rank_kept")
    of = spectra["matrices"].values()
    one, other = _mean([m["interference"] for m in of]), _mean([m["interference_kept"] for m in of])
    said = [
        f"95% of the task vectors' energy lies in {100 * before:.1f}% of their components, with masks and λ in {100 * after:.1f}%; "
        f"the interference of their strongest components went from {one:.1f} to {other:.1f} times the sum of singular values."
    ]
    pairs = overlap(spectra)["pairs"]
    if pairs:
        nearest = max(pairs, key=lambda pair: pair["before"])
        said.append(
            f"The nearest task vectors are those of {nearest['name']}: their cosine is {nearest['before']:.2f}, with masks and λ {nearest['after']:.2f}."
        )
    return said


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
