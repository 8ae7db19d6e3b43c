"""The third test bed's script: texts are held out whole, problems are right, and a build that was cut off ends as one that was not."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "zoo"))

import lm_model
import lm_text
from lm_text import Document

WORDS = "the king of verse speaks and no man answers him".split()  # noqa: SIM905 (a list of words)


def text(seed: int, lines: int) -> str:
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + f" {seed}\n" for _ in range(lines))


@pytest.fixture
def domains(tmp_path: Path) -> dict[str, lm_text.Splits]:
    (tmp_path / "plays.txt").write_text("\n".join(text(i, 20) for i in range(40)))
    rows = "".join(f"{i % 4}\t{text(1000 + i, 1)}" for i in range(120))
    (tmp_path / "news.tsv").write_text("label\ttext\n" + rows + rows)  # each article twice
    (tmp_path / "code").mkdir()
    for i in range(30):
        (tmp_path / "code" / f"m{i}.py").write_text(text(2000 + i, 60))
    return lm_text.read_domains(tmp_path / "plays.txt", tmp_path / "news.tsv", tmp_path / "code", 200, 0)


def test_no_document_is_in_two_splits(domains: dict[str, lm_text.Splits]) -> None:
    for name, splits in domains.items():
        prompts = {split: {document.prompt for document in documents} for split, documents in splits.items()}
        assert set(prompts) == {"train", "adapt", "select", "test"}
        assert all(prompts.values()), name
        for split, held in prompts.items():
            assert not held & set().union(*(others for other, others in prompts.items() if other != split)), name


def test_problems_have_right_answers(domains: dict[str, lm_text.Splits]) -> None:
    documents = [document for documents in domains["arithmetic"].values() for document in documents]
    assert len(documents) > 1000
    for document in documents:
        numbers = [int(number) for number in re.findall(r"\d+", document.prompt)]
        last = int(re.findall(r"\d+", document.answer)[-1])
        wanted = {
            "*": lambda a, b: a * b, "+": lambda a, b: a + b, "larger": max, "smaller": min,
            "buys": lambda a, b: a + b, "gives": lambda a, b: a - b,
        }  # fmt: skip
        rule = next(rule for word, rule in wanted.items() if word in document.prompt)
        assert last == rule(*numbers)
        for left, right in re.findall(r"([\d+*\- ]+) = (\d+)", document.answer):
            assert eval(left) == int(right)


def test_tokens_of_lines_are_those_of_the_text(domains: dict[str, lm_text.Splits]) -> None:
    documents = [documents["train"][0] for documents in domains.values()]
    tokenizer = lm_model.make_tokenizer([document.text for document in documents], lm_model.TINY)
    odd = [*documents, Document("  def f(x):\n\n\n\treturn 12 + x  # é\n")]
    for document in odd:
        lines = [token for line in lm_model.token_lines(document, tokenizer) for token in line]
        whole = tokenizer(document.text)["input_ids"]
        assert whole == [tokenizer.bos_token_id, *lines]
        assert tokenizer.decode(lines) == document.text


def test_a_training_that_was_cut_ends_bit_equal(domains: dict[str, lm_text.Splits], tmp_path: Path) -> None:
    documents = domains["arithmetic"]["train"]
    size = replace(lm_model.TINY, base_steps=3)
    tokenizer = lm_model.make_tokenizer([document.text for document in documents], size)
    streams = [lm_model.Stream(documents, tokenizer, size.context)]

    def trained(cut: Path, steps_before: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = lm_model.new_model(size, tokenizer)
        logged: list[str] = []

        def log(line: str) -> None:
            logged.append(line)
            if line.startswith(f"step {steps_before}/"):
                raise KeyboardInterrupt

        try:
            lm_model.train(model, streams, 100, 1e-3, size, 7, cut, log)
        except KeyboardInterrupt:
            return trained_again(cut)
        return model.state_dict()

    def trained_again(cut: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(99)  # weights come from the cut, not from here
        model = lm_model.new_model(size, tokenizer)
        lm_model.train(model, streams, 100, 1e-3, size, 7, cut, lambda line: None)
        return model.state_dict()

    whole, cut = trained(tmp_path / "a.pt", None), trained(tmp_path / "b.pt", 100)
    assert not (tmp_path / "b.pt").exists()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
