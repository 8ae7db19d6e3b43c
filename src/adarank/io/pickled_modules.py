"""Whole modules that were pickled (`torch.save(module)`), as state dicts; nothing of their code is imported or run.

A pickle names classes and functions. Here only what makes tensors and plain containers is what its name says; every other name
becomes a class without behaviour, which keeps what the pickle gives it. A module's tensors are then read off its `_parameters`,
`_buffers` and `_modules`, as `torch.nn.Module.state_dict` does.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adarank.errors import CheckpointError
from adarank.io.files import check_file
from adarank.io.pickled import DAMAGED, check_members, damaged

_TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}  # of torch._utils
_STORAGES = {"Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool"}
_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # as pickles of protocol 2, which torch.save writes, call it
}


class Inert:
    """What stands for an object of any class: it keeps what it is given, and does nothing."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class RestrictedUnpickler(pickle.Unpickler):
    """Reads a pickle whose names stand for tensors, plain containers and `Inert` objects alone."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        if module == "torch._utils" and name in _TENSORS:
            return getattr(torch._utils, name)
        if module == "torch" and name.removesuffix("Storage") in _STORAGES and name.endswith("Storage"):
            return getattr(torch, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _PLAIN.get((module, name)) or type(name, (Inert,), {"__module__": module})


def _restricted() -> ModuleType:
    """A module as `torch.load` takes it in the place of `pickle`."""
    module = ModuleType("adarank_restricted_pickle")
    module.__dict__.update(
        Unpickler=RestrictedUnpickler, load=lambda file, **named: RestrictedUnpickler(file, **named).load()
    )
    return module


def load_module_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled module or state dict, by the names that `state_dict` would give them.

    Raises:
        CheckpointError: it is damaged, or holds no tensors.
    """
    check_file(file)
    check_members(file, tensors=True)
    try:
        # safe without `weights_only`, whose list has no classes of modules: `find_class` above gives none of the file's code
        content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_restricted())
    except (*DAMAGED, pickle.UnpicklingError) as error:
        raise damaged(file, error) from None
    state = dict(_tensors(content, "", set()))
    if not state:
        raise CheckpointError(f"{file}: holds no tensors of a module. Give a file that torch.save wrote of one.")
    return state


def _tensors(value: Any, name: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name.removesuffix("."), value.detach()
    elif id(value) in above:  # a module that holds itself
        return
    elif isinstance(value, Inert):
        parts = [vars(value).get(part) for part in ("_parameters", "_buffers", "_modules")]
        hidden = vars(value).get("_non_persistent_buffers_set") or ()
        for part in parts:
            for key, inner in part.items() if isinstance(part, dict) else ():
                if key not in hidden:
                    yield from _tensors(inner, f"{name}{key}.", above | {id(value)})
    elif isinstance(value, dict):
        wrapped = value.get("state_dict")
        inner_of = wrapped if isinstance(wrapped, dict) else value
        for key, inner in inner_of.items():
            if isinstance(key, str):
                yield from _tensors(inner, f"{name}{key}.", above | {id(value)})
