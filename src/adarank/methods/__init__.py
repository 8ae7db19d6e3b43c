"""The data-free methods. A new one is one file here and one line below."""

from __future__ import annotations

from adarank.methods.average import WeightAverage
from adarank.methods.base import Method, merge_tensor, merge_tensors
from adarank.methods.cart import CART
from adarank.methods.linear import Linear
from adarank.methods.masked import Masked
from adarank.methods.svd_k import SVDk
from adarank.methods.task_arithmetic import TaskArithmetic

METHODS: dict[str, type[Method]] = {m.name: m for m in (WeightAverage, Linear, TaskArithmetic, SVDk, CART, Masked)}

__all__ = [
    "CART",
    "METHODS",
    "Linear",
    "Masked",
    "Method",
    "SVDk",
    "TaskArithmetic",
    "WeightAverage",
    "merge_tensor",
    "merge_tensors",
]
