"""An adapter put on a model: its layers are found among the model's tensors by name, as an expert's tensors are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from adarank.alignment.naming import named_as
from adarank.alignment.selection import is_table
from adarank.errors import CheckpointError
from adarank.io.adapted import UNTIE, Adapted
from adarank.io.adapter import Adapter
from adarank.io.checkpoint import Checkpoint

_OUTPUTS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "decoder.weight", "proj_out.weight")
_HEAD_OF = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "FEATURE_EXTRACTION": "Model",
}


def with_adapter(model: Checkpoint, adapter: Adapter, label: str | None = None) -> Adapted:
    """The checkpoint of a model with an adapter merged into it. Reads headers alone.

    Arguments:
        model: the model that the adapter changes.
        label: what errors call it.

    Raises:
        CheckpointError: the adapter does not fit the model; all problems are listed.
        MismatchError: its names fit the model's in two ways that are as good.

    Example:
        expert = with_adapter(Checkpoint("base"), Adapter(Path("adapter")))
        expert.read("model.layers.0.self_attn.q_proj.weight")
    """
    root = {name: info.shape for name, info in model.tensors.items() if name not in model.aliases}
    wanted = _tensors(adapter)
    naming = named_as(wanted, root, str(adapter.folder))
    # a layer keeps its name whatever stands before it; of few tensors a rule of prefixes may pair others
    names = {name: there if _layer(name) == _layer(there) else name for name, there in naming.names.items()}
    tied, layers = {}, {layer.name for layer in adapter.layers}
    for name in wanted:
        table = _table(name, wanted[name], root, model.config) if names[name] not in root else None
        if table is not None and name.removesuffix(".weight") in layers:
            tied[name.removesuffix(".weight")], names[name] = table, table
    _refuse_untied(adapter, layers, model, names)
    prefix = naming.prefix if _is_prefix(naming.prefix, names, root) else ""
    made = Adapted(model, adapter, names, prefix, (*tied, *_tied_tables(wanted, names, root, model.config)), label)
    made.config = _configuration(made)
    return made


def _tensors(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The tensors that an adapter changes, by their names in its model -> the shape that a plain layer would have."""
    shapes = {}
    for layer in adapter.layers:
        a, b = (adapter.shape(layer.key(part)) for part in "AB")
        for name in adapter.config.parameters_of(layer.name) or [f"{layer.name}.weight"]:
            shapes[name] = (a[1], b[0]) if layer.embedding else (b[0], *a[1:])
    shapes |= {name: adapter.shape(key) for name, key in adapter.whole.items()}
    return shapes | {f"{name}.weight": adapter.shape(key) for name, key in adapter.tokens.items()}


def _refuse_untied(adapter: Adapter, layers: Collection[str], model: Checkpoint, names: Mapping[str, str]) -> None:
    """A table that was trained whole, while the one that it is tied to in the model was not, fits no tied model."""
    saved = [name for name in adapter.whole if name.removesuffix(".weight") not in layers and is_table(names[name])]
    if saved and output_is_tied(model.tensors, model.config) and len({name.endswith(_OUTPUTS) for name in saved}) == 1:
        raise CheckpointError(
            f"{adapter.folder}: '{saved[0]}' was trained whole, and {model.label} has one table for embeddings and output: {UNTIE}."
        )


def _layer(name: str) -> list[str]:
    """What a tensor's layer is called in the module around it."""
    return name.split(".")[-2:-1]


def _table(
    name: str, shape: tuple[int, ...], root: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> str | None:
    """The embedding table that an output layer's weight is stored as, if it is not stored by itself."""
    if not name.endswith(_OUTPUTS) or config.get("tie_word_embeddings") is False:
        return None
    tables = [other for other, there in root.items() if is_table(other) and there == shape]
    return tables[0] if len(tables) == 1 else None


def output_is_tied(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether a model's output layer is its table of embeddings: a language model that stores no layer of output."""
    if config.get("tie_word_embeddings") is False or any(name.endswith(_OUTPUTS) for name in names):
        return False
    classes = " ".join(map(str, config.get("architectures") or ()))
    return any(part in classes for part in ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration"))


def _tied_tables(
    wanted: Iterable[str], names: Mapping[str, str], root: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Embeddings that an adapter changes and that are the output layer's weight too."""
    tables = [n for n in wanted if is_table(names[n]) and not n.endswith(_OUTPUTS)]
    return [name.removesuffix(".weight") for name in tables] if output_is_tied(root, config) else []


def _is_prefix(prefix: str, names: Mapping[str, str], root: Mapping[str, Any]) -> bool:
    """Whether the adapter's model only has this before the names of the model: `bert.` before those of a bare body."""
    paired = [(name, there) for name, there in names.items() if there in root]
    return bool(prefix) and all(name == prefix + there for name, there in paired)


def _configuration(made: Adapted) -> dict[str, Any]:
    """The model's configuration with the head that the adapter was trained under: its class, and its number of labels."""
    config = dict(made.model.config)
    end = _HEAD_OF.get(made.adapter.config.task)
    named = config.get("architectures")
    if end is None or not (isinstance(named, list) and named):
        return config
    stem = next(
        (
            str(named[0]).removesuffix(each)
            for each in (*_HEAD_OF.values(), "ForMaskedLM", "LMHeadModel", "ForPreTraining")
            if str(named[0]).endswith(each)
        ),
        None,
    )
    if (
        stem is None
        or str(named[0]) == stem + end
        or end not in ("ForSequenceClassification", "ForTokenClassification", "Model")
    ):
        return config
    config["architectures"] = [stem + end]
    heads = [
        made.tensors[name].shape[0]
        for name in made.tensors
        if name in made.adapter.whole and name.endswith(("classifier.weight", "score.weight", "out_proj.weight"))
    ]
    if heads and len(config.get("id2label") or {}) != heads[-1]:
        labels = {str(number): f"LABEL_{number}" for number in range(heads[-1])}
        config |= {"id2label": labels, "label2id": {name: int(number) for number, name in labels.items()}}
    return config
