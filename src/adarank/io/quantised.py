"""How quantised weights are recognised: by the configuration, by files beside it, by names and dtypes.

A quantised weight is a tensor of codes and one or more of scales, apart: merged tensor by tensor, codes of one model would
come under scales of others. So they are refused by name, or turned into floats first (`io/dequantise.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adarank.errors import CheckpointError, itemise

if TYPE_CHECKING:
    from adarank.io.checkpoint import Source, TensorInfo

DEQUANTISE = "De-quantise it first: load it with the library that wrote it, turn it into floats, and save it."
# Floats of 8 bits: read, and never written. They are codes, whether there are scales beside them or not.
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Of AutoGPTQ, AutoAWQ and ModelOpt, which say how weights are quantised beside config.json.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
# Last parts of the names that libraries give codes and what belongs to them.
_SIGNS = {
    "bitsandbytes": ("SCB", "absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"),
    "gptq": ("g_idx",),
    "awq or gptq": ("qweight", "qzeros"),
    "compressed-tensors": ("weight_packed", "weight_zero_point", "weight_shape"),
    "hqq": ("W_q",),
    "quanto": ("weight._data", "weight._scale"),
    "torchao": ("_weight_qdata", "weight:qdata", "weight_qdata"),
    "aqlm": ("codebooks",),
    "vptq": ("centroids",),
    "eetq": ("weight_scales",),
    "mxfp4": ("_blocks",),
    "fp8": ("weight_scale_inv",),
}  # fmt: skip
# Last parts of the names of codes, or how these end.
_CODES = ("weight", "qweight", "weight_packed", "W_q", "codes", "_data")
_CODE_ENDS = ("_blocks", "weight_qdata", "weight:qdata")


def method_in(config: Mapping[str, Any]) -> str | None:
    """The method by which a `config.json`, or the part of it on text or images, says that weights are quantised."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        given = next((part[key] for key in _KEYS if part.get(key)), None) if isinstance(part, dict) else None
        if given is not None:
            return _method(given) if isinstance(given, dict) else str(given)
    return None


def _method(given: Mapping[str, Any]) -> str:
    keys = ("quant_method", "quant_algo", "quantization_algo", "method", "format")
    named = next((str(given[key]) for key in keys if given.get(key)), None)
    if given.get("load_in_8bit") or given.get("load_in_4bit"):
        return named or "bitsandbytes"
    return named or ("mlx" if "bits" in given else "by an unknown method")


def method_beside(folder: Path) -> str | None:
    """The method that a file beside config.json names."""
    return next((method for name, method in _FILES.items() if (folder / name).exists()), None)


def quantised_file(file: Path) -> str | None:
    """The format of a file that holds quantised weights alone, by its name."""
    if file.suffix.lower() in (".gguf", ".ggml"):
        return file.suffix[1:].upper()
    return "HQQ" if file.name == "qmodel.pt" else None


def is_code(info: TensorInfo) -> bool:
    """True for a tensor of codes: floats of 8 bits, or a matrix of short integers that is called a weight."""
    if info.dtype in FLOAT8.values():
        return True
    called = info.name.rsplit(".", 1)[-1] in _CODES or info.name.endswith(_CODE_ENDS)
    short = not info.dtype.is_floating_point and info.dtype not in (torch.bool, torch.int64, torch.uint64)
    return called and short and len(info.shape) > 1


def quantisation(source: Source) -> str | None:
    """The method by which a checkpoint is quantised, as its configuration, else its tensors tell; None if it is not."""
    if source.quantisation is not None:
        return source.quantisation
    codes = [info for info in source.tensors.values() if is_code(info)]
    if not codes:
        return None
    for method, ends in _SIGNS.items():
        if any(name.endswith(ends) for name in source.tensors):
            return method
    return "fp8" if codes[0].dtype in FLOAT8.values() else f"{_name(codes[0].dtype)} weights, such as '{codes[0].name}'"


def refuse_quantised(sources: Sequence[Source]) -> None:
    """Raise a `CheckpointError` that names each quantised checkpoint and its method, if there are any."""
    methods = {source.label: method for source in sources if (method := quantisation(source))}
    remedy = "Codes under scales do not merge. Where they are int8 or fp8, dequantize: true in the recipe turns them into floats as they are read."
    if len(methods) == 1:
        label, method = next(iter(methods.items()))
        raise CheckpointError(f"{label}: quantised ({method}). {DEQUANTISE} {remedy}")
    if methods:
        lines = [f"{label}: quantised ({method})." for label, method in methods.items()]
        heading = f"{len(methods)} checkpoints are quantised. De-quantise them first: load each with the library that wrote it, turn it into floats, and save it."
        raise CheckpointError(itemise(heading, lines, remedy))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
