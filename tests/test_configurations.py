"""Settings that decide what tensors compute must agree, training's and bookkeeping's need not, others are told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adarank
import clip_zoo
import image_zoo
import text_zoo
from adarank.cli.main import main
from adarank.errors import CheckpointError, MismatchError
from adarank.models.configurations import compare_configurations, compare_processors
from make import family, save

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64}  # fmt: skip
TOKENS = torch.arange(12)[None] % 7


def compared(base: dict[str, Any], expert: dict[str, Any], output_head: bool = True) -> tuple[list[str], list[str]]:
    return compare_configurations({"the base": base, "expert 'a'": expert}, output_head)


def output(config: dict[str, Any]) -> torch.Tensor:
    """What a network of fixed weights computes under a configuration."""
    if "rope_parameters" in config and not hasattr(transformers.LlamaConfig(), "rope_parameters"):
        pytest.skip("this version does not know the setting")
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn(tensor.shape))  # the same numbers in every network of one shape
        return net(TOKENS).logits


@pytest.mark.parametrize(("key", "value"), [
    ("rope_theta", 500.0), ("rms_norm_eps", 0.5), ("hidden_act", "gelu"), ("rope_scaling", {"rope_type": "linear", "factor": 4.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
])  # fmt: skip
def test_a_setting_that_changes_the_output_is_an_error(key: str, value: Any) -> None:
    other = {**LLAMA, key: value}
    assert not torch.allclose(output(LLAMA), output(other), atol=1e-4)
    problems, _ = compared(LLAMA, other)
    assert problems
    assert "in expert 'a'" in problems[0]
    assert "in the base" in problems[0]


@pytest.mark.parametrize("changes", [
    {"attention_dropout": 0.3}, {"initializer_range": 0.5}, {"use_cache": False}, {"torch_dtype": "float16"}, {"bos_token_id": 5, "eos_token_id": 6},
    {"transformers_version": "4.0.0", "_name_or_path": "x/y", "architectures": ["LlamaForCausalLM"]}, {"pad_token_id": 0},
    {"rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "swish", "attention_bias": False}, {"head_dim": 4},
    {"pretraining_tp": 2, "temperature": 0.3, "top_p": 0.5}, {"num_labels": 5, "problem_type": "single_label_classification"},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
])  # fmt: skip
def test_what_changes_no_output_is_neither_error_nor_note(changes: dict[str, Any]) -> None:
    """Defaults written out among them, as one version does and another does not."""
    torch.testing.assert_close(output({**LLAMA, **changes}), output(LLAMA))
    assert compared(LLAMA, {**LLAMA, **changes}) == ([], [])
    assert compared({**LLAMA, **changes}, LLAMA) == ([], [])


def test_heads_of_one_shape_in_other_numbers_are_an_error() -> None:
    problems, _ = compared(LLAMA, {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    assert any("num_attention_heads is 4 in the base, 2 in expert 'a'" in text for text in problems)


@pytest.mark.parametrize(("model_type", "key", "values"), [
    ("bert", "hidden_act", ("gelu", "relu")), ("bert", "is_decoder", (False, True)), ("gpt2", "scale_attn_by_inverse_layer_idx", (False, True)),
    ("mistral", "sliding_window", (4096, None)), ("roberta", "pad_token_id", (1, 0)), ("vit", "image_size", (224, 384)), ("swin", "window_size", (7, 8)),
    ("vit", "layer_norm_eps", (1e-12, 1e-5)), ("gemma2", "query_pre_attn_scalar", (256, 224)), ("granite", "residual_multiplier", (1.0, 0.22)),
    ("t5", "feed_forward_proj", ("relu", "gated-gelu")), ("of-the-future", "rope_theta", (1e4, 1e6)), ("", "num_attention_heads", (4, 8)),
])  # fmt: skip
def test_the_table_knows_every_architectures_words(model_type: str, key: str, values: tuple[Any, Any]) -> None:
    base = {"model_type": model_type} if model_type else {}
    problems, _ = compared({**base, key: values[0]}, {**base, key: values[1]})
    assert any(text.startswith(key) for text in problems), problems


def test_tied_embeddings_matter_where_an_output_embedding_merges() -> None:
    tied, free = {**LLAMA, "tie_word_embeddings": True}, {**LLAMA, "tie_word_embeddings": False}
    assert "tie_word_embeddings is true in the base, false in expert 'a'" in compared(tied, free)[0][0]
    assert compared(tied, free, output_head=False) == ([], [])


def test_other_settings_are_told_of() -> None:
    assert compared(LLAMA, {**LLAMA, "max_position_embeddings": 128, "own_setting": 3}) == (
        [],
        ["config.json: max_position_embeddings is 64 in the base, 128 in expert 'a'; own_setting is not given in the base, 3 in expert 'a'."],
    )  # fmt: skip
    problems, notes = compared({"model_type": "of-the-future"}, {"model_type": "of-the-future", "rope_theta": 5e5})
    assert not problems
    assert "rope_theta is not given in the base, 500000.0 in expert 'a'" in notes[0]


def test_activations_of_two_names_and_one_function_are_equal() -> None:
    gpt = {"model_type": "gpt2", "activation_function": "gelu_new"}
    assert compared(gpt, {**gpt, "activation_function": "gelu_pytorch_tanh"}) == ([], [])
    assert compared(gpt, {**gpt, "activation_function": "gelu"})[0]


@pytest.mark.parametrize("broken", [{"num_attention_heads": "x"}, {"hidden_size": 3}, {"id2label": 3}, {"hidden_act": 3}, {"rope_scaling": {"type": "?"}}])  # fmt: skip
def test_a_refused_configuration_is_compared_as_it_is(broken: dict[str, Any]) -> None:
    problems, _ = compared({**LLAMA, **broken}, {**LLAMA, **broken, "rope_theta": 5.0, "rms_norm_eps": None})
    assert not any("rms_norm_eps" in text and "null" not in text for text in problems)
    problems, _ = compared({**LLAMA, **broken, "rope_theta": 6.0}, {**LLAMA, **broken, "rope_theta": 5.0})
    assert any("rope_theta" in text for text in problems)


def test_a_tower_is_compared_with_that_of_a_whole_model(tmp_path: Path) -> None:
    folder = clip_zoo.make_zoo(tmp_path)
    adarank.open_job(adarank.load_recipe(clip_zoo.recipe(folder)))
    file = folder / "models" / "digits" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_norm_eps": 0.1}))
    with pytest.raises(MismatchError, match=r"layer_norm_eps is 1e-05 in the base, 0\.1 in expert 'digits'"):
        adarank.open_job(adarank.load_recipe(clip_zoo.recipe(folder)))


# Recipes


def changed(folder: Path, name: str, **values: Any) -> None:
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


@pytest.mark.parametrize("command", ["plan", "merge", "evaluate"])
def test_a_merge_of_other_functions_is_refused(tmp_path: Path, command: str, capsys: Any) -> None:
    folder = text_zoo.make_zoo(tmp_path / "zoo")
    changed(folder / "models" / "mood", "config.json", hidden_act="relu", num_attention_heads=4)
    out = [str(tmp_path / "out")] if command == "merge" else []
    assert main([command, str(text_zoo.recipe(folder)), *out]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert 'hidden_act is "gelu" in the base, "relu" in expert \'mood\'' in text
    assert "num_attention_heads is 2 in the base, 4 in expert 'mood'" in text
    assert not (tmp_path / "out").exists()


def test_notes_are_shown_and_recorded(tmp_path: Path, capsys: Any) -> None:
    base, experts = family(2)
    save(tmp_path / "base", base, LLAMA)
    for name, state in experts.items():
        save(tmp_path / name, state, {**LLAMA, "max_position_embeddings": 128})
    path = text_zoo.recipe(tmp_path, base_model="base", merge_method="average", models=[{"model": name} for name in experts])  # fmt: skip
    assert main(["plan", str(path)]) == 0
    assert "max_position_embeddings is 64 in the base, 128 in expert 'task0'" in " ".join(capsys.readouterr().out.split())  # fmt: skip
    record = adarank.merge_recipe(path, tmp_path / "out")
    assert any("max_position_embeddings" in note for note in record["plan"]["notes"])


def test_images_prepared_differently_are_told_of(tmp_path: Path) -> None:
    folder = image_zoo.make_zoo(tmp_path)
    assert adarank.open_job(adarank.load_recipe(image_zoo.recipe(folder))).notes == ()
    changed(folder / "models" / "shapes", "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5], size={"height": 8, "width": 8})  # fmt: skip
    (note,) = adarank.open_job(adarank.load_recipe(image_zoo.recipe(folder))).notes
    assert "image_mean is [0.3, 0.4, 0.6] in expert 'digits', [0.5, 0.5, 0.5] in expert 'shapes'" in note
    assert "size is" in note


def test_a_size_in_one_number_is_that_of_height_and_width(tmp_path: Path) -> None:
    for name, size in (("a", 224), ("b", {"height": 224, "width": 224}), ("c", {"shortest_edge": 224}), ("d", {"height": 224, "width": 96})):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    assert compare_processors({name: tmp_path / name for name in "abc"}) == []
    assert compare_processors({name: tmp_path / name for name in "ad"})
    (tmp_path / "a" / "preprocessor_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: not readable JSON"):
        compare_processors({name: tmp_path / name for name in "ab"})


def test_modules_of_another_function_are_refused_from_python_too() -> None:
    config = transformers.AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=12)
    base, same, other = (transformers.GPT2Model(config) for _ in range(3))
    other.config = transformers.AutoConfig.for_model(**{**config.to_dict(), "n_head": 4, "attn_pdrop": 0.3})
    assert adarank.merge(base, {"a": same}, "average")
    for merge in (adarank.merge, adarank.merge_each):
        with pytest.raises(MismatchError, match=r"n_head is 2 in the base, 4 in expert 'b'"):
            merge(base, {"a": same, "b": other}, "average" if merge is adarank.merge else "emr")


def test_problems_of_settings_and_of_tokens_come_at_once(tmp_path: Path) -> None:
    folder = text_zoo.make_zoo(tmp_path)
    changed(folder / "models" / "mood", "config.json", layer_norm_eps=0.1)
    file = folder / "models" / "colour" / "tokenizer.json"
    file.write_text(file.read_text().replace('"good"', '"wine"'))
    with pytest.raises(MismatchError, match=r"(?s)layer_norm_eps is .* in expert 'mood'.*'good' in the base, 'wine' in expert 'colour'"):  # fmt: skip
        adarank.open_job(adarank.load_recipe(text_zoo.recipe(folder)))
