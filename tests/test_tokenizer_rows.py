"""Rows of tables by token, where models of one merge have other vocabularies. The oracle is arithmetic on dictionaries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import text_zoo
from adarank.errors import AdaRankError, MismatchError, RecipeError
from adarank.recipe.registry import METHODS
from adarank.workflow.merge import merge
from adarank.workflow.plan import plan
from make import save
from token_zoo import BIAS, EMBEDDING, MATRIX, OUTPUT, WORDS, model, tokenizer, weights

Rows = dict[str, Tensor]
TABLES = (EMBEDDING, OUTPUT, BIAS)


@pytest.fixture
def zoo(tmp_path: Path) -> dict[str, dict[str, Rows]]:
    """Name -> table -> token -> row, of models in `tmp_path`."""
    makers: dict[str, dict[str, Any]] = {
        "start": {}, "same": {}, "padded": {"padding": 3}, "grown": {"added": ["x", "y"]},
        "more": {"added": ["y"], "special": ["<s>"]}, "fewer": {"words": WORDS[:3]}, "swapped": {"words": ["<unk>", "c", "b", "a"]},
        "half": {"added": ["y"], "dtype": torch.bfloat16},
    }  # fmt: skip
    return {name: model(tmp_path / name, tables=TABLES, **keys) for name, keys in makers.items()}


def recipe(folder: Path, experts: Sequence[str], method: str = "task_arithmetic", base: str | None = "start", **keys: Any) -> dict[str, Any]:  # fmt: skip
    weighted = "weight" in METHODS[method].per_model
    models = [{"model": str(folder / name), **({"parameters": {"weight": 0.3 + 0.2 * i}} if weighted else {})} for i, name in enumerate(experts)]  # fmt: skip
    keys = json.loads(json.dumps(keys).replace("FOLDER", str(folder)))
    return {"merge_method": method, "models": models, **({"base_model": str(folder / base)} if base else {}), "dtype": "float32", "device": "cpu", **keys}  # fmt: skip


def completed(rows: Mapping[str, Rows], base: str | None, tokens: Sequence[str], given: Mapping[str, Tensor], force: bool = False) -> dict[str, Rows]:  # fmt: skip
    """Every model with a row for each token: its own; else what is given; else the base's; else the mean of all that have it."""
    full: dict[str, Rows] = {}
    for name, table in rows.items():
        full[name] = {}
        for token in tokens:
            holders = [other[token] for other in rows.values() if token in other]
            if token in table and not (force and token in given):
                full[name][token] = table[token]
            elif token in given:
                full[name][token] = given[token]
            elif base and token in rows[base]:
                full[name][token] = rows[base][token]
            else:
                full[name][token] = sum(holders[1:], holders[0]) / len(holders)
    return full


def expected(folder: Path, zoo: Mapping[str, dict[str, Rows]], names: Sequence[str], tokens: Sequence[str], merged_by: dict[str, Any],
             base: str | None = "start", size: int = 0, given: Mapping[str, Mapping[str, Tensor]] | None = None, force: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """What merging models gives whose tables were completed beforehand, in a folder beside."""
    tables = {t: completed({n: zoo[n][t] for n in names}, base, tokens, (given or {}).get(t, {}), force) for t in TABLES}  # fmt: skip
    for name in names:
        state = {MATRIX: weights(folder / name)[MATRIX].float()}
        for table in TABLES:
            rows = torch.stack(list(tables[table][name].values()))
            padding = rows.mean(0, keepdim=True).expand(max(size - len(rows), 0), *rows.shape[1:])
            state[table] = torch.cat([rows, padding])
        save(folder / "completed" / name, state)
    text = json.dumps({k: v for k, v in merged_by.items() if k != "tokenizer"})
    merge(json.loads(text.replace(f'"{folder}/', f'"{folder}/completed/')), folder / "wanted", force=True)
    return weights(folder / "wanted")


def equal(merged: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return merged.keys() == wanted.keys() and all(torch.allclose(merged[n], wanted[n], rtol=1e-6, atol=1e-7) for n in wanted)  # fmt: skip


UNIONS: list[tuple[list[str], list[str]]] = [
    (["grown"], [*WORDS, "x", "y"]), (["same", "grown", "more"], [*WORDS, "x", "y", "<s>"]), (["more", "grown"], [*WORDS, "y", "<s>", "x"]),
    (["fewer", "same"], WORDS), (["swapped", "grown"], [*WORDS, "x", "y"]), (["padded", "half"], [*WORDS, "y"]), (["padded"], WORDS),
]  # fmt: skip


@pytest.mark.parametrize(("experts", "tokens"), UNIONS)
@pytest.mark.parametrize("multiple", [None, 8])
def test_a_union_completes_each_model_then_merges(experts: list[str], tokens: list[str], multiple: int | None, zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:  # fmt: skip
    given = recipe(tmp_path, experts, "ties", tokenizer={"source": "union", "pad_to_multiple_of": multiple}, parameters={"density": 0.6})  # fmt: skip
    merge(given, tmp_path / "out")
    size = 8 if multiple else len(tokens)
    wanted = expected(tmp_path, zoo, ["start", *experts], tokens, given, size=size)
    assert equal(weights(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == {t: i for i, t in enumerate(tokens)}


DATA_FREE = sorted(
    name
    for name, kind in METHODS.built_in.items()
    if not kind.data and not kind.in_use and "masks" not in kind.model_fields  # masks are of models that were adapted
    if name != "passthrough"  # of one model, without a base: there are no other rows
)
OF_ONE: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {},
}


@pytest.mark.parametrize("method", DATA_FREE)
def test_every_method_without_data_merges_rows_by_token(
    method: str, zoo: dict[str, dict[str, Rows]], tmp_path: Path
) -> None:
    experts = ["grown"] if method in OF_ONE else ["grown", "more"]
    base = "start" if METHODS[method].needs_base() or method in OF_ONE else None
    given = recipe(tmp_path, experts, method, base, tokenizer={"source": "union"}, parameters=OF_ONE.get(method, {}))
    if method == "slerp":
        given["models"] = [{"model": str(tmp_path / "start")}, *given["models"]]
    merge(given, tmp_path / "out")
    tokens = [*WORDS, "x", "y", *(["<s>"] if "more" in experts else [])]
    wanted = expected(tmp_path, zoo, [*([base] if base else []), *experts], tokens, given, base)
    assert equal(weights(tmp_path / "out"), wanted)


SOURCES: list[tuple[str, list[str]]] = [
    ("base", WORDS), ("FOLDER/grown", [*WORDS, "x", "y"]), ("FOLDER/fewer", WORDS[:3]), ("FOLDER/swapped", ["<unk>", "c", "b", "a"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "tokens"), SOURCES)
def test_a_source_gives_tokens_and_order(source: str, tokens: list[str], zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:  # fmt: skip
    experts = ["fewer", "swapped", "grown"]
    given = recipe(tmp_path, experts, tokenizer={"source": source})
    merge(given, tmp_path / "out")
    assert equal(weights(tmp_path / "out"), expected(tmp_path, zoo, ["start", *experts], tokens, given))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == {t: i for i, t in enumerate(tokens)}


def test_without_a_base_lacking_rows_are_the_holders_mean(zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:
    given = recipe(tmp_path, ["fewer", "same", "start"], "linear", None, tokenizer={"source": "union"})
    merge(given, tmp_path / "out")
    assert equal(weights(tmp_path / "out"), expected(tmp_path, zoo, ["fewer", "same", "start"], WORDS, given, None))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("token", "source", "row"), [
    ("y", "FOLDER/more", ("more", "y")), ("a", "FOLDER/grown", ("grown", "a")), ("y", {"kind": "zero"}, None),
    ("new", {"kind": "model_token", "model": "FOLDER/start", "token": "b"}, ("start", "b")),
    ("new", {"kind": "model_token", "model": "FOLDER/grown", "token_id": 4}, ("grown", "x")), ("new", {"kind": "zero"}, None),
])  # fmt: skip
def test_a_tokens_source_fills_or_with_force_replaces(token: str, source: Any, row: tuple[str, str] | None, force: bool, zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:  # fmt: skip
    given = recipe(tmp_path, ["grown", "more"], tokenizer={"tokens": {token: {"source": source, "force": force}}})
    merge(given, tmp_path / "out")
    tokens = [*WORDS, "x", "y", "<s>", *(["new"] if token == "new" else [])]
    of = {t: {token: zoo[row[0]][t][row[1]] if row else torch.zeros_like(zoo["start"][t]["a"])} for t in TABLES}
    wanted = expected(tmp_path, zoo, ["start", "grown", "more"], tokens, given, given=of, force=force)
    assert equal(weights(tmp_path / "out"), wanted)
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()) == set(tokens)


def test_added_tokens_keep_their_settings_and_ids(zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:
    merge(recipe(tmp_path, ["grown", "more"], tokenizer={}), tmp_path / "out")
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert out("a<s>y")["input_ids"] == [1, out.get_vocab()["<s>"], out.get_vocab()["y"]]
    assert {i: t.special for i, t in out.added_tokens_decoder.items() if i > 3} == {4: False, 5: False, 6: True}
    assert str(tmp_path) not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_a_union_of_byte_pairs_reads_text_as_before(tmp_path: Path) -> None:
    """Older folders have vocab.json and merges.txt alone: text without new tokens gets the ids that it had."""
    pieces = {"<|endoftext|>": 0, **{chr(97 + i): i + 1 for i in range(5)}, "ab": 6, "Ġ": 7, "Ġa": 8}
    for name, more in (("start", {}), ("grown", {"cd": 9})):
        vocabulary = {**pieces, **more}
        save(tmp_path / name, {EMBEDDING: torch.randn(len(vocabulary), 3)}, {"vocab_size": len(vocabulary), "model_type": "gpt2"})  # fmt: skip
        (tmp_path / name / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n" + ("c d\n" if more else ""))
        (tmp_path / name / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    before = AutoTokenizer.from_pretrained(tmp_path / "start")
    merge(recipe(tmp_path, ["grown"], tokenizer={}, parameters={"weight": 1.0}), tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("ab a", "abc eda", "ba ab"):
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after("ecd")["input_ids"] == [5, 9]
    assert torch.equal(weights(tmp_path / "out")[EMBEDDING][9], weights(tmp_path / "grown")[EMBEDDING][9])
    assert not (tmp_path / "out" / "merges.txt").exists()  # it would not have the new token


def test_tied_tables_stay_tied(tmp_path: Path) -> None:
    rows = {n: model(tmp_path / n, added=added, tables=(EMBEDDING,), tie_word_embeddings=True) for n, added in (("start", ()), ("grown", ("x",)))}  # fmt: skip
    merge(recipe(tmp_path, ["grown"], tokenizer={}), tmp_path / "out")
    merged = weights(tmp_path / "out")
    assert merged.keys() == {EMBEDDING, MATRIX}
    assert torch.equal(merged[EMBEDDING][4], rows["grown"][EMBEDDING]["x"])


def test_a_head_stored_beside_its_tied_table_is_dropped(tmp_path: Path) -> None:
    """The base stores one table, an expert of fewer tokens two equal ones: what it lacks comes from the base's one."""
    model(tmp_path / "start", tables=(EMBEDDING,), tie_word_embeddings=True)
    model(tmp_path / "fewer", WORDS[:3], tie_word_embeddings=True)
    state = weights(tmp_path / "fewer")
    save(
        tmp_path / "fewer", {**state, OUTPUT: state[EMBEDDING].clone()}, {"vocab_size": 3, "tie_word_embeddings": True}
    )
    merge(recipe(tmp_path, ["fewer"], tokenizer={}, parameters={"weight": 1.0}), tmp_path / "out")
    assert weights(tmp_path / "out").keys() == {EMBEDDING, MATRIX}


def test_a_position_table_of_as_many_rows_is_no_vocabulary(tmp_path: Path) -> None:
    for name, added in (("start", ()), ("grown", ("x",))):
        model(tmp_path / name, added=added, tables=(EMBEDDING,))
        state = weights(tmp_path / name)
        save(tmp_path / name, {**state, "model.position_embeddings.weight": torch.ones(4, 3)}, {"vocab_size": len(state[EMBEDDING]), "max_position_embeddings": 4})  # fmt: skip
    merge(recipe(tmp_path, ["grown"], tokenizer={}), tmp_path / "out")
    assert weights(tmp_path / "out")["model.position_embeddings.weight"].shape == (4, 3)


def test_ids_in_configurations_follow_the_tokens(tmp_path: Path) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    model(tmp_path / "start", **ids)
    model(tmp_path / "other", ["<unk>", "c", "b", "d"], bos_token_id=3)
    (tmp_path / "start" / "generation_config.json").write_text(
        json.dumps({**ids, "suppress_tokens": [3, 1], "top_k": 3})
    )
    merge(recipe(tmp_path, ["other"], tokenizer={"source": "FOLDER/other"}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in ids] == [3, [2, 1], 0]  # a is left out, and `other` has bos_token_id 3
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert [generation[key] for key in (*ids, "suppress_tokens", "top_k")] == [None, [2, 1], 0, [1], 3]


def test_a_merged_language_model_loads_and_runs(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}  # fmt: skip
    nets = {}
    for seed, (name, added) in enumerate((("start", ()), ("grown", ("x", "y")))):
        torch.manual_seed(seed)
        nets[name] = LlamaForCausalLM(LlamaConfig(vocab_size=4 + len(added), tie_word_embeddings=False, **sizes)).eval()
        nets[name].save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name, WORDS, added)
    merge(recipe(tmp_path, ["grown"], "linear", None, tokenizer={}), tmp_path / "out")
    out, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("a b x y", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[1, 2, 4, 5]]
    with torch.no_grad():
        assert torch.allclose(out.eval()(ids).logits, nets["grown"](ids).logits, atol=1e-5)


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["grown"], {"tokens": {"new": {"source": "FOLDER/grown"}}}, "'new' is to be 'new' of .*grown, which has no such token"),
    (["grown"], {"tokens": {"y": {"source": "FOLDER/more"}}}, "'y', '.*more' is none of the recipe's models"),
    (["grown"], {"tokens": {"y": {"source": {"kind": "model_token", "model": "FOLDER/grown", "token_id": 9}}}}, "row 9 of .*whose tables have 6"),
    (["grown"], {"tokens": {"y": {"source": {"kind": "model_token", "model": "FOLDER/grown"}}}}, "one of token and token_id"),
    (["grown"], {"tokens": {"y": {"source": {"kind": "mean"}}}}, "kind is one of model_token and zero"),
    (["grown"], {"tokens": {"y": {"force": True}}}, "source: Field required"), (["grown"], {"pad_to_multiple_of": -1}, "pad_to_multiple_of"),
    (["grown", "plain"], {}, "no tokenizer is beside the weights of\n  expert 'plain'"),
    (["beyond"], {"source": "FOLDER/beyond"}, "1 token\\(s\\) of the output have a row in no model: 'z'"),
]  # fmt: skip


@pytest.mark.parametrize(("experts", "settings", "text"), REFUSED)
def test_rows_that_would_be_guessed_are_refused(experts: list[str], settings: dict[str, Any], text: str, zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:  # fmt: skip
    model(tmp_path / "plain", tables=TABLES, padding=1)
    for file in (tmp_path / "plain").glob("tokenizer*"):
        file.unlink()
    model(tmp_path / "beyond", ["<unk>", "a", "c", "b"], tables=TABLES)
    tokenizer(tmp_path / "beyond", ["<unk>", "a", "c", "b"], ["z"])
    with pytest.raises(AdaRankError, match=text):
        merge(recipe(tmp_path, experts, tokenizer=settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_wrong_tokens_are_named_at_once(zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:
    wrong = {"one": {"source": "FOLDER/grown"}, "two": {"source": "elsewhere"}}
    with pytest.raises(RecipeError, match=r"(?s)'one'.*'two'"):
        merge(recipe(tmp_path, ["grown"], tokenizer={"tokens": wrong}), tmp_path / "out")


def test_a_table_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    for name, added in (("start", ()), ("grown", ("x",))):
        model(tmp_path / name, added=added, tables=(EMBEDDING,))
        state = weights(tmp_path / name)
        save(tmp_path / name, {**state, "model.embed_tokens_per_layer.weight": torch.ones(2, 6)}, {"vocab_size": len(state[EMBEDDING])})  # fmt: skip
    with pytest.raises(
        MismatchError, match=r"'model\.embed_tokens_per_layer\.weight' has 2 rows, where the vocabulary"
    ):
        merge(recipe(tmp_path, ["grown"], tokenizer={}), tmp_path / "out")


def test_networks_for_each_task_keep_their_vocabularies(zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"(?s)expert 'grown' has 2 token.*'emr' writes a network for each task"):
        merge(recipe(tmp_path, ["same", "grown"], "emr", tokenizer={}), tmp_path / "out")


def test_models_with_tasks_keep_their_vocabularies(tmp_path: Path) -> None:
    path = text_zoo.recipe(
        text_zoo.make_zoo(tmp_path), merge_method="task_arithmetic", tokenizer={"pad_to_multiple_of": 64}
    )
    with pytest.raises(MismatchError, match="inputs are encoded with its expert's tokenizer"):
        plan(path)


def test_the_plan_says_which_tokens_are_new(zoo: dict[str, dict[str, Rows]], tmp_path: Path) -> None:
    described = plan(recipe(tmp_path, ["grown"], tokenizer={"pad_to_multiple_of": 8}))
    assert described["tensors"][EMBEDDING]["shape"] == [8, 3]
    assert "tokenizer: 6 tokens in tables of 8 rows, 2 of them padding; 2 new to the base: 'x'; 'y'." in described["notes"]  # fmt: skip
