"""Make a small merging problem: a BERT trained here, three experts fine-tuned from it, their data and recipes.

    python examples/quickstart/make.py FOLDER [--seed 0]

The tasks are over generated English sentences: how somebody felt (sentiment), what it was about (topic), and whether
it is a statement, a question or a request (form). Every sentence has all three properties, so that the experts
compete for the same words. Takes under a minute on two cores; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

PEOPLE = [
    "anna",
    "the teacher",
    "my neighbour",
    "their captain",
    "our guide",
    "the driver",
    "a visitor",
    "the chef",
    "his sister",
]
FEEL = {
    "positive": ["loved", "enjoyed", "praised", "admired", "liked", "recommended", "treasured", "applauded"],
    "negative": ["hated", "disliked", "criticised", "regretted", "avoided", "resented", "dreaded", "rejected"],
}
ABOUT = {
    "food": ["soup", "bread", "dessert", "breakfast", "salad", "sauce", "cheese", "pastry"],
    "travel": ["train", "hotel", "beach", "flight", "museum", "ferry", "hostel", "border"],
    "sport": ["match", "goal", "coach", "marathon", "stadium", "referee", "trophy", "serve"],
    "science": ["theory", "experiment", "telescope", "enzyme", "paper", "lecture", "orbit", "fossil"],
}
FORM = {
    "statement": [
        "{who} {feel} the {thing} {when}",
        "{when} {who} {feel} the {thing}",
        "it is said that {who} {feel} the {thing}",
    ],
    "question": [
        "is it true that {who} {feel} the {thing}",
        "do you know if {who} {feel} the {thing}",
        "why is it that {who} {feel} the {thing} {when}",
    ],
    "request": [
        "tell them that {who} {feel} the {thing}",
        "please write that {who} {feel} the {thing} {when}",
        "remember that {who} {feel} the {thing}",
    ],
}
WHEN = ["yesterday", "last week", "on monday", "this morning", "in the end", "at first"]
NOT = ["never", "hardly"]
TASKS = {"sentiment": list(FEEL), "topic": list(ABOUT), "form": list(FORM)}
LENGTH = 24


def sentence(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A sentence and its three labels. One in four feelings is negated, which turns the sentiment round."""
    feel, about, form = (rng.choice(TASKS[task]) for task in ("sentiment", "topic", "form"))
    verb = rng.choice(FEEL[feel])
    negated = rng.random() < 0.25
    text = rng.choice(FORM[form]).format(
        who=rng.choice(PEOPLE),
        feel=f"{rng.choice(NOT)} {verb}" if negated else verb,
        thing=rng.choice(ABOUT[about]),
        when=rng.choice(WHEN),
    )
    sentiment = feel if not negated else next(name for name in FEEL if name != feel)
    return text, {"sentiment": sentiment, "topic": about, "form": form}


def tokenizer(folder: Path) -> BertTokenizerFast:
    """A word-level tokenizer over all words that sentences use."""
    texts = [*PEOPLE, *WHEN, *NOT, *itertools.chain(*FEEL.values(), *ABOUT.values(), *FORM.values())]
    words = sorted({word for text in texts for word in text.split() if not word.startswith("{")})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizerFast(
        vocab={w: i for i, w in enumerate((folder / "vocab.txt").read_text().split("\n"))}, model_max_length=LENGTH
    )


def pretrain(body: BertModel, tokens: BertTokenizerFast, steps: int, rng: random.Random) -> None:
    """Teach a body to tell which words a sentence holds: general features, and no task's labels."""
    reader = nn.Linear(body.config.hidden_size, len(tokens))
    optimiser = torch.optim.AdamW([*body.parameters(), *reader.parameters()], lr=2e-3)
    for _ in range(steps):
        inputs = tokens([sentence(rng)[0] for _ in range(32)], padding=True, return_tensors="pt")
        held = torch.zeros(32, len(tokens)).scatter_(1, inputs["input_ids"], 1.0)
        loss = nn.functional.binary_cross_entropy_with_logits(reader(body(**inputs).last_hidden_state[:, 0]), held)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def fit(model: nn.Module, tokens: BertTokenizerFast, task: str, steps: int, rng: random.Random) -> None:
    """Fine-tune a classifier on fresh sentences; its word embeddings stay the base's."""
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for _ in range(steps):
        rows = [sentence(rng) for _ in range(32)]
        labels = torch.tensor([TASKS[task].index(row[1][task]) for row in rows])
        optimiser.zero_grad()
        model(**tokens([row[0] for row in rows], padding=True, return_tensors="pt"), labels=labels).loss.backward()
        optimiser.step()
        schedule.step()


def classifier(body: BertModel, task: str) -> BertForSequenceClassification:
    """A classifier of a task over a copy of a body's configuration and weights."""
    labels = dict(enumerate(TASKS[task]))
    config = BertConfig(
        **{
            **body.config.to_dict(),
            "num_labels": len(labels),
            "id2label": labels,
            "label2id": {v: k for k, v in labels.items()},
        }
    )
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(body.state_dict())
    return model


def make(folder: Path, seed: int) -> None:
    """Base, experts, data and recipes in `folder`."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the networks are too small to share between cores
    tokens = tokenizer(folder / "models" / "base")
    config = BertConfig(vocab_size=len(tokens), hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192,
                        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    body = BertModel(config)
    pretrain(body, tokens, 400, rng)
    _save(body, tokens, folder / "models" / "base")
    for task in TASKS:
        expert = classifier(body, task)
        fit(expert, tokens, task, 150, rng)
        _save(expert, tokens, folder / "models" / task)
        _data(folder / "data" / f"{task}.tsv", task, rng)
        print(f"expert '{task}' is trained", flush=True)
    _recipes(folder)


def _save(model: nn.Module, tokens: BertTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def _data(path: Path, task: str, rng: random.Random) -> None:
    """Sentences that no model was trained on together with their labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = dict(sentence(rng) for _ in range(1200))
    path.write_text("label\ttext\n" + "".join(f"{labels[task]}\t{text}\n" for text, labels in rows.items()))


def _recipes(folder: Path) -> None:
    models = "".join(f"  - model: models/{task}\n    task: {{name: {task}, data: data/{task}.tsv}}\n" for task in TASKS)
    common = f"base_model: models/base\nmodels:\n{models}"
    methods = {
        "average": "merge_method: average\n",
        "task_arithmetic": "merge_method: task_arithmetic\nparameters: {lambda: 0.3}\n",
        "cart": "merge_method: cart\nparameters: {rank: 0.08, lambda: 1.0}\n",
        "adarank": "merge_method: adarank\nparameters: {origin: average, rank: 0.16, lambda: 1.0}\nadapt: {objective: self-label, steps: 100, batch_size: 16, lr_masks: 5.0e-3, lr_lambda: 5.0e-3}\n",
    }
    for name, lines in methods.items():
        (folder / f"{name}.yaml").write_text(lines + common)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    make(given.folder, given.seed)
