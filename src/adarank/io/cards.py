"""Model cards (README.md with YAML before the text): what those of inputs state, and the YAML of an output's.

Keys are the hub's: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

CARD = "README.md"
_OTHER = "other: "


@dataclass(frozen=True)
class Measured:
    """A score for a card's `model-index`.

    Attributes:
        kind: what the network does, such as `text-classification`.
        metric: as the hub calls it, such as `matthews_correlation`.
        name: of the metric, for people.
        value: as the hub has it: shares between 0 and 1.
    """

    kind: str
    task: str
    split: str
    metric: str
    name: str
    value: float


def stated_license(folder: Path) -> str | None:
    """The licence that the card in a folder states: the hub's identifier, or `other: NAME`; None if it states none.

    A card that cannot be read states none.
    """
    if not (folder / CARD).is_file():
        return None
    from huggingface_hub import metadata_load  # imported on use: it is slow

    try:
        stated = metadata_load(folder / CARD) or {}
    except (ValueError, TypeError, OSError, RecursionError, yaml.YAMLError):
        return None
    value = stated.get("license")
    names = [str(name) for name in (value if isinstance(value, list) else [value]) if name not in (None, "", "unknown")]
    if names == ["other"]:
        return f"{_OTHER}{stated.get('license_name') or 'not named'}"
    return ", ".join(sorted(names)) or None


def front_matter(
    base_model: Sequence[str],
    tags: Sequence[str],
    library: str,
    license: str | None,
    name: str = "",
    measured: Sequence[Measured] = (),
) -> str:
    """The YAML block of a card, with the lines around it.

    Arguments:
        license: as `stated_license` gives it; None leaves the key out.
        name: of the model, where there are scores.

    Example:
        text = front_matter(["org/base"], ["merge"], "transformers", "mit")
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=each.kind,
            dataset_type=each.task,
            dataset_name=each.task,
            dataset_split=each.split,
            metric_type=each.metric,
            metric_name=each.name,
            metric_value=each.value,
        )
        for each in measured
    ]
    data = ModelCardData(
        base_model=list(base_model) or None,
        tags=list(tags),
        library_name=library,
        license="other" if license and license.startswith(_OTHER) else license,
        license_name=license.removeprefix(_OTHER) if license and license.startswith(_OTHER) else None,
        model_name=name or None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"
