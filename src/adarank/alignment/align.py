"""Base and experts paired tensor by tensor: by name, never by position, with every key of every input accounted for.

What is in all inputs merges, or is kept; what is not is a task's head, tied to what is, computed by the model, or an error
that says of all that does not fit how many there are, and shows some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from adarank.alignment.mismatch import Problem, mismatch, other_kinds
from adarank.alignment.naming import Naming, Shapes, named_as
from adarank.alignment.selection import (
    Choice,
    Select,
    check_patterns,
    choose,
    computed,
    is_embedding,
    is_head_name,
    is_mask,
    unmatched,
    with_kernels,
)
from adarank.alignment.task_vectors import AlignedCheckpoints, Member
from adarank.errors import MismatchError, RecipeError, itemise
from adarank.io.checkpoint import Source, TensorInfo
from adarank.io.quantised import refuse_quantised


def align(
    base: Source | None,
    experts: Mapping[str, Source],
    select: Select | None = None,
    text_tasks: bool = False,
    task_heads: bool = False,
    kept: Mapping[str, str] | None = None,
    called: Called | None = None,
    kernels: bool | Collection[str] = False,
) -> AlignedCheckpoints:
    """Pair the tensors of base and experts by name. Reads headers, integer tensors, and tables that may be tied.

    Arguments:
        base: the pretrained model, or None.
        experts: task -> model fine-tuned from the base.
        select: the recipe's overrides of what happens to which tensor.
        text_tasks: keep embedding tables from the base, as both papers do for language models. Without a base there is
            none to keep: they merge.
        task_heads: find task heads by themselves: tensors outside the backbone that the base lacks, that
            differ in shape, or that carry a head's usual name.
        kept: pattern -> why the tensors of the base that it matches stay as they are, whatever else is asked.
        called: of slices, what stored tensors stand for; by default each for itself.
        kernels: names of kernels of convolutions that are decomposed by default; True: where they outweigh the matrices.

    Raises:
        CheckpointError: inputs are quantised; all are named.
        MismatchError: a tensor is missing, extra, of another shape, or of integers that differ; it says how many, and
            whether the inputs are of different architectures.
        RecipeError: a pattern matches nothing, or patterns contradict each other.
    """
    select = select or Select()
    if not experts:
        raise RecipeError("models: no expert is given. A merge needs at least one.")
    refuse_quantised([*([base] if base else []), *experts.values()])
    root = base or next(iter(experts.values()))
    called = called or Called()
    names = called.of(base, None) if base else called.of(root, next(iter(experts)))
    shapes = {name: root.tensors[n].shape for n, name in names.items() if n not in root.aliases}
    real = {name: n for n, name in names.items() if name in shapes}
    base_member = Member(base, real, _aliases(base)) if base else None
    members = {task: _member(source, shapes, called.of(source, task)) for task, source in experts.items()}
    aligner = _Aligner(base_member, members, select, task_heads, kept or {})
    aligner.run()
    missed = unmatched(select, [*aligner.seen])
    if missed:
        raise RecipeError(itemise("The recipe's patterns do not fit the models.", missed, "Correct or remove them."))
    for name in aligner.seen:
        check_patterns(name, select)
    choices = {
        n: aligner.forced.get(n) or choose(i, select, text_tasks and base is not None)
        for n, i in aligner.tensors.items()
    }
    choices = with_kernels(aligner.tensors, choices, kernels)
    return AlignedCheckpoints(
        base_member, members, aligner.tensors, choices, {t: tuple(h) for t, h in aligner.heads.items()}
    )


@dataclass(frozen=True)
class Called:
    """What stored tensors stand for, where it is not what they are called: layers of a model in other places.

    Attributes:
        base: name in the base's file -> name in the output; None: all of them, as they are. Those not named are left out.
        experts: task -> the same of its expert.
    """

    base: Mapping[str, str] | None = None
    experts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def of(self, source: Source, task: str | None) -> Mapping[str, str]:
        """Stored name -> name in the output, of an expert, or of the base where no task is given."""
        named = self.base if task is None else self.experts.get(task)
        return {name: name for name in source.tensors} if named is None else named


def _aliases(source: Source) -> dict[str, str]:
    return {name: f"tied to {first}" for name, first in source.aliases.items()}


def _member(source: Source, root: Shapes, called: Mapping[str, str]) -> Member:
    """A checkpoint with its tensors named as in the base. Of the names of one tensor the base's is the real one."""
    naming = named_as({called[n]: i.shape for n, i in source.tensors.items() if n in called}, root, source.label)
    naming = Naming({n: naming.names[name] for n, name in called.items()}, naming.prefix)
    groups: dict[str, list[str]] = {}
    for name in called:
        groups.setdefault(source.aliases.get(name, name), []).append(name)
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    spare: dict[str, str] = {}
    for first, group in groups.items():
        real = next((name for name in [first, *group] if naming.names[name] in root), first)
        names[naming.names[real]] = real
        dropped |= {name: f"tied to {real}" for name in group if name != real}
        spare |= {naming.names[name]: name for name in group if name != real}
    return Member(source, names, dropped, _backbone(source, naming, root), spare)


def _backbone(source: Source, naming: Naming, root: Shapes) -> str:
    """What a checkpoint's own names start with inside its backbone (`bert.`), or nothing when there is no such part."""
    prefix = naming.prefix
    inner = {n[len(prefix):]: info.numel for n, info in source.tensors.items() if n.startswith(prefix)}  # fmt: skip
    if prefix and len(inner) < len(source.tensors):
        return prefix
    part = _main_part(inner, {n[len(prefix):] for n, to in naming.names.items() if to in root})  # fmt: skip
    if part or not any(is_head_name(name) for name in inner):
        return prefix + part
    return ""


def _main_part(sizes: Mapping[str, int], shared: set[str]) -> str:
    """The first part of most shared parameters' names, if all outside of it is heads or not shared."""
    firsts: Counter[str] = Counter()
    for name in shared:
        firsts[name.split(".", 1)[0] + "."] += sizes[name]
    if not firsts:
        return ""
    prefix, size = firsts.most_common(1)[0]
    outside = [n for n in sizes if not n.startswith(prefix)]
    is_main = size > 0.5 * sum(firsts.values()) and all(is_head_name(n) or n not in shared for n in outside)
    return prefix if is_main else ""


class _Aligner:
    """Sorts the union of all names into tensors, heads, dropped keys and problems."""

    def __init__(
        self,
        base: Member | None,
        experts: dict[str, Member],
        select: Select,
        task_heads: bool,
        kept: Mapping[str, str],
    ) -> None:
        self.base, self.experts, self.select, self.task_heads, self.kept = base, experts, select, task_heads, kept
        self.root = base or next(iter(experts.values()))
        self.tensors: dict[str, TensorInfo] = {}
        self.forced: dict[str, Choice] = {}
        self.heads: dict[str, list[str]] = {task: [] for task in experts}
        self.problems: list[Problem] = []
        self.seen: dict[str, None] = {}

    def run(self) -> None:
        self.seen = dict.fromkeys(name for member in self._members() for name in member.names)
        for name in self.seen:
            self._place(name)
        if self.problems:
            others = other_kinds(self.root.source, [m.source for m in self.experts.values()], self._root_label())
            raise MismatchError(mismatch(self.problems, others, self.task_heads))

    def _place(self, name: str) -> None:
        holders = {task: m for task, m in self.experts.items() if name in m.names}
        reason = next((why for pattern, why in self.kept.items() if fnmatchcase(name, pattern)), None)
        if reason and self.base and name in self.base.names:
            self._keep(name, reason)
        elif why := self._computed(name):
            self._leave(name, why)
        elif self._is_head(name, holders):
            for task in holders:
                self.heads[task].append(name)
            if self.base and name in self.base.names:
                self._keep(name, "the base's own head")
        elif self.base is not None and name not in self.base.names:
            self._extra(name, holders)
        elif len(holders) < len(self.experts):
            self._missing(name, holders)
        else:
            self._shared(name)

    def _members(self) -> list[Member]:
        return [*([self.base] if self.base else []), *self.experts.values()]

    def _holders(self, name: str) -> list[Member]:
        return [member for member in self._members() if name in member.names]

    def _picked(self, name: str, *actions: str) -> bool:
        """Whether the recipe names a tensor for one of these actions."""
        return any(action in actions and fnmatchcase(name, pattern) for action, pattern in self.select.patterns())

    def _computed(self, name: str) -> str | None:
        """Why nothing was learned in a tensor, unless the recipe says what happens to it."""
        if self._picked(name, "head", "decompose", "scale", "average"):
            return None
        return computed(self._holders(name)[0].info(name))

    def _leave(self, name: str, why: str) -> None:
        """Keep what is not learned from the base; where the base lacks it nobody needs it."""
        differing = self._differing(name, True) if why.startswith("computed") and name in self.root.names else []
        if differing and not self._picked(name, "keep"):
            self._differ(name, differing)
        else:
            self._keep(name, why)

    def _is_head(self, name: str, holders: Mapping[str, Member]) -> bool:
        if self._picked(name, "head"):
            return True
        if not self.task_heads or not holders or self._picked(name, "keep"):
            return False
        in_base = self.base is None or name in self.base.names
        if not in_base and "pooler" in name.split("."):
            return (
                True  # fine-tuned from nothing with the classifier that it feeds, so there is no start to merge about
            )
        if any(m.backbone and m.names[name].startswith(m.backbone) for m in holders.values()):
            return False
        return is_head_name(name) or (
            any(m.backbone for m in holders.values()) and (not in_base or len(self._shapes(name)) > 1)
        )

    def _shapes(self, name: str) -> dict[tuple[int, ...], str]:
        """Shape -> the first file that has it."""
        shapes: dict[tuple[int, ...], str] = {}
        for info in (m.info(name) for m in self._holders(name)):
            shapes.setdefault(info.shape, info.file)
        return shapes

    def _keep(self, name: str, reason: str) -> None:
        """Keep a tensor of the base, or of the first expert where there is none; drop what these lack."""
        if name not in self.root.names:
            for member in self._holders(name):
                member.dropped[member.names[name]] = f"{reason}; {self._root_label()} lacks it"
            return
        info = self.root.info(name)
        self.tensors[name] = TensorInfo(name, info.shape, info.dtype, info.file)
        self.forced[name] = Choice("keep", reason)

    def _root_label(self) -> str:
        return "the base" if self.base else self.root.source.label

    def _extra(self, name: str, holders: Mapping[str, Member]) -> None:
        lost = []
        for task, member in holders.items():
            stored, tied = member.names[name], self._tied(member, name, self.root.names)
            if tied:
                member.dropped[stored] = f"tied to {tied}"
            elif self._picked(name, "keep"):
                member.dropped[stored] = "kept from the base, which lacks it"
            else:
                lost.append(f"{member.info(name).shape} in expert '{task}' ({member.info(name).file})")
        if lost:
            self.problems.append(Problem("extra", name, f"{', '.join(lost)}, missing from the base"))

    def _missing(self, name: str, holders: Mapping[str, Member]) -> None:
        having = self._holders(name)
        everywhere = {n for n in self.root.names if all(n in m.names for m in self.experts.values())}
        lacking = {t: m for t, m in self.experts.items() if t not in holders}
        if self._picked(name, "keep"):
            self._keep(name, "recipe")
        elif self.base and not holders and (self._in_module(name) or (self.task_heads and self._base_only(name))):
            self._keep(name, "in the base only: no expert has it")
        elif all(self._tied(member, name, everywhere) for member in having):
            for member in having:
                member.dropped[member.names[name]] = f"tied to {self._tied(member, name, everywhere)}"
        elif all(name in member.spare for member in lacking.values()):
            for member in lacking.values():  # tied there, and two tensors in other inputs
                member.names[name] = member.spare[name]
                del member.dropped[member.spare[name]]
            self._shared(name)
        else:
            info = having[0].info(name)
            lost = [f"expert '{task}' ({member.source.label})" for task, member in lacking.items()]
            self.problems.append(
                Problem("missing", name, f"{info.shape} in {info.file}, missing from {', '.join(lost)}")
            )

    def _in_module(self, name: str) -> bool:
        """Whether a tensor is of a sentence encoder's further module, while no expert was saved with any."""
        assert self.base
        paths = tuple(f"{module.path}/" for module in self.base.source.modules)
        return bool(paths) and name.startswith(paths) and not any(m.source.modules for m in self.experts.values())

    def _base_only(self, name: str) -> bool:
        """A pooler or a pre-training head: parts that fine-tuning a classifier commonly leaves out."""
        backbones = {m.backbone for m in self.experts.values()}
        outside = not any(b and name.startswith(b) for b in backbones) and not any(b == "" for b in backbones)
        return (
            "pooler" in name
            or is_head_name(name)
            or (outside and any(n.startswith(b) for b in backbones for n in self.seen))
        )

    def _shared(self, name: str) -> None:
        shapes, info = self._shapes(name), self.root.info(name)
        kinds = {m.info(name).dtype.is_floating_point for m in self._holders(name)}
        if self._picked(name, "keep"):
            self._keep(name, "recipe")
        elif len(shapes) > 1:
            listed = ", ".join(f"{shape} in {file}" for shape, file in shapes.items())
            self.problems.append(Problem("shape", name, listed))
        elif len(kinds) > 1:
            self.problems.append(Problem("dtype", name, "float in some inputs and integer in others"))
        elif kinds == {False} and (differing := self._differing(name)):
            self._differ(name, differing)
        else:
            self.tensors[name] = TensorInfo(name, info.shape, info.dtype, info.file)

    def _differ(self, name: str, tasks: Sequence[str]) -> None:
        where = ", ".join(f"expert '{task}' ({self.experts[task].info(name).file})" for task in tasks)
        dtype = str(self.root.info(name).dtype).removeprefix("torch.")
        first = self.root.info(name).file
        self.problems.append(Problem("integer", name, f"{dtype}, of other values in {where} than in {first}"))

    def _differing(self, name: str, corner: bool = False) -> list[str]:
        """The experts whose integers are others than the base's; `corner`: in what both have, whatever their lengths."""
        members = self._holders(name)
        if is_mask(self.root.info(name)) or any(m.info(name).dtype.is_floating_point for m in members):
            return []
        first = self.root.source.read(self.root.names[name])
        others = {t: m for t, m in self.experts.items() if name in m.names and m is not self.root}
        return [t for t, m in others.items() if not _equal(first, m.source.read(m.names[name]), corner)]

    def _tied(self, member: Member, name: str, anchors: Mapping[str, str] | set[str]) -> str | None:
        """The tensor of `anchors` that a member has under this name too: a tied weight, stored twice.

        What is tied is an embedding table and a layer of output, or the biases of one: others are equal by chance.
        """
        info = member.info(name)
        if not info.dtype.is_floating_point:
            return None
        twins = [n for n in member.names if n != name and n in anchors and _may_be_tied(info, name, member.info(n), n)]
        if not twins:
            return None
        tensor = member.source.read(info.name)
        if tensor.dim() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            return None
        return next((n for n in twins if torch.equal(member.source.read(member.names[n]), tensor)), None)


def _may_be_tied(info: TensorInfo, name: str, other: TensorInfo, twin: str) -> bool:
    if info.shape != other.shape or info.dtype != other.dtype:
        return False
    if len(info.shape) == 1:  # lm_head.bias and lm_head.decoder.bias
        short, long = sorted((name, twin), key=len)
        return long.endswith("decoder.bias") and long.removesuffix("decoder.bias") + "bias" == short
    return len(info.shape) > 1 and any(is_embedding(n) or n.startswith("lm_head.") for n in (name, twin))


def _equal(one: Tensor, other: Tensor, corner: bool) -> bool:
    if corner and one.dim() == other.dim():
        common = tuple(slice(min(sides)) for sides in zip(one.shape, other.shape, strict=True))
        one, other = one[common], other[common]
    return one.shape == other.shape and bool((one.long() == other.long()).all())
