"""Base and experts, paired tensor by tensor, and the task vectors between them.

    τ_t = W_t - origin        origin: the base, the mean of the experts, or zero

`align` pairs tensors by name, never by position, accounts for every key of every input and raises one
error that lists all that does not fit. A `Network` then reads one tensor at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from adarank.alignment.selection import Choice, Select, check_patterns, choose, is_head_name, unmatched
from adarank.errors import MismatchError, RecipeError, itemise
from adarank.io.checkpoint import Source, TensorInfo, check_finite

OriginKind = Literal["pretrained", "average", "zero"]


@dataclass(frozen=True)
class Member:
    """One checkpoint of the network, with the names its tensors have in the base.

    Attributes:
        names: name in the base -> name in this checkpoint.
        dropped: name in this checkpoint -> why it is not used.
        backbone: what the checkpoint's own names start with inside the backbone, such as `bert.`.
    """

    source: Source
    names: Mapping[str, str]
    dropped: dict[str, str] = field(default_factory=dict)
    backbone: str = ""

    def info(self, name: str) -> TensorInfo:
        return self.source.tensors[self.names[name]]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor in float32 (float64 stays), checked for NaN. It may be mapped: never write to it."""
        info = self.info(name)
        tensor = check_finite(self.source.read(info.name), info.name, info.file)
        return tensor.to(device=device, dtype=torch.promote_types(info.dtype, torch.float32))


@dataclass(frozen=True)
class Network:
    """Aligned base and experts.

    Attributes:
        base: the pretrained model; None for methods that need none.
        experts: task -> expert, in the recipe's order.
        tensors: every tensor that is not a head -> what it is, under its name in the base.
        choices: the same names -> what happens to them and why.
        heads: task -> names (in the base's naming) of the tensors that belong to the task.
    """

    base: Member | None
    experts: Mapping[str, Member]
    tensors: Mapping[str, TensorInfo]
    choices: Mapping[str, Choice]
    heads: Mapping[str, tuple[str, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.experts)

    def merged(self) -> list[str]:
        """Names of the tensors that a method merges, in the base's order."""
        return [n for n, c in self.choices.items() if c.action in ("decompose", "scale")]

    def reference(self) -> Member:
        """The base, or the first expert when there is no base: it gives names, dtypes and kept tensors."""
        return self.base or next(iter(self.experts.values()))

    def origin(self, name: str, kind: OriginKind, device: torch.device | str = "cpu") -> Tensor:
        """What task vectors are counted from, for one tensor, in float32 (float64 if one has it so)."""
        if kind == "pretrained":
            if self.base is None:
                raise RecipeError("This method counts task vectors from the base. Give base_model.")
            return self.base.read(name, device).to(self._widest(name, self.base))
        experts = list(self.experts.values())
        widest = self._widest(name)
        total = torch.zeros(experts[0].info(name).shape, device=device, dtype=widest)
        if kind == "zero":
            return total
        for expert in experts:
            total.add_(expert.read(name, device))
        return total.div_(len(experts))

    def _widest(self, name: str, *others: Member) -> torch.dtype:
        """float64 if an expert has the tensor so: task vectors and origin are of one dtype."""
        dtypes = {member.info(name).dtype for member in (*self.experts.values(), *others)}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def deltas(self, name: str, origin: Tensor) -> Deltas:
        """Task vectors of one tensor about `origin`, each computed when asked for."""
        return Deltas(self, name, origin)

    def kept(self, name: str) -> Tensor:
        """A tensor kept from the base, as stored."""
        member = self.reference()
        info = member.info(name)
        return check_finite(member.source.read(info.name), info.name, info.file)

    def head(self, task: str) -> dict[str, Tensor]:
        """The tensors that belong to a task, under the names that the expert's own files use."""
        expert = self.experts[task]
        infos = [expert.info(name) for name in self.heads[task]]
        return {i.name: check_finite(expert.source.read(i.name), i.name, i.file) for i in infos}


class Deltas(Mapping[str, Tensor]):
    """task -> W_task - origin. Lazy, so that a loop over tasks holds one task vector at a time."""

    def __init__(self, network: Network, name: str, origin: Tensor) -> None:
        self._network, self._name, self._origin = network, name, origin

    def __getitem__(self, task: str) -> Tensor:
        return self._network.experts[task].read(self._name, self._origin.device) - self._origin

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.experts)

    def __len__(self) -> int:
        return len(self._network.experts)


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
