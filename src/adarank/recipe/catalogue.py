"""The catalogue of methods, read off the methods themselves."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, get_args

import annotated_types  # pydantic's own vocabulary of bounds

from adarank.adapt.methods import ADAPTIVE, AdaptiveMethod
from adarank.adapt.multitask import Multitask
from adarank.adapt.presets import PRESETS
from adarank.adapt.settings import AdaptSettings
from adarank.errors import RecipeError
from adarank.methods import METHODS, Informed, Masked, Method
from adarank.methods.per_tensor import TensorWeights
from adarank.modular import MODULAR, Modular
from adarank.settings import Settings, nearest
from adarank.spectral.mask_file import MaskFile


@dataclass(frozen=True)
class Setting:
    """One setting: its name in recipes, default, allowed range and meaning."""

    name: str
    default: str
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        needs: models and data, and whether labels are read.
        reads: how often checkpoints and inputs are gone through.
        memory: what is held at a time; `adarank plan` reckons the bytes for a recipe.
    """

    name: str
    summary: str
    formula: str
    needs: str
    reads: str
    memory: str
    settings: tuple[Setting, ...]
    source: str


_UNLABELLED = "base, experts and unlabelled inputs of each task; no labels"
_STEPS = "the checkpoints to start and to merge; each expert's inputs once for its answers; a batch of each task every step, forward and backward"


def catalogue() -> dict[str, Entry]:
    """Method name -> entry; adaptive methods and the reference last."""
    found = {name: _entry(kind, _needs(kind), _reads(kind), _memory(kind), ()) for name, kind in METHODS.items()}
    for name, kind in ADAPTIVE.items():
        fixed = {"learn_masks"} if name != "adarank" else set()
        parts = "spectra" if kind().spectra else "task vectors"
        memory = f"all merged tensors, their origins and gradients, their experts' {parts}, and one task's batch"
        found[name] = _entry(kind, _UNLABELLED, _STEPS, memory, (AdaptSettings,), fixed)
    for name, module in MODULAR.items():
        needs = f"{_UNLABELLED}; in use it must know {module.knows}"
        memory = "the network twice, what each task has for its own, and one task's batch"
        found[name] = _entry(module, needs, _STEPS, memory, (AdaptSettings,), None, module)
    reads = "the base to start; a batch of each task every step, forward and backward"
    memory = "all weights, their gradients and AdamW's two moments, and one task's batch"
    found[Multitask.name] = _entry(Multitask, Multitask.needs, reads, memory, ())
    return found


def entry(name: str) -> Entry:
    """One method.

    Raises:
        RecipeError: no such method.
    """
    found = catalogue()
    if name not in found:
        raise RecipeError(f"methods: unknown method '{name}'.{nearest(name, found)}")
    return found[name]


def presets() -> dict[str, dict[str, Any]]:
    """Preset name -> the parameters and adapt settings it stands for."""
    return {name: {key: dict(values) for key, values in preset.items()} for name, preset in PRESETS.items()}


def _needs(kind: type[Method]) -> str:
    models = "base and experts" if getattr(kind, "origin", None) == "pretrained" else "experts"
    if kind is Masked:
        models = "base, experts and a masks file"
    data = f"{models}, and {kind.data}" if kind.data else f"{models}; no data"
    return f"{data}; in use, each input's task" if kind.task_aware else data


def _reads(kind: type[Method]) -> str:
    checkpoints = "the checkpoints once" if kind.passes == 1 else f"the checkpoints {kind.passes} times"
    if not issubclass(kind, Informed):
        return checkpoints
    return f"{checkpoints} to merge, and before it each expert with its inputs once"


def _memory(kind: type[Method]) -> str:
    """What merging a tensor holds, as the memory plan counts it: a number of copies that may grow with the tasks."""
    masks: dict[str, Any] = {"masks": MaskFile("average", (), {}, {}, {}, {})}  # which `masked` alone has
    method = kind.model_construct(**masks)
    one, two = (4 + method.workspace(tasks, True) for tasks in (1, 2))
    copies = f"{one}" if one == two else f"{2 * one - two} + {two - one}·T"
    merging = f"{copies} float32 copies of the largest tensor"
    return f"{merging}; before, one network and one expert's statistics" if issubclass(kind, Informed) else merging


def _entry(
    kind: type[Method] | type[AdaptiveMethod] | type[Modular] | type[Multitask],
    needs: str,
    reads: str,
    memory: str,
    more: tuple[type[Settings], ...],
    fixed: set[str] | None = None,
    module: type[Modular] | None = None,
) -> Entry:
    unused = set(module.unused) if module else set()
    loop = [s for extra in more for s in _settings(extra, unused, "adapt.")]
    if module:  # which has defaults of its own
        own = {f"adapt.{key}": str(value) for key, value in module.defaults.items()}
        loop = [replace(s, default=own.get(s.name, s.default)) for s in loop]
    settings = [*_settings(kind, fixed or set()), *loop]
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return Entry(kind.name, summary, kind.formula, needs, reads, memory, tuple(settings), kind.source)


def _settings(kind: type[Settings], fixed: set[str], prefix: str = "") -> list[Setting]:
    found = []
    for key, field in kind.model_fields.items():
        if key in fixed or field.exclude:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings) and not field.is_required():
            found += _settings(field.annotation, set(), f"{prefix}{key}.")
            continue
        default = "required" if field.is_required() else _yaml(field.default)
        allowed = ", ".join(_bound(rule) for rule in field.metadata if _bound(rule)) or _choices(field.annotation)
        found.append(Setting(prefix + (field.alias or key), default, allowed, field.description or ""))
    return found


def _yaml(value: Any) -> str:
    """A default as a recipe writes it."""
    if isinstance(value, TensorWeights):
        value = value.plain()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _bound(rule: Any) -> str:
    match rule:
        case annotated_types.Gt(gt=value):
            return f"> {value}"
        case annotated_types.Ge(ge=value):
            return f"≥ {value}"
        case annotated_types.Lt(lt=value):
            return f"< {value}"
        case annotated_types.Le(le=value):
            return f"≤ {value}"
    return ""


def _choices(annotation: Any) -> str:
    values = get_args(annotation)
    return (
        ", ".join(str(value) for value in values) if values and all(isinstance(value, str) for value in values) else ""
    )
