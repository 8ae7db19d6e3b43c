"""Pairing: every tensor of base and experts sorted by name into merged, kept, heads and dropped; all problems in one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch

from adarank.alignment.selection import Choice, Select, check_patterns, choose, is_head_name, unmatched
from adarank.alignment.task_vectors import Member, Network
from adarank.errors import MismatchError, RecipeError, itemise
from adarank.io.checkpoint import Source, TensorInfo


def align(
    base: Source | None,
    experts: Mapping[str, Source],
    select: Select | None = None,
    text_tasks: bool = False,
    task_heads: bool = False,
    kept: Mapping[str, str] | None = None,
) -> Network:
    """Pair the tensors of base and experts by name.

    Arguments:
        base: the pretrained model, or None.
        experts: task -> model fine-tuned from the base.
        select: the recipe's overrides of what happens to which tensor.
        text_tasks: keep embedding tables from the base, as both papers do for language models. Without a base there is
            none to keep: they merge.
        task_heads: find task heads by themselves: tensors outside the backbone that the base lacks, that
            differ in shape, or that carry a head's usual name.
        kept: pattern -> why the tensors of the base that it matches stay as they are, whatever else is asked.

    Raises:
        MismatchError: a tensor is missing, extra or of another shape; all such tensors are listed.
        RecipeError: a pattern matches nothing, or patterns contradict each other.
    """
    select = select or Select()
    if not experts:
        raise RecipeError("models: no expert is given. A merge needs at least one.")
    root = base or next(iter(experts.values()))
    root_names = {n: n for n in root.tensors if n not in root.aliases}
    base_member = Member(base, root_names, _aliases(base)) if base else None
    members = {task: _member(source, set(root_names)) for task, source in experts.items()}
    aligner = _Aligner(base_member, members, root, select, task_heads, kept or {})
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
    return Network(base_member, members, aligner.tensors, choices, {t: tuple(h) for t, h in aligner.heads.items()})


def _aliases(source: Source) -> dict[str, str]:
    return {name: f"tied to {first}" for name, first in source.aliases.items()}


def _member(source: Source, root: set[str]) -> Member:
    """Name the tensors of a checkpoint as the base does.

    A base saved as a bare encoder has `encoder.…` where its experts have `bert.encoder.…`; the prefix that
    pairs the most names is taken, none if that is as good.
    """
    aliases = _named_as(source.aliases, root)
    stored = [n for n in source.tensors if n not in aliases]
    firsts = sorted({n.split(".", 1)[0] + "." for n in stored})
    root_firsts = sorted({n.split(".", 1)[0] + "." for n in root})

    def renamed(add: str, strip: str) -> dict[str, str]:
        return {(n[len(strip):] if strip and n.startswith(strip) else add + n): n for n in stored}  # fmt: skip

    candidates = [("", "")] + [("", p) for p in firsts] + [(p, "") for p in root_firsts]
    add, strip = max(candidates, key=lambda c: len(root & renamed(*c).keys()))
    names = renamed(add, strip)
    if add:  # names the base lacks were never inside its backbone: leave a head's name alone
        names = {(n if n in root else n[len(add):]): s for n, s in names.items()}  # fmt: skip
    dropped = {name: f"tied to {first}" for name, first in aliases.items()}
    dropped |= {n: "another tensor has its name in the base" for n in stored if n not in set(names.values())}
    return Member(source, names, dropped, strip or _backbone(source, [s for n, s in names.items() if n in root]))


def _named_as(aliases: Mapping[str, str], root: set[str]) -> dict[str, str]:
    """`aliases`, turned so that of the names of one tensor the one that the root uses is the real one."""
    turned = dict(aliases)
    for alias, first in aliases.items():
        if alias in root and first not in root:
            turned = {n: alias for n, f in aliases.items() if f == first and n != alias} | {
                n: f for n, f in turned.items() if f != first
            }
            turned[first] = alias
    return turned


def _backbone(source: Source, shared: list[str]) -> str:
    """The first part of most shared parameters' names (`bert.`), or nothing when there is no such part."""
    sizes: Counter[str] = Counter()
    for name in shared:
        sizes[name.split(".", 1)[0] + "."] += source.tensors[name].numel
    if not sizes:
        return ""
    prefix, size = sizes.most_common(1)[0]
    outside = [n for n in source.tensors if not n.startswith(prefix)]
    is_backbone = size > 0.5 * sum(sizes.values()) and all(is_head_name(n) or n not in shared for n in outside)
    return prefix if is_backbone else ""


class _Aligner:
    """Sorts the union of all names into tensors, heads, dropped keys and problems."""

    def __init__(
        self,
        base: Member | None,
        experts: dict[str, Member],
        root: Source,
        select: Select,
        task_heads: bool,
        kept: Mapping[str, str],
    ) -> None:
        self.base, self.experts, self.root, self.select, self.task_heads = base, experts, root, select, task_heads
        self.kept = kept
        self.tensors: dict[str, TensorInfo] = {}
        self.forced: dict[str, Choice] = {}
        self.heads: dict[str, list[str]] = {task: [] for task in experts}
        self.problems: list[str] = []
        self.seen: dict[str, None] = {}

    def run(self) -> None:
        self.seen = dict.fromkeys(name for member in self._members() for name in member.names)
        for name in self.seen:
            self._place(name)
        if self.problems:
            heading = f"{len(self.problems)} tensor(s) cannot be merged:"
            remedy = "Every expert must be fine-tuned from the base. To leave a tensor out, name it in the recipe under select: keep (the base's) or head (each task's)."
            raise MismatchError(itemise(heading, self.problems, remedy))

    def _place(self, name: str) -> None:
        holders = {task: m for task, m in self.experts.items() if name in m.names}
        told = next((why for pattern, why in self.kept.items() if fnmatchcase(name, pattern)), None)
        if told and self.base and name in self.base.names:
            self._keep(name, told)
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

    def _asked(self, name: str, action: str) -> bool:
        patterns = [p for a, p in self.select.patterns() if a == action]
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def _is_head(self, name: str, holders: Mapping[str, Member]) -> bool:
        if self._asked(name, "head"):
            return True
        if not self.task_heads or not holders or self._asked(name, "keep"):
            return False
        if any(m.backbone and m.names[name].startswith(m.backbone) for m in holders.values()):
            return False
        in_base = self.base is None or name in self.base.names
        return is_head_name(name) or (
            any(m.backbone for m in holders.values()) and (not in_base or len(self._shapes(name)) > 1)
        )

    def _shapes(self, name: str) -> dict[tuple[int, ...], str]:
        """Shape -> the first file that has it."""
        members = self._members()
        shapes: dict[tuple[int, ...], str] = {}
        for info in (m.info(name) for m in members if name in m.names):
            shapes.setdefault(info.shape, info.file)
        return shapes

    def _keep(self, name: str, reason: str) -> None:
        holder = self.base or next(m for m in self.experts.values() if name in m.names)
        info = holder.info(name)
        self.tensors[name] = TensorInfo(name, info.shape, info.dtype, info.file)
        self.forced[name] = Choice("keep", reason)

    def _extra(self, name: str, holders: Mapping[str, Member]) -> None:
        for task, member in holders.items():
            info = member.info(name)
            tied = None if not info.dtype.is_floating_point else tied_to(member.source, info.name)
            if not info.dtype.is_floating_point:
                member.dropped[info.name] = f"{str(info.dtype).removeprefix('torch.')} buffer that the base lacks"
            elif tied:
                member.dropped[info.name] = f"tied to {tied}"
            elif self._asked(name, "keep"):
                member.dropped[info.name] = "kept from the base, which lacks it"
            else:
                self.problems.append(f"{name}: {info.shape} in expert '{task}' ({info.file}), missing from the base")

    def _missing(self, name: str, holders: Mapping[str, Member]) -> None:
        info = (self.base or next(iter(holders.values()))).info(name)
        if self._asked(name, "keep"):
            self._keep(name, "recipe")
        elif not info.dtype.is_floating_point:
            self._keep(name, f"{str(info.dtype).removeprefix('torch.')} buffer")
        elif self.base and not holders and self.task_heads and self._base_only(name):
            self._keep(name, "in the base only: no expert has it")
        elif all(tied_to(m.source, m.names[name]) for m in self._members() if name in m.names):
            for member in (m for m in self._members() if name in m.names):
                stored = member.names[name]
                member.dropped[stored] = f"tied to {tied_to(member.source, stored)}"
        else:
            lost = [f"expert '{t}' ({m.source.label})" for t, m in self.experts.items() if t not in holders]
            self.problems.append(f"{name}: {info.shape} in {info.file}, missing from {', '.join(lost)}")

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
        shapes = self._shapes(name)
        info = (self.base or next(iter(self.experts.values()))).info(name)
        kinds = {m.info(name).dtype.is_floating_point for m in self.experts.values()} | {info.dtype.is_floating_point}
        if self._asked(name, "keep"):
            self._keep(name, "recipe")
        elif len(shapes) > 1:
            listed = ", ".join(f"{shape} in {file}" for shape, file in shapes.items())
            self.problems.append(f"{name}: {listed}")
        elif len(kinds) > 1:
            self.problems.append(f"{name}: float in some inputs and integer in others")
        else:
            self.tensors[name] = TensorInfo(name, info.shape, info.dtype, info.file)


def tied_to(source: Source, name: str) -> str | None:
    """The other tensor of `source` with the same shape and the same values, if any: a tied weight stored twice."""
    info = source.tensors[name]
    if len(info.shape) < 2:
        return None
    twins = [n for n, i in source.tensors.items() if n != name and i.shape == info.shape and i.dtype == info.dtype]
    return next((twin for twin in twins if torch.equal(source.read(twin), source.read(name))), None)
