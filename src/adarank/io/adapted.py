"""LoRA adapters of `peft` over the model that they change, read as the checkpoint of the whole fine-tuned model.

    W' = W + s · B A                           s = α/r, or α/√r (rsLoRA)        Hu et al. 2021, arXiv:2106.09685
    W' = m ∘ (W + s · B A) / ‖W + s · B A‖     m, ‖·‖: one per output (DoRA)    Liu et al. 2024, arXiv:2402.09353

Tensors are made when they are read, one at a time, in float32. `change` gives s · B A as factors, never multiplied out;
of DoRA there are none: its weights differ from the base's by a matrix of full rank. Only safetensors and JSON are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adarank.errors import CheckpointError, itemise
from adarank.io.adapter import Adapter, Layer
from adarank.io.adapter_config import CONFIG
from adarank.io.checkpoint import Checkpoint, Source, TensorInfo
from adarank.io.files import file_sha256
from adarank.io.low_rank import Factors
from adarank.io.side_files import side_files, tokenizer_files

UNTIE = "give a model that stores the two apart (tie_word_embeddings: false)"
# Layers of transformers that store their weights as (in, out), by model type: peft calls the layout fan_in_fan_out.
_CONV1D = dict.fromkeys(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"), ("c_attn", "c_proj", "c_fc", "q_attn"))  # fmt: skip


@dataclass(frozen=True)
class _Change:
    """What one layer's part adds to a tensor of the model.

    Attributes:
        by_columns: outputs are the tensor's columns: embeddings, and weights stored as (in, out).
        stack: the tensor is (experts, in, out) or, if `by_columns` is False, (experts, out, in).
    """

    layer: Layer
    scale: float
    by_columns: bool
    rank: int
    stack: bool = False


class Adapted(Checkpoint):
    """A model with an adapter merged into it, as a checkpoint under the names that the adapter's model gives its tensors.

    Arguments:
        model: the model that the adapter changes.
        names: name of a tensor in the adapter's model -> its name in `model`, for all that the adapter has.
        prefix: what the adapter's model has before the names in `model`.
        tied: layers of the adapter whose weights are another layer's too, by the model's configuration.

    Raises:
        CheckpointError: the adapter does not fit the model; all problems are listed.
    """

    def __init__(
        self,
        model: Checkpoint,
        adapter: Adapter,
        names: Mapping[str, str],
        prefix: str = "",
        tied: tuple[str, ...] = (),
        label: str | None = None,
    ) -> None:
        self.__dict__.update(model.__dict__)
        self.model, self.adapter, self.tied = model, adapter, tied
        self.label = label or f"{model.label}+{adapter.folder}"
        if _has_tokenizer(adapter.folder):  # else the model's goes with it, of a folder that has one
            self.path = self.folder = adapter.folder
        self.files = [*model.files, adapter.file]
        self._stored = {prefix + name: name for name in model.tensors}
        self._shown = {name: shown for shown, name in self._stored.items()}
        self.aliases = {prefix + name: prefix + first for name, first in model.aliases.items()}
        layers = {names[f"{layer.name}.weight"] for layer in adapter.layers if f"{layer.name}.weight" in names}
        self._whole = {
            self._shown.get(names[name], name): key
            for name, key in adapter.whole.items()
            if names[name] not in layers or not self._is_there(names[name], key)
        }
        self._names, self._problems = names, list[str]()
        self._changes: dict[str, _Change] = {}
        for layer in adapter.layers:
            self._place(layer)
        self._rows: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, key in adapter.tokens.items():
            self._place_rows(name, key)
        self._refuse()
        self.tensors = self._infos()

    def read(self, name: str) -> Tensor:
        """The tensor; one that the adapter changes in float32 (float64 if the model has it so)."""
        start = self._start(name)
        if name in self._changes:
            start = self._changed(start, self._changes[name])
        if name in self._rows:
            key, rows = self._rows[name]
            start = start.clone().index_copy_(0, torch.tensor(rows), self.adapter.read(key).to(start.dtype))
        return start

    def change(self, name: str, start: Source, stored: str) -> Factors | None:
        """What the adapter adds to tensor `stored` of `start`, as factors; None where that is not of low rank or not known."""
        if self.change_rank(name, start, stored) is None:
            return None
        info = self.model.tensors[stored]
        if name not in self._changes:
            rows = info.shape[0] if info.shape else 1
            dtype = torch.promote_types(info.dtype, torch.float32)
            return Factors(
                torch.zeros(rows, 0, dtype=dtype),
                torch.zeros(0, 0, dtype=dtype),
                torch.zeros(0, info.numel // max(rows, 1), dtype=dtype),
            )
        return self._factors(self._changes[name])

    def change_rank(self, name: str, start: Source, stored: str) -> int | None:
        """The most that the rank of `change` can be, from headers alone; None where that is None."""
        if (
            start is not self.model
            or self._stored.get(name) != stored
            or not self.model.tensors[stored].dtype.is_floating_point
        ):
            return None
        change = self._changes.get(name)
        if name in self._whole or name in self._rows:
            return None
        if change is None:
            return 0
        return None if change.stack or self.adapter.config.decomposed else self.adapter.shape(change.layer.key("A"))[0]

    @property
    def processor_folder(self) -> Path:
        """The model's folder, which has its configuration too; the adapter's if only that has a tokenizer."""
        return self.model.folder if _has_tokenizer(self.model.folder) else self.folder

    @property
    def in_one_folder(self) -> bool:
        """Never: weights lie in the model's folder, and changes in the adapter's."""
        return False

    @property
    def unused(self) -> Mapping[str, str]:
        """What is in the files and not among the tensors."""
        return {**self.model.unused, **self.adapter.unused}

    @property
    def quantisation(self) -> str | None:
        """The model's."""
        return self.model.quantisation

    def check_bytes(self) -> None:
        """Compare both files' bytes with their checksums."""
        self.model.check_bytes()
        self.adapter.weights.check_bytes()

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256, of the model's files and the adapter's."""
        files = (self.adapter.file, self.adapter.folder / CONFIG)
        return {**self.model.sha256(), **{file.name: file_sha256(file) for file in files}}

    def side_files(self) -> list[Path]:
        """The model's, with the adapter's tokenizer in place of the model's where it has one."""
        files = self.model.side_files()
        if self.folder == self.model.folder:
            return files
        replaced = tokenizer_files(files)
        return [*(file for file in files if file not in replaced), *tokenizer_files(side_files(self.folder))]

    def _refuse(self) -> None:
        if self._problems:
            base = self.adapter.config.base
            trained = f" ({CONFIG} says that it was trained on '{base}')" if base else ""
            heading = f"{self.adapter.folder}: the adapter does not fit {self.model.label}{trained}:"
            raise CheckpointError(itemise(heading, self._problems, "Give the model that it was trained on.", 10))

    def _infos(self) -> dict[str, TensorInfo]:
        """Every tensor of the merged model: the model's dtypes, and the shapes of what takes a tensor's place."""
        infos = {}
        for shown, name in self._stored.items():
            info = self.model.tensors[name]
            file = str(self.adapter.file) if self._touches(shown) else info.file
            infos[shown] = replace(info, name=shown, shape=self._shape_there(name), file=file)
        new = {shown: key for shown, key in self._whole.items() if shown not in infos}
        return infos | {shown: replace(self.adapter.weights.tensors[key], name=shown) for shown, key in new.items()}

    def _is_there(self, name: str, key: str) -> bool:
        """Whether a table that was saved beside its change is the model's: peft saves those of embeddings too."""
        info = self.model.tensors.get(name)
        if info is None or info.shape != self.adapter.shape(key):
            return False
        saved = self.adapter.read(key)
        return torch.equal(saved, self.model.read(name).to(saved.dtype))

    def _touches(self, shown: str) -> bool:
        return shown in self._whole or shown in self._changes or shown in self._rows

    def _start(self, name: str) -> Tensor:
        """What an adapter's layers are added to."""
        if name in self._whole:
            return self.adapter.read(self._whole[name])
        return self.model.read(self._stored[name])

    def _changed(self, start: Tensor, change: _Change) -> Tensor:
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        if change.stack:
            return start + self._stacked(change).to(start.dtype)
        weight = start + self._factors(change).dense().to(start.dtype).reshape(start.shape)
        if not self.adapter.config.decomposed:
            return weight
        magnitude = self.adapter.read(change.layer.keys["magnitude_vector"]).flatten().to(weight.dtype)
        matrix = weight.flatten(1)
        outputs = matrix.T if change.by_columns else matrix
        outputs = outputs * (magnitude / torch.linalg.vector_norm(outputs, dim=1))[:, None]
        scaled: Tensor = outputs.T if change.by_columns else outputs
        return scaled.reshape(weight.shape)

    def _factors(self, change: _Change) -> Factors:
        a, b = (self._part(change.layer, part) for part in ("A", "B"))
        a, b = a.flatten(1), b.flatten(1)
        core = change.scale * torch.eye(len(a), dtype=a.dtype)
        return Factors(a.T, core, b.T) if change.by_columns else Factors(b, core, a)

    def _stacked(self, change: _Change) -> Tensor:
        """A change for each expert of a stack: A is (experts · r, in), B (out, r · experts)."""
        a, b = (self._part(change.layer, part) for part in ("A", "B"))
        left, right = b.reshape(len(b), change.rank, -1), a.reshape(-1, change.rank, a.shape[1])
        per_expert: Tensor = torch.einsum("ore,eri->eoi", left, right) * change.scale
        return per_expert.transpose(1, 2) if change.by_columns else per_expert

    def _part(self, layer: Layer, part: str) -> Tensor:
        tensor = self.adapter.read(layer.key(part))
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    # how the adapter's parts lie on the model's tensors

    def _place(self, layer: Layer) -> None:
        """Find the tensor that a layer changes, and how its factors lie on it."""
        parameter = self._parameter(layer)
        name = self._names.get(parameter, parameter)
        if name not in self.model.tensors:
            self._problems.append(self._lacking(layer, parameter))
            return
        shape, of_a, of_b = self._shape_there(name), *(self.adapter.shape(layer.key(part)) for part in "AB")
        matched, config = self._matched(layer, parameter), self.adapter.config
        rank, stack = config.rank_of(matched), len(shape) == 3 and matched == parameter
        experts = shape[0] if stack else 1
        columns = self._by_columns(layer, name, shape[1:] if stack else shape, stack)
        if of_a[0] != rank * experts or of_b[1] != rank * experts or any(side != 1 for side in of_b[2:]):
            self._problems.append(
                f"{layer.name}: factors {of_a} and {of_b}, and {CONFIG} says r = {rank}{' for each of ' + str(experts) if experts > 1 else ''}"
            )
        elif config.decomposed and self._magnitudes(layer) != of_b[0]:
            self._problems.append(f"{layer.name}: {self._magnitudes(layer)} magnitudes for {of_b[0]} outputs")
        elif columns is None:
            self._problems.append(f"{layer.name}: factors {of_a} and {of_b}, and the model's tensor is {shape}")
        else:
            change = _Change(layer, config.scale_of(matched), columns, rank, stack)
            if self._changes.setdefault(self._shown[name], change) is not change:
                self._problems.append(
                    f"{layer.name}: its weight is an embedding table too, which the adapter changes as well: {UNTIE}"
                )

    def _magnitudes(self, layer: Layer) -> int:
        return self.adapter.weights.tensors[layer.keys["magnitude_vector"]].numel

    def _lacking(self, layer: Layer, parameter: str) -> str:
        joint = f"{layer.name.rpartition('.')[2]}.in_proj_weight"
        if any(_ends(name, joint) for name in self.model.tensors):
            return f"{layer.name}: a multi-head attention of PyTorch, whose out_proj peft changes twice: merge the adapter first, with merge_and_unload"
        return f"{parameter}: the model has no such tensor"

    def _shape_there(self, name: str) -> tuple[int, ...]:
        key = self._whole.get(self._shown[name])
        return self.adapter.shape(key) if key else self.model.tensors[name].shape

    def _by_columns(self, layer: Layer, name: str, shape: tuple[int, ...], stack: bool) -> bool | None:
        """Whether outputs are columns; None if the factors fit in no way. Of a square weight shapes do not tell."""
        of_a, of_b = (self.adapter.shape(layer.key(part)) for part in "AB")
        rows, columns = (of_b[0], *of_a[1:]), (of_a[1], of_b[0])
        if layer.embedding:
            return True if shape == columns else None
        if rows == columns == shape:
            return self._square_stack(name) if stack else self._square(layer, name)
        return {rows: False, columns: True}.get(shape)

    def _square(self, layer: Layer, name: str) -> bool:
        kind = str(self.model.config.get("model_type", ""))
        if kind in _CONV1D:
            return name.split(".")[-2] in _CONV1D[kind]
        return self.adapter.config.transposed

    def _square_stack(self, name: str) -> bool | None:
        """By the joint gate and up projection beside it, whose outputs are twice as many."""
        beside = self.model.tensors.get(name.rpartition(".")[0] + ".gate_up_proj")
        return None if beside is None or len(beside.shape) != 3 else beside.shape[2] > beside.shape[1]

    def _parameter(self, layer: Layer) -> str:
        """The name of the tensor that a layer's part changes, in the adapter's model."""
        named = self.adapter.config.parameters_of(layer.name)
        if not named:
            return f"{layer.name}.weight"
        fitting = [name for name in named if self._fits(layer, name)]
        return fitting[0] if len(fitting) == 1 else f"{layer.name}: one of {', '.join(named)}"

    def _matched(self, layer: Layer, parameter: str) -> str:
        """The name that patterns of ranks and of alphas are matched with."""
        return parameter if self.adapter.config.parameters_of(layer.name) else layer.name

    def _fits(self, layer: Layer, parameter: str) -> bool:
        """Whether a layer's factors can be of this parameter. Wrappers of several tell theirs by shape alone."""
        info = self.model.tensors.get(self._names.get(parameter, parameter))
        if info is None:
            return False
        sides = {self.adapter.shape(layer.key("A"))[1], self.adapter.shape(layer.key("B"))[0]}
        return set(info.shape[-2:]) == sides

    def _place_rows(self, layer: str, key: str) -> None:
        """Find the embedding whose rows were trained."""
        given = self.adapter.config.tokens
        rows = next((rows for name, rows in given.items() if name and _ends(layer, name)), given.get("", ()))
        name = self._names[f"{layer}.weight"]
        info, shape = self.model.tensors.get(name), self.adapter.shape(key)
        if info is None or shape != (len(rows), *info.shape[1:]) or max(rows, default=0) >= info.shape[0]:
            there = f"a table {info.shape}" if info else "no such table"
            self._problems.append(f"{layer}: {shape} trained rows, {len(rows)} in {CONFIG}, and the model has {there}")
        else:
            self._rows[self._shown[name]] = (key, rows)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _has_tokenizer(folder: Path) -> bool:
    return bool(tokenizer_files(side_files(folder)))
