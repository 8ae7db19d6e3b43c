"""What the base calls a checkpoint's tensors: wrappers' parts taken out, prefixes taken off, put on or exchanged.

    bert.encoder.layer.0.w                       encoder.layer.0.w          a base without prefix, an expert with a head
    base_model.model.model.layers.0.w            model.layers.0.w           a wrapped model's state dict
    language_model.model.layers.0.w              model.language_model.layers.0.w      of two releases of transformers
    model.layers.0._checkpoint_wrapped_module.w  model.layers.0.w
    embeddings.LayerNorm.gamma                   embeddings.LayerNorm.weight

A prefix is any number of parts between dots. The one that pairs the most tensors of equal shape with the base is taken;
names that are the base's as they are go first where it is as good, and where two pair as many and disagree, none is guessed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from adarank.errors import MismatchError

Shapes = Mapping[str, tuple[int, ...]]
Rule = tuple[str, str]
"""(prefix that is taken off, prefix that is put on)."""

_AS_THEY_ARE: Rule = ("", "")
# Parts that PyTorch's and Lightning's wrappers put anywhere into names. None of them names a module of a model.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module"})  # fmt: skip
# Parts that say nothing of what is inside, so that `model.` may stand for `bert.`. `roberta.` may not.
_GENERIC = frozenset({"model", "module", "base_model", "auto_model", "backbone", "net", "network", "_model"})
# What older releases of transformers and PyTorch call parts of norms and of layers whose weights are normed.
_SPELLED = {
    ".gamma": ".weight",
    ".beta": ".bias",
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
_MOST = 16  # prefixes with the same rest: more of them are layers of one model


@dataclass(frozen=True)
class Naming:
    """How a checkpoint's tensors are called in the base.

    Attributes:
        names: stored name -> name in the base, or what it would be called there.
        prefix: what was taken off most names.
    """

    names: Mapping[str, str]
    prefix: str = ""


def named_as(stored: Shapes, root: Shapes, label: str) -> Naming:
    """Name a checkpoint's tensors as the base does. Every stored name is in the result; no two become one.

    Arguments:
        stored: the checkpoint's names -> shapes.
        root: the base's.
        label: what errors call the checkpoint.

    Raises:
        MismatchError: prefixes can be read in two ways that pair different tensors, or two tensors have one name.
    """
    if stored.keys() <= root.keys() or root.keys() <= stored.keys():
        return Naming({name: name for name in stored})
    inner, outer = _unwrapped(stored), _unwrapped(root)
    short = {name: stored[inner_name] for name, inner_name in inner.items()}
    wanted = {name: root[outer_name] for name, outer_name in outer.items()}
    rule = _best(short, wanted, label)
    paired = _paired(rule, short, wanted)
    taken = set(paired.values())
    paired |= {n: n for n in short if n in wanted and n not in paired and n not in taken}
    _refuse_doubles(paired, short, wanted, label)
    paired |= _remaining(paired, short, wanted)
    names = {inner_name: outer[paired[name]] for name, inner_name in inner.items() if name in paired}
    names |= _unpaired(
        rule, {n: inner_name for n, inner_name in inner.items() if n not in paired}, {*names.values(), *root}, label
    )
    return Naming({name: names[name] for name in stored}, rule[0])


def _unwrapped(names: Collection[str]) -> dict[str, str]:
    """Name without wrappers' parts, its last parts spelled as today -> name. As it is where two would become one."""
    short = {name: _today(".".join(part for part in name.split(".") if part not in _WRAPPERS)) for name in names}
    count = Counter(short.values())
    return {(short_name if count[short_name] == 1 and short_name else name): name for name, short_name in short.items()}


def _today(name: str) -> str:
    end = next((end for end in _SPELLED if name.endswith(end)), None)
    return name.removesuffix(end) + _SPELLED[end] if end else name


def _splits(name: str) -> Iterator[Rule]:
    """Every (prefix, rest) of a name, the empty prefix first."""
    start = 0
    while True:
        yield name[:start], name[start:]
        start = name.find(".", start) + 1
        if not start:
            return


def _meaningful(strip: str, add: str, generic: frozenset[str] = _GENERIC) -> bool:
    """Whether one prefix may be exchanged for another: what the two name must be the same, or nothing on one side.

    Arguments:
        generic: parts that name nothing.

    Two prefixes that end in the same part are a shorter rule, derived from fewer names.
    """
    first, second = strip.split(".")[:-1], add.split(".")[:-1]
    if first and second and first[-1] == second[-1]:
        return False
    one, other = set(first) - generic, set(second) - generic
    return one <= other or other <= one


def _votes(stored: Shapes, root: Shapes) -> dict[Rule, tuple[int, int]]:
    """Rule -> how many tensors it pairs: those of equal shape, and all."""
    ends: dict[str, list[str]] = defaultdict(list)
    for name in root:
        for prefix, rest in _splits(name):
            ends[rest].append(prefix)
    counts: dict[Rule, list[int]] = {}
    for name, shape in stored.items():
        for strip, rest in _splits(name):
            prefixes = ends.get(rest, [])
            for add in prefixes if len(prefixes) <= _MOST else ():
                rule = counts.setdefault((strip, add), [0, 0])
                rule[0] += root[add + rest] == shape
                rule[1] += 1
    return {rule: (same, every) for rule, (same, every) in counts.items() if _meaningful(*rule)}


def _best(stored: Shapes, root: Shapes, label: str) -> Rule:
    """The rule that pairs the most, if it is most of what either has; names as they are if that is as good."""
    votes = _votes(stored, root)
    votes[_AS_THEY_ARE] = votes.get(_AS_THEY_ARE, (0, 0))
    most = max(votes.values())
    if votes[_AS_THEY_ARE] == most or 2 * most[1] < min(len(stored), len(root)):
        return _AS_THEY_ARE
    best, *rivals = [rule for rule, count in votes.items() if count == most]
    for rival in rivals:
        _refuse_rivals(_paired(best, stored, root), _paired(rival, stored, root), label)
    return best


def _refuse_rivals(one: Mapping[str, str], other: Mapping[str, str], label: str) -> None:
    """Two rules that are as good must not pair a tensor with different ones."""
    back = {to: name for name, to in other.items()}
    clash = next(((n, to, other[n]) for n, to in one.items() if other.get(n, to) != to), None)
    if clash is not None:
        how = f"'{clash[0]}' may be '{clash[1]}' or '{clash[2]}'"
    else:
        double = next(((to, n, back[to]) for n, to in one.items() if back.get(to, n) != n), None)
        if double is None:
            return
        how = f"'{double[0]}' may be '{double[1]}' or '{double[2]}'"
    raise MismatchError(
        f"{label}: its names fit the base's in two ways that are as good, and pair different tensors: {how}. "
        "Name its tensors as the base does."
    )


def _paired(rule: Rule, stored: Shapes, root: Shapes) -> dict[str, str]:
    """Stored name -> name in the base, for what a rule pairs."""
    strip, add = rule
    to = {name: add + name[len(strip):] for name in stored if name.startswith(strip)}  # fmt: skip
    return {name: base_name for name, base_name in to.items() if base_name in root}


def _refuse_doubles(paired: Mapping[str, str], stored: Shapes, root: Shapes, label: str) -> None:
    """A tensor that the base has under its very name, while another one was paired with it, is neither's to drop."""
    taken = {to: name for name, to in paired.items()}
    doubles = [name for name in stored if name in root and name not in paired]
    if doubles:
        name = doubles[0]
        raise MismatchError(
            f"{label}: {len(doubles)} tensor(s) of the base are there twice, such as '{name}', which '{taken[name]}' is too once its prefix is taken off. "
            "Keep one of them in the file."
        )


def _remaining(paired: Mapping[str, str], stored: Shapes, root: Shapes) -> dict[str, str]:
    """Pairs of what is left on both sides, each by a prefix of its own: only what can be read in one way, of equal shape."""
    left = {name: shape for name, shape in stored.items() if name not in paired}
    taken = set(paired.values())
    free = {name: shape for name, shape in root.items() if name not in taken}
    ends: dict[str, list[str]] = defaultdict(list)
    for name in free:
        for prefix, rest in _splits(name):
            ends[rest].append(prefix)
    claims: dict[str, set[str]] = defaultdict(set)
    for name, shape in left.items():
        for strip, rest in _splits(name):
            if _numbered(strip):
                break
            for add in ends.get(rest, []):
                if free[add + rest] == shape and not _numbered(add) and _meaningful(strip, add, frozenset()):
                    claims[name].add(add + rest)
    wanted = Counter(to for each in claims.values() for to in each)
    return {name: next(iter(each)) for name, each in claims.items() if len(each) == 1 and wanted[next(iter(each))] == 1}


def _numbered(prefix: str) -> bool:
    return any(part.isdigit() for part in prefix.split("."))


def _unpaired(rule: Rule, left: Mapping[str, str], taken: set[str], label: str) -> dict[str, str]:
    """Stored name -> what it would be called in the base, for names that the base lacks.

    They lose the prefix, as all experts' heads should be called alike. They never get one: they were not inside it.
    """
    strip, add = rule
    used, names = set(taken), {}
    for name, stored in left.items():
        to = add + name[len(strip):] if strip and name.startswith(strip) else name  # fmt: skip
        free = next((each for each in (to, name, stored) if each not in used), None)
        if free is None:
            raise MismatchError(
                f"{label}: '{stored}' and another of its tensors have one name in the base. Keep one of them in the file."
            )
        names[stored] = free
        used.add(free)
    return names
