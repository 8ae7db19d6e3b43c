"""Tiny models and adapters of `peft` over them, of every kind that is read; and what `peft` makes of them when it merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_LLAMA = {
    **_SIZES,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {**_SIZES, "max_position_embeddings": 16}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_LLAMA, **changes}))


def bert(**changes: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**_BERT, "num_labels": 3, **changes}))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def experts(**changes: Any) -> nn.Module:
    """A mixture of experts whose matrices are stacked, square ones among them."""
    sizes = {
        **_LLAMA,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    }
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**sizes, **changes}))


ATTENTION = ["q_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: the model that it is of, and the settings of `LoraConfig`."""

    settings: Mapping[str, Any]
    model: Callable[[], nn.Module] = llama
    task: str | None = None
    start: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "lora": Kind({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "every matrix": Kind({"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "rslora": Kind({"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION}),
    "dora": Kind({"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": [*ATTENTION, "down_proj"]}),
    "rank and alpha patterns": Kind({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "v_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 5, "o_proj": 1}}),
    "modules to save": Kind({"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "all biases": Kind({"r": 4, "target_modules": ["query", "value"], "bias": "all"}, bert, "SEQ_CLS"),
    "biases of its layers": Kind({"r": 4, "target_modules": ["query", "value"], "bias": "lora_only"}, bert, "SEQ_CLS"),
    "biases and modules": Kind({"r": 4, "target_modules": ["query"], "bias": "all", "modules_to_save": ["output.LayerNorm"]}, bert, "SEQ_CLS"),
    "transposed": Kind({"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}, gpt2),
    "transposed dora": Kind({"r": 4, "target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}, gpt2),
    "embeddings": Kind({"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings dora": Kind({"r": 4, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tied embeddings": Kind({"r": 4, "target_modules": ["wte", "c_attn"]}, gpt2),
    "tied output": Kind({"r": 4, "target_modules": ["lm_head", "q_proj"]}, lambda: llama(tie_word_embeddings=True)),
    "trained tokens": Kind({"r": 4, "target_modules": ATTENTION, "trainable_token_indices": [1, 5, 9]}),
    "stacked experts": Kind({"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, experts),
    "square experts": Kind({"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, lambda: experts(intermediate_size=16)),
    "convolutions": Kind({"r": 4, "target_modules": ["convolution"], "modules_to_save": ["classifier.1"]}, resnet),
    "convolutions dora": Kind({"r": 4, "target_modules": ["convolution"], "use_dora": True}, resnet),
    "some layers": Kind({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "orthogonal start": Kind({"r": 4, "target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
}  # fmt: skip


def make_model(kind: Kind, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind.model().eval()


def save_base(kind: Kind, folder: Path) -> Path:
    make_model(kind).save_pretrained(folder)
    return folder


def train(wrapped: nn.Module, seed: int, step: float = 0.2) -> None:
    """Move what an adapter trains at random, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(step * torch.randn_like(parameter))


def save_adapter(kind: Kind, folder: Path, seed: int) -> Path:
    """An adapter with random weights in every tensor of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(make_model(kind), LoraConfig(task_type=kind.task, **kind.settings))
        train(wrapped, 100 + seed)
        wrapped.save_pretrained(folder)
    return folder


def merged_by_peft(kind: Kind, adapter: Path, out: Path | None = None) -> dict[str, Tensor]:
    """The state of the model with the adapter merged into it, which may be saved too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(make_model(kind), str(adapter)).merge_and_unload()
        if out is not None:
            model.save_pretrained(out)
    return dict(model.state_dict())


def agree(one: Mapping[str, Tensor], other: Mapping[str, Tensor], atol: float = 1e-5) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=atol, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
