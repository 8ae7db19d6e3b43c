"""adarank beside mergekit where the models of a merge have other vocabularies: the same recipe file, compared row by row.

    python benchmarks/mergekit_vocabularies.py --venv VENV [--records FILE]

VENV is the environment of `mergekit_compare.py`, and mergekit is called in the same way. The models are small Llamas made
here, with tokenizers: a base; experts that are the base plus seeded noise, with tokens added, left out or numbered otherwise.

mergekit keeps the tokens that it adds in hash tables, so that their order changes from run to run. Rows are therefore
compared by token, each side's by the ids that its own tokenizer gives; `same_order` says whether the ids agreed too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from mergekit_compare import REQUIREMENTS, adarank, mergekit, without_recipes, write_recipes
from peers import environment, head, largest
from records import FOLDER, Records
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adarank.io.checkpoint import Checkpoint

NOISE = 0.02
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
WORDS = ["<unk>", *(f"w{number}" for number in range(199))]
CHAT = ["<|im_start|>", "<|im_end|>"]
VOCABULARIES: dict[str, tuple[list[str], list[str], int]] = {  # words, special tokens added, rows of padding
    "base": (WORDS, [], 0),
    "same": (WORDS, [], 0),
    "padded": (WORDS, [], 24),
    "chat": (WORDS, CHAT, 0),
    "code": (WORDS, ["<|fim|>", "<|im_end|>"], 0),
    "fewer": (WORDS[:150], [], 0),
    "permuted": (["<unk>", *reversed(WORDS[1:])], [], 0),
}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def make_models(folder: Path, tied: bool, seed: int) -> None:
    """Each model in a folder of its name: rows of one token are alike in all of them, up to noise."""
    torch.manual_seed(seed)
    tokens = list(dict.fromkeys(token for words, added, _ in VOCABULARIES.values() for token in (*words, *added)))
    start = {token: 0.02 * torch.randn(2, SHAPE["hidden_size"]) for token in tokens}
    body: dict[str, Tensor] = {}
    for name, (words, added, padding) in VOCABULARIES.items():
        rows = len(words) + len(added) + padding
        net = LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **SHAPE))
        state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        body = body or {key: tensor for key, tensor in state.items() if key not in TABLES}
        state |= body
        for number, table in enumerate(TABLES):
            state[table] = torch.stack([start[token][0 if tied else number] for token in (*words, *added)])
            state[table] = torch.cat([state[table], torch.randn(padding, SHAPE["hidden_size"])])
        scale = 0.0 if name == "base" else NOISE
        noisy = {key: tensor + scale * torch.randn(tensor.shape) for key, tensor in state.items()}
        net.load_state_dict({**noisy, **({TABLES[1]: noisy[TABLES[0]]} if tied else {})})
        net.save_pretrained(folder / name)
        inner = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        outer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        outer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        outer.save_pretrained(folder / name)


def recipe(experts: Sequence[str], tokenizer: Any, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    weights = dict(zip(experts, (0.3, 0.6, 1.0), strict=False)) if method not in ("model_stock", "slerp") else {}
    listed = [
        {"model": f"./{name}", **({"parameters": {"weight": weights[name]}} if weights else {})} for name in experts
    ]
    based = {} if method == "linear" else {"base_model": "./base"}
    key = "tokenizer" if isinstance(tokenizer, dict) else "tokenizer_source"
    return {"merge_method": method, **based, "models": listed, "dtype": "float32", key: tokenizer, **more}


def recipes() -> dict[str, dict[str, Any]]:
    """Recipes in mergekit's dialect over these models."""
    union = {"source": "union"}
    token = {"kind": "model_token", "model": "./chat"}
    ties = {"parameters": {"density": 0.6}}
    return {
        "union, one model with new tokens": recipe(["same", "chat"], union),
        "union, tokenizer_source": recipe(["same", "chat"], "union"),
        "union, two models with new tokens": recipe(["chat", "code"], union),
        "union, other ids": recipe(["permuted", "same"], union),
        "union, fewer tokens": recipe(["fewer", "same"], union),
        "union, all kinds": recipe(["chat", "permuted", "fewer"], union),
        "union, padded tables": recipe(["padded", "chat"], union),
        "union, linear": recipe(["base", "chat", "permuted"], union, "linear"),
        "union, ties": recipe(["chat", "code"], union, "ties", **ties),
        "union, slerp": recipe(["base", "chat"], union, "slerp", parameters={"t": 0.4}),
        "union, model_stock": recipe(["chat", "permuted", "fewer"], union, "model_stock"),
        "base": recipe(["chat", "permuted"], {"source": "base"}),
        "base, tokenizer_source": recipe(["chat", "fewer"], "base"),
        "base, padded tables": recipe(["padded"], "base"),
        "a model's, with new tokens": recipe(["chat", "code"], {"source": "./chat"}),
        "a model's, with other ids": recipe(["chat", "permuted"], {"source": "./permuted"}),
        "a model's, with fewer tokens": recipe(["same", "fewer"], {"source": "./fewer"}),
        "tokens, a source": recipe(["chat", "code"], union | {"tokens": {CHAT[1]: {"source": "./chat"}}}),
        "tokens, a source forced": recipe(["chat", "code"], union | {"tokens": {CHAT[1]: {"source": "./code", "force": True}}}),
        "tokens, another token's row": recipe(["chat", "code"], union | {"tokens": {"<|new|>": {"source": token | {"token": CHAT[0]}}}}),
        "tokens, a row by its number": recipe(["chat", "code"], union | {"tokens": {"w5": {"source": token | {"token_id": 9}, "force": True}}}),
        "tokens, zeros": recipe(["chat", "code"], union | {"tokens": {CHAT[1]: {"source": {"kind": "zero"}}}}),
        "tokens, zeros forced": recipe(["chat", "code"], union | {"tokens": {CHAT[1]: {"source": {"kind": "zero"}, "force": True}}}),
        "chat_template, by name": recipe(["same", "chat"], union, chat_template="chatml"),
        "chat_template, a template": recipe(["same"], {"source": "base"}, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"),
        "pad_to_multiple_of, union": recipe(["chat", "code"], union | {"pad_to_multiple_of": 64}),
        "pad_to_multiple_of, ties": recipe(["chat", "code"], union | {"pad_to_multiple_of": 64}, "ties", **ties),
        "pad_to_multiple_of, base": recipe(["same"], {"source": "base", "pad_to_multiple_of": 64}),
    }  # fmt: skip


def difference(ours: Path, theirs: Path) -> dict[str, Any]:
    """The largest difference of any tensor, rows of tables paired by token; padding after them as it stands."""
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (ours, theirs)]
    ids = [tokenizer.get_vocab() for tokenizer in tokenizers]
    a, b = ({name: merged.read(name) for name in merged.tensors} for merged in (Checkpoint(ours), Checkpoint(theirs)))
    same = set(a) == set(b) and all(a[name].shape == b[name].shape for name in b)
    sizes = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (ours, theirs)]
    if not same or ids[0].keys() != ids[1].keys():
        return {"same_names_and_shapes": same, "same_tokens": ids[0].keys() == ids[1].keys(), "vocab_size": sizes}
    rows = torch.arange(sizes[0])
    for token, row in ids[0].items():
        rows[row] = ids[1][token]
    paired = {name: tensor[rows] if name in TABLES else tensor for name, tensor in b.items()}
    worst, where = largest(a, paired)
    return {"max_relative_difference": worst, "in": where, "rows": int(a[TABLES[0]].shape[0]), "same_names_and_shapes": True,
            "same_tokens": True, "same_vocab_size": sizes[0] == sizes[1], "same_order": ids[0] == ids[1],
            "same_chat_template": tokenizers[0].chat_template == tokenizers[1].chat_template}  # fmt: skip


def compare(folder: Path, wanted: Mapping[str, dict[str, Any]], python: Path) -> list[dict[str, Any]]:
    """Both merges of every recipe file and what came of them."""
    files = write_recipes(folder, wanted)
    errors = mergekit(python, files, ".mergekit", ())
    results = []
    for name, values in wanted.items():
        ours, theirs = files[name].with_suffix(".adarank"), files[name].with_suffix(".mergekit")
        refused = {
            side: e for side, e in {"adarank": adarank(files[name], ours), "mergekit": errors[name]}.items() if e
        }
        shown = {side: error.replace(f"{folder}/", "")[:240] for side, error in refused.items()}
        outcome = {"refused": shown} if refused else difference(ours, theirs)
        print(
            f"  {name:36s} {outcome.get('max_relative_difference', outcome)} {outcome.get('same_order', '')}",
            flush=True,
        )
        results.append({"name": name, "recipe": values, **outcome})
        for made in (ours, theirs):
            shutil.rmtree(made, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="mergekit's environment; made if it is not there")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "peers.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    python = environment(arguments.venv, REQUIREMENTS)
    record = head(
        "mergekit, vocabularies",
        "the same recipe file over models of other vocabularies, merged by adarank and by mergekit's command line",
        "python benchmarks/mergekit_vocabularies.py --venv VENV",
        {"model": SHAPE, "noise": NOISE}, arguments.seed, python, ("mergekit", "torch", "transformers"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        for label, tied in (("untied", False), ("tied", True)):
            print(label, flush=True)
            make_models(Path(temporary) / label, tied, arguments.seed)
            record[label] = compare(Path(temporary) / label, recipes(), python)
    without_recipes(record["tied"], record["untied"])
    Records(arguments.records).write(record)


if __name__ == "__main__":
    sys.exit(main())
