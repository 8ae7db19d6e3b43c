"""Configurations compared by what their settings do to a merge: decide the tensors' function, or nothing, or who knows.

    decides     what a network computes of its tensors: heads, rotary bases, activations, epsilons, scales   -> an error
    ignored     training, generation, bookkeeping, labels, and sizes, which shapes tell                       -> nothing
    any other                                                                                                 -> a note

Settings that one version of `transformers` writes and another leaves out are filled in by its configuration class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adarank.alignment.layers import depth
from adarank.errors import CheckpointError
from adarank.io.hub import configuration_errors
from adarank.io.parsing import parse_json
from adarank.models.loading import quiet_transformers
from adarank.models.text import AFTER_PADDING


def _words(text: str) -> list[str]:
    return text.split()


_DECIDES = frozenset(_words("""
    num_attention_heads n_head n_heads num_heads heads encoder_attention_heads decoder_attention_heads head_dim d_kv
    qk_nope_head_dim qk_rope_head_dim v_head_dim num_key_value_heads num_kv_heads n_head_kv multi_query kv_channels
    attention_types attention_type position_embedding_type relative_attention pos_att_type
    relative_attention_num_buckets relative_attention_max_distance max_relative_positions position_buckets
    share_att_key norm_rel_ebd is_decoder use_bidirectional_attention sliding_window use_sliding_window layer_types
    attention_window window_size local_attention global_attn_every_n_layers sliding_window_pattern attention_layers
    attn_logit_softcapping final_logit_softcapping attention_softmax_in_fp32 query_pre_attn_scalar
    attention_multiplier attention_scale residual_multiplier embedding_multiplier logits_scaling logit_scale
    logits_scale scale_embedding scale_emb scale_depth embedding_scale scale_attn_weights
    scale_attn_by_inverse_layer_idx mup_enabled alibi alibi_bias_max rotary rope_theta rope_scaling rope_parameters
    rope_local_base_freq rotary_pct partial_rotary_factor rotary_dim rotary_emb_base rotary_emb_fraction
    rotary_emb_interleaved rotary_value rope_interleave no_rope_layers no_rope_layer_interval global_rope_theta
    local_rope_theta qk_norm use_qk_norm qk_layernorm hidden_act activation_function hidden_activation activation
    act_fn feed_forward_proj dense_act_fn is_gated_act mlp_activation layer_norm_eps layer_norm_epsilon rms_norm_eps
    norm_eps norm_epsilon batch_norm_eps layernorm_epsilon norm_type normalization_type do_layer_norm_before pre_norm
    post_norm normalize_before use_parallel_residual parallel_attn new_decoder_architecture num_experts_per_tok
    moe_top_k norm_topk_prob routed_scaling_factor scoring_func topk_method n_group topk_group image_size patch_size
    patch_stride num_channels hidden_stride downsample_in_first_stage downsample_in_bottleneck layer_type
    pretrained_window_sizes use_mean_pooling use_absolute_embeddings feature_layer apply_layernorm
    embedding_size_per_patch
"""))  # fmt: skip
_ACTIVATIONS = frozenset(_words("hidden_act activation_function hidden_activation activation act_fn"))
_IGNORED = frozenset(_words("""
    architectures auto_map id2label label2id prompt_templates num_labels problem_type finetuning_task task_specific_params
    transformers_version torch_dtype dtype use_cache torchscript return_dict use_return_dict use_bfloat16
    gradient_checkpointing chunk_size_feed_forward pretraining_tp is_encoder_decoder tie_encoder_decoder
    add_cross_attention cross_attention_hidden_size tokenizer_class prefix model_type bos_token_id eos_token_id
    sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id max_length min_length do_sample
    num_beams num_beam_groups temperature top_k top_p typical_p repetition_penalty length_penalty early_stopping
    diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss router_aux_loss_coef router_jitter_noise router_z_loss_coef aux_loss_alpha
    seq_aux label_smoothing max_new_tokens quantization_config summary_type summary_use_proj summary_activation
    summary_proj_to_labels use_weighted_layer_sum unsloth_version unsloth_fixed generation_config pruned_heads
    attn_implementation reorder_and_upcast_attn mask_token_prob hidden_size n_embd d_model dim d_ff intermediate_size
    n_inner hidden_dim ffn_dim num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers vocab_size
    type_vocab_size projection_dim depths hidden_sizes embed_dim mlp_ratio n_positions n_ctx
"""))  # fmt: skip
_TRAINING = re.compile(r"drop|initializer|(^|_)init(_|$)|(^|_)std$|^output_|^_|loss")
_SAME = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "gelu by tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
}
_DEFAULTS: Mapping[str, Any] = {"position_embedding_type": "absolute"}  # what leaving a setting out means
_UNREAD = ("id2label", "label2id", "num_labels", "quantization_config", "torch_dtype", "dtype", "auto_map")
_ABSENT = "not given"  # a setting's value where a configuration does not have it
_PROCESSOR = ("image_mean", "image_std", "size", "crop_size", "resample", "rescale_factor",
              "do_resize", "do_center_crop", "do_rescale", "do_normalize")  # fmt: skip


def compare_configurations(
    configs: Mapping[str, Mapping[str, Any]], output_head: bool = False
) -> tuple[list[str], list[str]]:
    """Problems and notes, in sentences. Each is compared with the first of its model type, be that a part of a model.

    Arguments:
        configs: what to call a model -> its config.json; empty ones are left out.
        output_head: an output embedding is merged, so that it matters whether it is tied.
    """
    problems: list[str] = []
    notes: list[str] = []
    firsts: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, config in configs.items():
        kind = str(config.get("model_type", ""))
        whose, first = firsts.get(kind, (name, config))
        difference = _Difference(kind, first, config, output_head)
        said = {
            key: f"{key} is {_short(a)} in {whose}, {_short(b)} in {name}" for key, (a, b) in difference.keys.items()
        }
        problems += [text for key, text in said.items() if difference.decides(key)]
        rest = [text for key, text in said.items() if not difference.decides(key) and difference.matters(key)]
        notes += [f"config.json: {few(rest)}."] if rest else []
        for part, inner in _parts(kind, config):
            firsts.setdefault(part, (name, inner))
    return problems, notes


def few(items: Sequence[str], most: int = 3) -> str:
    """The first of a list, and how many more."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


class _Difference:
    """How two configurations of one model type differ, defaults filled in where they are known.

    Attributes:
        keys: setting, with those it is nested in -> its two values.
    """

    def __init__(self, kind: str, first: Mapping[str, Any], other: Mapping[str, Any], output_head: bool) -> None:
        self._kind, self._output_head, self._filled = kind, output_head, False
        self._depths = (depth(first), depth(other))
        self.keys = _differing(first, other)
        if any(value is None or value is _ABSENT for pair in self.keys.values() for value in pair):
            one, two = with_defaults(kind, first), with_defaults(kind, other)
            if one is not None and two is not None:
                self._filled, self.keys = True, _differing(one, two)

    def decides(self, key: str) -> bool:
        """True if the setting decides what tensors compute, and both values are known."""
        last = key.rsplit(".", 1)[-1]
        unknown = _ABSENT in self.keys[key] or (None in self.keys[key] and (not self._filled or last in _ACTIVATIONS))
        if unknown:
            return False
        if last == "pad_token_id":
            return self._kind in AFTER_PADDING  # positions are counted from it
        if last == "tie_word_embeddings":
            return self._output_head
        if self._of_other_depths(key):
            return False
        return any(part in _DECIDES for part in key.split("."))

    def _of_other_depths(self, key: str) -> bool:
        """True of lists with an entry for each layer, of models of different depths: layers are compared one by one."""
        return all(isinstance(value, list) and len(value) == count for value, count in zip(self.keys[key], self._depths, strict=True))  # fmt: skip

    def matters(self, key: str) -> bool:
        """True unless the one value is what leaving the setting out means, as far as that is known."""
        last, values = key.rsplit(".", 1)[-1], self.keys[key]
        if last in ("pad_token_id", "tie_word_embeddings"):
            return False
        given = [value for value in values if value is not _ABSENT]
        return len(given) == 2 or bool(given[0] and given[0] != _DEFAULTS.get(last))


def _parts(kind: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A configuration and those of a model's towers, by model type."""
    if config:
        yield kind, config
    for key in ("vision", "text"):
        inner = config.get(f"{key}_config")
        if isinstance(inner, Mapping):
            yield str(inner.get("model_type") or f"{kind}_{key}_model"), inner


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    one, two = dict(_flat(first)), dict(_flat(other))
    pairs = {key: (one.get(key, _ABSENT), two.get(key, _ABSENT)) for key in {**one, **two}}
    return {key: pair for key, pair in pairs.items() if not _equal(*pair)}


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting that is not ignored; of nested ones with the names that they are nested in."""
    for key, value in config.items():
        if key in _IGNORED or _TRAINING.search(key):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, list(value) if isinstance(value, tuple) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return bool(_SAME.get(one, one) == _SAME.get(other, other))
    return bool(one == other) or (one in (None, _ABSENT) and other in (None, _ABSENT))


def with_defaults(kind: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A configuration as `transformers` reads it; None if it knows no such model type, or refuses the configuration."""
    from transformers import CONFIG_MAPPING  # imported on use: it is slow, and most configurations tell the same keys

    if kind not in CONFIG_MAPPING:
        return None
    try:
        with quiet_transformers():
            made: dict[str, Any] = (
                CONFIG_MAPPING[kind].from_dict({k: v for k, v in config.items() if k not in _UNREAD}).to_dict()
            )
    except configuration_errors():
        return None
    return made


def _short(value: Any) -> str:
    text = _ABSENT if value is _ABSENT else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def compare_processors(folders: Mapping[str, Path]) -> list[str]:
    """Notes on image processors that prepare images differently. Each task keeps its own; an output has the first.

    Raises:
        CheckpointError: a processor's file is damaged.
    """
    settings = {name: content for name, folder in folders.items() if (content := _processor(folder))}
    notes = []
    first = next(iter(settings), "")
    for name, other in settings.items():
        one = settings[first]
        differing = [
            f"{key} is {_short(one[key])} in {first}, {_short(other[key])} in {name}"
            for key in _PROCESSOR
            if key in one and key in other and not _same_size(one[key], other[key])
        ]
        notes += [f"Images are prepared differently: {few(differing)}."] if differing else []
    return notes


def _same_size(one: Any, other: Any) -> bool:
    """Older processors have one number where newer ones name it, as height and width."""
    if isinstance(one, Mapping) == isinstance(other, Mapping):
        return bool(one == other)
    named, number = (one, other) if isinstance(one, Mapping) else (other, one)
    return bool(named) and all(value == number for value in named.values())


def _processor(folder: Path) -> Mapping[str, Any]:
    file = next((f for n in ("preprocessor_config.json", "processor_config.json") if (f := folder / n).is_file()), None)
    if file is None:
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: not readable JSON ({error}). Copy or download it again.") from None
    inner = content.get("image_processor")
    return inner if isinstance(inner, dict) else content
