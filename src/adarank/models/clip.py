"""CLIP's image tower with zero-shot heads, as merging papers use it: experts are vision towers fine-tuned from one CLIP.

    logits = W z / |z|      z = P · vision(x)      row c of W: exp(logit_scale) · unit(mean_p unit(text(p with class c)))

A task's head W is made of its classes' names and prompt templates p by the base's text tower, or read from a file of its own, and
stays as it is: fine-tuning and merging move the image tower alone. Radford et al. 2021, arXiv:2103.00020; heads as in Ilharco et al. 2023, arXiv:2212.04089.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adarank.data.spec import TaskSpec
from adarank.errors import RecipeError, itemise
from adarank.io.checkpoint import Checkpoint, Source, TensorInfo
from adarank.io.files import file_sha256
from adarank.io.hub import local_path
from adarank.io.low_rank import Factors
from adarank.io.pickled import LEGACY
from adarank.io.pickled_modules import load_module_state
from adarank.models.clip_layouts import PROJECTION, ClipLayout, layout_of
from adarank.models.clip_networks import OPEN_CLIP, classifier_class
from adarank.models.image import ImageClassifiers
from adarank.models.text import tokenizer_of
from adarank.models.tied import held_tensors, refuse_missing, stored_keys

HEAD = "classifier.weight"
TEMPLATES = ("a photo of a {}.",)
_PROMPTS = 256  # in one pass of the text tower


@dataclass(frozen=True)
class StoredHead:
    """A head that was saved by itself, as task_vectors saves those of its tasks.

    Attributes:
        rows: (classes, width) float32.
    """

    file: Path
    rows: Tensor

    @classmethod
    def read(cls, task: str, given: str, folder: Path) -> StoredHead:
        """The head of a task.

        Raises:
            RecipeError: the file holds no head of cosines: one matrix, and no bias but zeros.
        """
        file = local_path(given, folder, RecipeError)
        if not file.is_file():
            raise RecipeError(f"task '{task}': head_file: {file}: no such file.")
        if file.suffix in LEGACY:
            state = load_module_state(file)
        else:
            stored = Checkpoint(file)
            state = {name: stored.read(name) for name in stored.tensors}
        matrices = [tensor for tensor in state.values() if tensor.dim() == 2]
        others = [name for name, tensor in state.items() if tensor.dim() != 2 and bool((tensor != 0).any())]
        if len(matrices) != 1 or others:
            got = f"{len(matrices)} matrices" if not others else f"'{others[0]}', which is not zero,"
            raise RecipeError(
                f"task '{task}': head_file: {file} holds {got} where one matrix (classes, width) was needed, and a bias of zeros at most. Give a zero-shot head."
            )
        return cls(file, matrices[0].float())


class ZeroShotHeads:
    """Heads of several tasks by one text tower, which is loaded when the first is asked for and let go after the last.

    Arguments:
        base: a whole CLIP model, and its layout; where no head is made, its image tower is enough.
        prompts: task -> its classes' prompts, a list for each class.
        stored: task -> its head, where it is not made.
    """

    def __init__(
        self,
        base: Checkpoint,
        layout: ClipLayout,
        prompts: Mapping[str, Sequence[Sequence[str]]],
        stored: Mapping[str, StoredHead],
    ) -> None:
        self._base, self._layout, self._prompts, self.stored = base, layout, prompts, stored
        self._made: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Of a row of a head."""
        return self._layout.width(self._base)

    @property
    def making_bytes(self) -> int:
        """Bytes held while heads are made."""
        parts = self._layout.text(self._base) if self._prompts else []
        tensors = self._base.tensors.items()
        return 4 * sum(info.numel for name, info in tensors if any(fnmatchcase(name, part) for part in parts))

    def classes(self, task: str) -> int:
        """How many rows a task's head has."""
        return len(self.stored[task].rows if task in self.stored else self._prompts[task])

    @torch.no_grad()
    def head(self, task: str) -> Tensor:
        """(classes, width) float32."""
        if task in self.stored:
            return self.stored[task].rows
        if not self._made:
            tower, tokens = self._layout.text_tower(self._base), tokenizer_of(self._base.folder)
            scale, most = self._layout.logit_scale(self._base).float().exp(), self._layout.longest(self._base)
            for each_task, classes in self._prompts.items():
                self._made[each_task] = scale * torch.stack([_direction(tower, tokens, each, most) for each in classes])
        return self._made[task]


def _direction(tower: nn.Module, tokens: Any, prompts: Sequence[str], most: int) -> Tensor:
    """(width,) of length 1: the mean of the directions of prompts, which are cut to so many tokens."""
    directions = []
    for first in range(0, len(prompts), _PROMPTS):
        batch = tokens(
            list(prompts[first : first + _PROMPTS]), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        out = tower(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        directions.append(functional.normalize(out.text_embeds.float(), dim=-1))
    return functional.normalize(torch.cat(directions).mean(dim=0), dim=0)


class ZeroShotExpert(Checkpoint):
    """A fine-tuned image tower, seen as the checkpoint of its task's classifier: the tower, the projection, the head.

    Attributes:
        projected: whether the expert has a projection of its own; else it is the base's.
    """

    def __init__(
        self,
        expert: Checkpoint,
        base: Checkpoint,
        heads: ZeroShotHeads,
        task: str,
        names: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        self.__dict__.update(expert.__dict__)
        layout = layout_of(expert)
        self._expert, self._base, self._heads, self._task = expert, base, heads, task
        self._stored = layout.tower(expert)
        borrowed = [name for name in layout.borrowed if name not in self._stored]
        self.projected = not borrowed
        infos = {name: expert.tensors[stored] for name, stored in self._stored.items()}
        infos |= {name: base.tensors[name] for name in borrowed}
        shape = (heads.classes(task), heads.width)
        infos[HEAD] = TensorInfo(HEAD, shape, torch.float32, f"the head made of task '{task}''s classes")
        self.tensors = {name: TensorInfo(name, info.shape, info.dtype, info.file) for name, info in infos.items()}
        self.aliases = {}
        self.config = _configuration(layout, layout.vision(expert, base), names, templates, heads.width)

    def read(self, name: str) -> Tensor:
        """The tensor of this name; those that no file holds are made."""
        if name == HEAD:
            return self._heads.head(self._task)
        return self._expert.read(self._stored[name]) if name in self._stored else self._base.read(name)

    def change(self, name: str, start: Source, stored: str) -> Factors | None:
        """What the expert adds to `start` there, where it is an adapter."""
        return self._expert.change(self._stored[name], start, stored) if name in self._stored else None

    def change_rank(self, name: str, start: Source, stored: str) -> int | None:
        """The rank of that."""
        return self._expert.change_rank(self._stored[name], start, stored) if name in self._stored else None

    def sha256(self) -> dict[str, str]:
        """Of the expert's files, and of its head's where it has one, which is named as seen from them."""
        head = self._heads.stored.get(self._task)
        of_head = {} if head is None else {Path(os.path.relpath(head.file, self.folder)).as_posix(): file_sha256(head.file)}  # fmt: skip
        return self._expert.sha256() | of_head

    def check_bytes(self) -> None:
        """Compare the bytes of the expert's tensors with their checksums."""
        self._expert.check_bytes()

    def side_files(self) -> list[Path]:
        """The expert's."""
        return self._expert.side_files()

    @property
    def in_one_folder(self) -> bool:
        """Whether the expert is."""
        return self._expert.in_one_folder

    @property
    def making_bytes(self) -> int:
        """Bytes held while heads are made."""
        return self._heads.making_bytes

    @property
    def unused(self) -> Mapping[str, str]:
        """Tensors of the file that are not used -> why."""
        used = set(self._stored.values())
        others = [name for name in self._expert.tensors if name not in used]
        parts = ", ".join(dict.fromkeys(name.split(".", 1)[0] for name in others))
        return {f"{parts}: {len(others)} tensor(s)": "heads are made by the base's text tower"} if others else {}

    @property
    def processor_folder(self) -> Path:
        """The base's folder where the expert's has no image processor."""
        files = [self._expert.folder / name for name in ("preprocessor_config.json", "processor_config.json")]
        return self._expert.folder if any(file.exists() for file in files) else self._base.folder


def _configuration(
    layout: ClipLayout, vision: Mapping[str, Any], classes: Sequence[str], templates: Sequence[str], width: int
) -> dict[str, Any]:
    """The `config.json` of a task's classifier, from that of the image tower."""
    labels = {str(number): name for number, name in enumerate(classes)}
    return {
        **{key: value for key, value in vision.items() if key not in ("transformers_version", "torch_dtype", "dtype")},
        "architectures": [layout.architecture],
        "model_type": "clip_vision_model",
        "projection_dim": width,
        "id2label": labels,
        "label2id": {name: int(number) for number, name in labels.items()},
        "prompt_templates": list(templates),
        "problem_type": "single_label_classification",  # of one class, too
    }


class ZeroShotImageClassifiers(ImageClassifiers):
    """The family of CLIP's image tower under zero-shot heads."""

    kind = "zero-shot-image-classification"
    architectures = ("CLIPVisionModel", "CLIPModel")
    head_apart = True

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        return classifier_class()

    def load(self, expert: Checkpoint) -> nn.Module:
        """The network of a folder, ready to be filled with weights."""
        from transformers import AutoConfig

        settings = AutoConfig.for_model(**expert.config)
        with torch.random.fork_rng():
            module: Any = self.auto_class().from_config(settings)
        held = held_tensors(module)
        shapes = {name: info.shape for name, info in expert.tensors.items()}
        loaded = set(stored_keys({name: name for name in shapes}, shapes, module, held).values())
        refuse_missing(module, held.keys() - loaded, expert.label)
        with torch.no_grad():
            module.classifier.weight.copy_(expert.read(HEAD))
        made: nn.Module = module.float().eval()
        return made

    def complete(
        self, base: Checkpoint | None, experts: Mapping[str, Checkpoint], tasks: Mapping[str, TaskSpec], folder: Path
    ) -> tuple[dict[str, Checkpoint], dict[str, str]]:
        """Experts and base, with the heads that the text tower gives."""
        stored = {t: StoredHead.read(t, spec.head_file, folder) for t, spec in tasks.items() if spec.head_file}
        names = {task: _lines(spec.classes, folder) for task, spec in tasks.items()}
        templates = {task: _lines(spec.templates, folder) or list(TEMPLATES) for task, spec in tasks.items()}
        made_of = {task: each for task, each in names.items() if task not in stored}
        problems = [*_unfit(made_of, templates), *_no_clip(base, bool(made_of)), *_mixed(base, experts)]
        problems += _unfit_heads(stored, tasks, names, base)
        if problems or base is None:
            heading = f"recipe: {len(problems)} problem(s)."
            raise RecipeError(problems[0] if len(problems) == 1 else itemise(heading, problems))
        prompts = {
            task: [[template.replace("{}", name) for template in templates[task]] for name in each]
            for task, each in made_of.items()
        }
        names |= {
            task: [str(number) for number in range(len(head.rows))] for task, head in stored.items() if not names[task]
        }
        layout = layout_of(base)
        heads = ZeroShotHeads(base, layout, prompts, stored)
        made = {
            task: ZeroShotExpert(expert, base, heads, task, names[task], templates[task])
            for task, expert in experts.items()
        }
        kept = dict.fromkeys(layout.text(base), "the base's text tower, which heads are made by")
        if not any(expert.projected for expert in made.values()):
            kept[PROJECTION] = "no expert has a projection of its own"
        return dict(made), kept


def _unfit(names: Mapping[str, Sequence[str]], templates: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What is wrong with classes and templates, in sentences."""
    for task, classes in names.items():
        if not classes:
            yield f"task '{task}': no classes. Give their names under task: classes, in the order of the labels, or a file with one on each line."
        for template in templates[task]:
            if "{}" not in template:
                yield f"task '{task}': template {template!r} has no {{}} where the class goes. Add it."


def _unfit_heads(
    stored: Mapping[str, StoredHead],
    tasks: Mapping[str, TaskSpec],
    names: Mapping[str, Sequence[str]],
    base: Checkpoint | None,
) -> Iterator[str]:
    """Why heads that were saved do not fit, in sentences."""
    projection = None if base is None else base.tensors.get(layout_of(base).projection(base))
    for task, head in stored.items():
        classes, width = head.rows.shape
        if tasks[task].templates:
            yield f"task '{task}': templates change nothing of a head_file. Remove one of them."
        if names[task] and len(names[task]) != classes:
            yield f"task '{task}': {head.file} has {classes} rows, and classes names {len(names[task])}."
        if base is not None and projection is not None and width != layout_of(base).width(base):
            yield f"task '{task}': {head.file} has rows of {width} entries, and {base.label} gives {layout_of(base).width(base)}."


def _no_clip(base: Checkpoint | None, makes_heads: bool) -> Iterator[str]:
    """Why heads cannot be made by the base, if they cannot, or be put on what it gives."""
    if base is None:
        yield "base_model: zero-shot heads need a whole CLIP model, with its text tower, and the recipe names no base."
        return
    layout = layout_of(base)
    if not makes_heads:
        if layout.projection(base) not in base.tensors:
            yield f"base_model: zero-shot heads are put on CLIP's projection; missing from {base.label}: {layout.projection(base)}."
    elif missing := layout.lacking(base):
        yield f"base_model: zero-shot heads need a whole CLIP model, with its text tower; missing from {base.label}: {', '.join(missing)}."


def _mixed(base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Tensors of two layouts have no common names, and q, k and v in one matrix have other components than apart."""
    for task, expert in experts.items():
        packed, base_packed = (layout_of(each).architecture == OPEN_CLIP for each in (expert, base or expert))
        if packed != base_packed:
            here, there = ("open_clip", "transformers") if packed else ("transformers", "open_clip")
            yield f"task '{task}': {expert.label} is laid out as by {here}, and the base as by {there}. Bring one to the other's layout: adarank convert has --layout."


def _lines(given: str | Sequence[str] | None, folder: Path) -> list[str]:
    """A list as it is; of a file its lines."""
    if not isinstance(given, str):
        return list(given or ())
    path = local_path(given, folder, RecipeError)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: no readable list ({error}). Give a text file with one entry on each line."
        ) from None
