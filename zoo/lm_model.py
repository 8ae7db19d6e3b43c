"""The vocabulary and the language models of lm-4: made, trained, measured."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_text import Document
from stages import seed_for

Log = Callable[[str], None]
BEGIN, END, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Size:
    """Every number of a build that sets how long it takes and how large it comes out."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    context: int  # tokens of a training sequence
    batch: int
    base_steps: int
    base_rate: float
    steps: int  # of an expert
    rate: float
    lora_steps: int
    lora_rate: float
    rank: int
    thin: float  # share of the train documents in the base's mixture
    problems: int
    adapt: int  # passages of a domain
    select: int
    test: int


FULL = Size(
    vocabulary=2048, hidden=192, inner=576, layers=4, heads=4, key_heads=2, context=128, batch=8,
    base_steps=1600, base_rate=3e-3, steps=600, rate=1.5e-3, lora_steps=400, lora_rate=4e-3, rank=16,
    thin=0.3, problems=20_000, adapt=400, select=150, test=300,
)  # fmt: skip
TINY = Size(
    vocabulary=384, hidden=32, inner=64, layers=2, heads=2, key_heads=1, context=48, batch=4,
    base_steps=6, base_rate=3e-3, steps=4, rate=1e-3, lora_steps=4, lora_rate=4e-3, rank=4,
    thin=0.3, problems=200, adapt=12, select=8, test=8,
)  # fmt: skip
SIZES = {"full": FULL, "tiny": TINY}


def make_tokenizer(texts: list[str], size: Size) -> PreTrainedTokenizerFast:
    """A byte-level BPE; every digit is a token of its own, none crosses the end of a line, and a text begins with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, model_max_length=2 * size.context,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights, its input and output embeddings tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=size.inner,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
            max_position_embeddings=2 * size.context, tie_word_embeddings=True, rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def token_lines(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The tokens of each line of a document; together they are the document's, as no token crosses the end of a line."""
    lines = document.text.splitlines(keepends=True)
    return [line.ids for line in tokenizer.backend_tokenizer.encode_batch(lines, add_special_tokens=False)]


class Stream:
    """A domain's documents as one row of tokens, and where a sequence may begin: at the start of a line."""

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast, context: int) -> None:
        tokens: list[int] = []
        starts: list[int] = []
        for document in documents:
            for i, line in enumerate(token_lines(document, tokenizer)):
                if i == 0 or not document.answer:
                    starts.append(len(tokens))
                tokens += line
            tokens.append(tokenizer.eos_token_id)
        self.tokens = torch.tensor(tokens)
        last = len(tokens) - (context - 1)
        self.starts = torch.tensor([start for start in starts if start <= last] or [0])
        self.begin = torch.tensor([tokenizer.bos_token_id])
        self.context = context

    def draw(self, generator: torch.Generator) -> Tensor:
        """(context,) tokens from the start of a random line, after `<s>`."""
        start = self.starts[torch.randint(len(self.starts), (), generator=generator)]
        return torch.cat([self.begin, self.tokens[start : start + self.context - 1]])


def train(
    model: nn.Module,
    streams: list[Stream],
    steps: int,
    rate: float,
    size: Size,
    seed: int,
    cut: Path,
    log: Log,
) -> None:
    """Train a model's trainable parameters on equal shares of the streams; goes on from `cut`, which it removes at the end."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    done = 0
    if cut.is_file():
        saved = torch.load(cut)
        done = saved["done"]
        generator.set_state(saved["generator"])
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
        log(f"goes on at step {done}")
    model.train()
    for step in range(done, steps):
        warm_up = min(1.0, (step + 1) / (0.05 * steps + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        tokens = torch.stack([streams[i % len(streams)].draw(generator) for i in range(size.batch)])
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(f"step {step + 1}/{steps} loss {loss.item():.3f}")
            keep_cut(cut, step + 1, generator, optimizer, parameters)
    cut.unlink(missing_ok=True)
    model.eval()


def keep_cut(
    path: Path,
    done: int,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
) -> None:
    """Write where a training stands, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    content = {
        "done": done,
        "generator": generator.get_state(),
        "optimizer": optimizer.state_dict(),
        "parameters": [parameter.detach() for parameter in parameters],
    }
    torch.save(content, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def measure(
    model: nn.Module, documents: list[Document], tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Perplexity and next-token accuracy over the documents' tokens: all of a passage's, a problem's answer's.

    `exact` is the share of problems whose whole answer is the likeliest at every token, as greedy decoding gives it.
    """
    loss = tokens = right = exact = 0.0
    for at in range(0, len(documents), 16):
        group = documents[at : at + 16]
        # an answer is the text's last tokens, as no token crosses the border (a prompt ends with ":", an answer begins with a space)
        ids = [
            tokenizer(d.text, add_special_tokens=True)["input_ids"]
            + ([tokenizer.eos_token_id] if d.answer else [])
            for d in group
        ]
        first = [len(tokenizer(d.prompt)["input_ids"]) if d.answer else 1 for d in group]
        width = max(map(len, ids))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        place = torch.arange(1, width)
        counted = (place >= torch.tensor(first)[:, None]) & (
            place < torch.tensor([len(row) for row in ids])[:, None]
        )
        logits = model(input_ids=padded).logits[:, :-1].float()
        target = padded[:, 1:]
        loss += float((F.cross_entropy(logits.transpose(1, 2), target, reduction="none") * counted).sum())
        hit = (logits.argmax(-1) == target) | ~counted
        right += float((hit & counted).sum())
        tokens += float(counted.sum())
        exact += float(hit.all(1).sum())
    scores = {"perplexity": math.exp(loss / tokens), "accuracy": 100 * right / tokens}
    return {**scores, "exact": 100 * exact / len(documents)} if documents[0].answer else scores


def training_seed(seed: int, *names: str) -> int:
    """The seed of one training; random weights are drawn from it too."""
    made = seed_for(seed, "lm-4", *names)
    torch.manual_seed(made)
    return made
