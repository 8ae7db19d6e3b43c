"""The data-free methods. A new one is one file here and one line below."""

from __future__ import annotations

from adarank.methods.average import WeightAverage
from adarank.methods.base import Method, merge_tensor, merge_tensors
from adarank.methods.cart import CART
from adarank.methods.iso_c import IsoC
from adarank.methods.iso_cts import IsoCTS
from adarank.methods.linear import Linear
from adarank.methods.masked import Masked
from adarank.methods.star import STAR
from adarank.methods.svd_k import SVDk
from adarank.methods.task_arithmetic import TaskArithmetic
from adarank.methods.tsv_m import TSVM

ALL: tuple[type[Method], ...] = (WeightAverage, Linear, TaskArithmetic, SVDk, STAR, TSVM, IsoC, IsoCTS, CART, Masked)
METHODS: dict[str, type[Method]] = {method.name: method for method in ALL}

__all__ = [
    "CART",
    "METHODS",
    "Masked",
    "Method",
    "SVDk",
    "TaskArithmetic",
    "WeightAverage",
    "merge_tensor",
    "merge_tensors",
]
