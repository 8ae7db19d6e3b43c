"""int8 and fp8 checkpoints as floats: each weight is made of its codes and scales when it is read.

    W = (codes - zero) · scale          a scale per matrix, per row, per group of a row or per block
    W = codes · SCB / 127               LLM.int8 of bitsandbytes, SCB per row (Dettmers et al. 2022, arXiv:2208.07339)

In float32 and exact but for its rounding. Packed codes (4 bits and below) are left to the libraries that wrote them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adarank.errors import CheckpointError, itemise
from adarank.io.checkpoint import Checkpoint, TensorInfo
from adarank.io.quantised import DEQUANTISE, FLOAT8, is_code, quantisation

_SCALES = ("weight_scale", "weight_scale_inv", "SCB")
_ACTIVATIONS = ("input_scale", "output_scale", "input_zero_point", "output_zero_point", "activation_scale", "k_scale", "v_scale")  # fmt: skip
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ROW_MAJOR = 0  # bitsandbytes' weight_format of codes that lie as the weight does


@dataclass(frozen=True)
class _Codes:
    """What a weight is made of: names of its scales and zero points; the share of SCB that a code stands for."""

    scale: str | None
    zero: str | None
    share: float = 1.0


class Dequantised(Checkpoint):
    """A quantised checkpoint as one of floats, under the same names.

    Arguments:
        checkpoint: of int8 codes or floats of 8 bits, with scales as bitsandbytes (LLM.int8), compressed-tensors or
            DeepSeek's fp8 lay them beside. One without codes is as it was, but for its configuration.

    Raises:
        CheckpointError: codes of another kind, or scales that do not fit.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self._stored = checkpoint
        self._codes = {info.name: self._of(info) for info in checkpoint.tensors.values() if is_code(info)}
        used = {name for code in self._codes.values() for name in (code.scale, code.zero) if name}
        beside = [name for name in checkpoint.tensors if name.rsplit(".", 1)[-1] in (*_ACTIVATIONS, "weight_format")]
        self._scales = [name for name in checkpoint.tensors if name in used or (name in beside and self._codes)]
        self._refuse()
        dtype = self._dtype()
        self.tensors = {
            name: replace(info, dtype=dtype) if name in self._codes else info
            for name, info in checkpoint.tensors.items()
            if name not in self._scales
        }
        self.config = _floating(checkpoint.config)

    @property
    def quantisation(self) -> str | None:
        """None: it is one of floats."""
        return None

    @property
    def unused(self) -> Mapping[str, str]:
        """What became part of weights."""
        others = dict(self._stored.unused)
        return {**others, f"scales: {len(self._scales)} tensor(s)": "in their weights"} if self._scales else others

    def read(self, name: str) -> Tensor:
        """The tensor; one that was codes in float32."""
        code = self._codes.get(name)
        if code is None:
            return self._stored.read(name)
        weight = self._stored.read(name).float()
        if code.zero is not None:
            weight = weight - self._spread(code.zero, weight.shape)
        if code.scale is not None:
            weight = weight * (self._spread(code.scale, weight.shape) * code.share)
        return weight

    def _of(self, info: TensorInfo) -> _Codes:
        stem, tensors = info.name.removesuffix("weight"), self._stored.tensors
        scale = next((stem + end for end in _SCALES if stem + end in tensors), None)
        zero = f"{stem}weight_zero_point"
        share = 1 / 127 if scale is not None and scale.endswith("SCB") else 1.0
        return _Codes(scale, zero if zero in tensors else None, share)

    def _refuse(self) -> None:
        """Raise what cannot be turned into floats, with its reason."""
        problems = [text for name in self._codes if (text := self._problem(name))]
        left = [
            n for n in self._stored.tensors if n.endswith(("weight_g_idx", "absmax", "quant_map", "qzeros", "g_idx"))
        ]
        problems += [f"{name}: of a kind that is not known here" for name in left]
        if problems:
            label = f"{self.label}: quantised ({quantisation(self._stored)}). dequantize: true does int8 and fp8 alone, and here are"
            raise CheckpointError(itemise(label, problems, DEQUANTISE, 6))

    def _problem(self, name: str) -> str | None:
        info, code = self._stored.tensors[name], self._codes[name]
        if info.dtype not in (torch.int8, *FLOAT8.values()) or not name.endswith("weight"):
            return f"{name}: {str(info.dtype).removeprefix('torch.')} {info.shape}"
        if code.scale is None and info.dtype == torch.int8:
            return f"{name}: int8 without scales"
        form = f"{name}_format"
        if form in self._stored.tensors and int(self._stored.read(form)) != _ROW_MAJOR:
            return f"{name}: codes in an order for one kind of GPU"
        spread = [
            n for n in (code.scale, code.zero) if n and not self._fits(self._stored.tensors[n].shape, info.shape, n)
        ]
        return f"{name}: {info.shape} with {spread[0]}: {self._stored.tensors[spread[0]].shape}" if spread else None

    def _fits(self, shape: tuple[int, ...], whole: tuple[int, ...], name: str) -> bool:
        if torch.Size(shape).numel() == 1 or (len(shape) == 1 and shape[0] == whole[0]):
            return True
        steps = self._steps(shape, whole, name)
        return len(shape) == len(whole) and all(-(-w // s) == n for n, w, s in zip(shape, whole, steps, strict=True))

    def _steps(self, shape: tuple[int, ...], whole: tuple[int, ...], name: str) -> tuple[int, ...]:
        """How many entries of the weight, along each axis, share one of the scale's."""
        even = tuple(w // n if n and w % n == 0 else w + 1 for n, w in zip(shape, whole, strict=False))
        block = _block(self._stored.config) or ([128, 128] if name.endswith("_inv") else None)
        if block and len(shape) == len(whole) >= 2:
            fits = all(-(-w // side) == n for n, w, side in zip(shape[-2:], whole[-2:], block, strict=True))
            return (*even[:-2], *block) if fits else even
        return even

    def _spread(self, name: str, whole: torch.Size) -> Tensor:
        """Scales or zero points, one for each entry of a weight (or to be broadcast over it), in float32."""
        scale = self._stored.read(name).float()
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.dim() == 1:
            return scale.reshape(-1, *[1] * (len(whole) - 1))
        for axis, step in enumerate(self._steps(tuple(scale.shape), tuple(whole), name)):
            if scale.shape[axis] not in (1, whole[axis]):
                scale = scale.repeat_interleave(step, axis).narrow(axis, 0, whole[axis])
        return scale

    def _dtype(self) -> torch.dtype:
        """What weights are written as: what the configuration names, else what most other floats are, else float32."""
        named = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        if named in _FLOATS:
            return _FLOATS[named]
        others = Counter(i.dtype for n, i in self._stored.tensors.items() if i.dtype.is_floating_point and n not in self._codes and n not in self._scales)  # fmt: skip
        return others.most_common(1)[0][0] if others else torch.float32


def _block(config: Mapping[str, Any]) -> list[int] | None:
    """The block size that a configuration gives scales, in rows and columns."""
    given = config.get("quantization_config")
    size = given.get("weight_block_size") if isinstance(given, dict) else None
    return [int(side) for side in size] if isinstance(size, list) and len(size) == 2 else None


def _floating(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without a word of quantisation."""
    keys = ("quantization_config", "compression_config", "quantization")
    return {
        key: _floating(value) if key in ("text_config", "vision_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in keys
    }
