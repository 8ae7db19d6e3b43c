"""Sentence encoders: a transformer and the modules that make one vector of a text, as folders of `sentence-transformers` have them.

    vector = (Normalize ∘ … ∘ Dense ∘ Pooling)(transformer(text))

The modules are read from their `config.json` and built here, so that the package itself is not needed. There is no head of a
task: all weights merge, those of the modules too. A folder without modules.json is read as that package reads it: by the mean
over the text's tokens. Reimers and Gurevych 2019, arXiv:1908.10084.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adarank.data.labels import Label, Problem, read_labels
from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch
from adarank.errors import CheckpointError, DataError
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import read_json
from adarank.io.sentence import Module
from adarank.models.loading import LOCALLY, loading
from adarank.models.text import TextClassifiers, check_text, positions, tokenizer_of
from adarank.models.text_heads import padded
from adarank.models.tied import refuse_missing

Step = Callable[[Tensor, Tensor], Tensor]
"""(what the transformer or the step before gave, attention mask) -> what the step gives."""
STEPS = "sentence_steps"  # attribute of a loaded transformer
_NUMBER = {"problem_type": "regression", "num_labels": 1}  # how labels of similarity are read


def _cls(tokens: Tensor, mask: Tensor) -> Tensor:
    first = mask.argmax(dim=1)  # of texts padded in front not the first of all
    return tokens[torch.arange(len(tokens), device=tokens.device), first]


def _last(tokens: Tensor, mask: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    return tokens[torch.arange(len(tokens), device=tokens.device), last]


def _sums(tokens: Tensor, weights: Tensor) -> Tensor:
    return (tokens * weights[..., None]).sum(dim=1)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    return _sums(tokens, mask) / mask.sum(dim=1, keepdim=True).clamp_min(1e-9)


def _weighted(tokens: Tensor, mask: Tensor) -> Tensor:
    weights = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return _sums(tokens, weights) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)


# in the order in which their vectors are joined
_POOLINGS: Mapping[str, Step] = {
    "cls": _cls,
    "max": lambda tokens, mask: tokens.masked_fill(mask[..., None] == 0, -1e9).amax(dim=1),
    "mean": _mean,
    "mean_sqrt_len": lambda tokens, mask: _sums(tokens, mask) / mask.sum(dim=1, keepdim=True).clamp_min(1e-9).sqrt(),
    "weightedmean": _weighted,
    "lasttoken": _last,
}


def pooling(config: Mapping[str, Any], where: str) -> Step:
    """(texts, tokens, width) to (texts, width · modes), by a Pooling module's configuration.

    Raises:
        CheckpointError: it names no pooling that is known.
    """
    flags = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len": "mean_sqrt_len_tokens",
             "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}  # fmt: skip
    named = config.get("pooling_mode")
    modes = (
        [named] if isinstance(named, str) else [m for m, flag in flags.items() if config.get(f"pooling_mode_{flag}")]
    )
    if not modes or not set(modes) <= set(_POOLINGS):
        raise CheckpointError(f"{where}: no pooling that is known ({', '.join(map(str, modes)) or 'none is set'}). Known: {', '.join(_POOLINGS)}.")  # fmt: skip

    def pool(tokens: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(tokens.dtype)
        return torch.cat([_POOLINGS[mode](tokens, weights) for mode in modes], dim=-1)

    return pool


class SentenceEncoders(TextClassifiers):
    """The family of `SentenceTransformer` folders. One text an input, or two, whose cosine is scored."""

    kind = "sentence-similarity"
    architectures: tuple[str, ...] = ()
    keep_embeddings = False
    by_class = True
    headless = True

    def auto_class(self) -> Any:
        """The class of `transformers` that loads the transformer."""
        from transformers import AutoModel

        return AutoModel

    def problem(self, config: Mapping[str, Any]) -> Problem:
        """A vector of each text."""
        return "embedding"

    def class_names(self, config: Mapping[str, Any], task: str) -> tuple[str, ...]:
        """None: vectors are no classes."""
        return ()

    def labels(self, table: Table, spec: TaskSpec, config: Mapping[str, Any], task: str) -> list[Label | None]:
        """Of each pair how similar its texts are.

        Raises:
            DataError: a label is no number, or there is one text to a row.
        """
        if spec.columns.label not in table:
            return [None] * len(table[spec.columns.text])
        if spec.columns.text_pair is None:
            raise DataError(f"task '{task}': similarities are of two texts. Name the column of the second as columns: text_pair, or leave the labels out.")  # fmt: skip
        return read_labels(table[spec.columns.label], _NUMBER, task)

    def load(self, expert: Checkpoint) -> nn.Module:
        """The transformer with its modules attached, under the names that their tensors have in the folder.

        Raises:
            CheckpointError: it cannot be loaded, or has a module that is not known.
        """
        expert.check_bytes()
        with loading(expert.folder, "cannot be loaded as a sentence encoder", "Check config.json and the weights."):
            module, report = self._loaded(expert)
        # what pools for classifiers is no part of a vector, and many folders lack it
        refuse_missing(module, [n for n in report["missing_keys"] if not n.startswith("pooler.")], expert.label)
        if getattr(module.config, "is_encoder_decoder", False):
            raise CheckpointError(f"{expert.label}: an encoder with a decoder; sentence encoders have the first alone.")
        steps = [self._step(module, expert, part) for part in expert.modules]
        setattr(module, STEPS, steps or [pooling({"pooling_mode": "mean"}, expert.label)])
        made: nn.Module = module.to(torch.float32).eval()
        return made

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Any, list[str]]:
        """The texts of a table as the model takes them, and notes about them."""
        columns = [[str(value) for value in table[column]] for column in self.columns(spec)]
        check_text(spec.name or "", columns)
        tokenizer = tokenizer_of(folder)
        prompt, lower, limit = _reading(folder)
        most = min(spec.max_length, positions(folder, tokenizer), limit)
        texts = [prompt + (text.lower() if lower else text) for row in zip(*columns, strict=True) for text in row]
        examples = TextGroups(tokenizer, texts, len(columns), most)
        notes = [f"{examples.cut} of {len(texts)} texts reach the limit of {most} tokens and are cut there"] if examples.cut else []  # fmt: skip
        return examples, notes

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(inputs, texts, width) float32 vectors."""
        inputs, texts = batch["input_ids"].shape[:2]
        flat = {key: value.flatten(0, 1) for key, value in batch.items()}
        vectors: Tensor = module(**flat).last_hidden_state
        steps: list[Step] = getattr(module, STEPS)
        for step in steps:
            vectors = step(vectors, flat["attention_mask"])
        return vectors.view(inputs, texts, -1).float()

    def _loaded(self, expert: Checkpoint) -> tuple[Any, Mapping[str, Any]]:
        auto = self.auto_class()
        if expert.in_one_folder:
            loaded = auto.from_pretrained(str(expert.folder), output_loading_info=True, **LOCALLY)
            return loaded[0], loaded[1]
        from transformers import AutoConfig

        settings = AutoConfig.for_model(**expert.config)
        state = {name: expert.read(name) for name in expert.tensors}
        made = auto._model_mapping[type(settings)].from_pretrained(
            None, config=settings, state_dict=state, dtype=torch.float32, output_loading_info=True, **LOCALLY
        )
        return made[0], made[1]

    def _step(self, module: nn.Module, expert: Checkpoint, part: Module) -> Step:
        """What a module after the transformer does; its layer of weights, if it has one, becomes a part of the transformer."""
        where, config = f"{expert.label}: {part.path}", part.config
        if part.kind == "Pooling":
            return pooling(config, where)
        if part.kind == "Normalize":
            return lambda vectors, _: functional.normalize(vectors, dim=-1)
        if part.kind == "Dropout":
            return lambda vectors, _: vectors
        if part.kind == "LayerNorm":
            norm = _attached(module, expert, part, "norm", nn.LayerNorm(int(config["dimension"])))
            return lambda vectors, _: norm(vectors)
        if part.kind == "Dense":
            name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
            kind = getattr(nn, name, None)
            if not (isinstance(kind, type) and issubclass(kind, nn.Module) and (kind is nn.Identity or kind.__module__ == "torch.nn.modules.activation")):  # fmt: skip
                raise CheckpointError(f"{where}: activation_function '{name}' is none of torch.nn's. Correct its config.json.")  # fmt: skip
            activation: nn.Module = kind()
            linear = nn.Linear(int(config["in_features"]), int(config["out_features"]), bool(config.get("bias", True)))
            layer = _attached(module, expert, part, "linear", linear)
            return lambda vectors, _: activation(layer(vectors))
        raise CheckpointError(
            f"{where}: modules of kind {part.kind} can be merged, and neither adapted nor scored. Known: Pooling, Dense, LayerNorm, Normalize, Dropout."
        )


def _attached(module: nn.Module, expert: Checkpoint, part: Module, inner: str, layer: nn.Module) -> nn.Module:
    """A layer filled with a module's weights, as a part of the transformer under the name that they have in the folder."""
    stored = f"{part.path}/{inner}"
    layer.load_state_dict({name: expert.read(f"{stored}.{name}").float() for name in layer.state_dict()})
    module.add_module(stored, layer)
    return layer


class TextGroups:
    """So many texts to an input, tokenised alike.

    Attributes:
        cut: how many of the texts reach the limit.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], group: int, most: int) -> None:
        encoded = dict(tokenizer(list(texts), truncation=True, max_length=most))
        counts = [len(ids) for ids in encoded["input_ids"]]
        self._tokenizer, self._encoded, self._group = tokenizer, encoded, group
        self.cut = sum(count >= most for count in counts)
        self.lengths: Sequence[int] = [sum(counts[at : at + group]) for at in range(0, len(texts), group)]

    def batch(self, rows: Sequence[int]) -> Batch:
        """(inputs, texts, tokens) of each key, padded to the longest text."""
        places = [row * self._group + at for row in rows for at in range(self._group)]
        flat = padded(self._tokenizer, self._encoded, places)
        return {key: value.view(len(rows), self._group, -1) for key, value in flat.items()}

    def content(self) -> bytes:
        """Bytes that identify the inputs, for the task's fingerprint."""
        return repr((sorted(self._encoded.items()), self._group)).encode()


def _reading(folder: Path) -> tuple[str, bool, int]:
    """What a folder says of how texts are read: the prompt before each, whether in lower case, tokens at most."""
    general, reading = (read_json(folder / f"{name}.json") for name in ("config_sentence_transformers", "sentence_bert_config"))  # fmt: skip
    prompts, name = general.get("prompts") or {}, general.get("default_prompt_name")
    limit = reading.get("max_seq_length")
    most = limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 1 else 10**9
    return str(prompts.get(name, "")) if name else "", bool(reading.get("do_lower_case")), most
