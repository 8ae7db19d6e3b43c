"""A generating model's own answers to prompts: at each place the most probable token."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adarank.io.progress import advance
from adarank.models.generation import GeneratingModels
from adarank.models.loading import quiet_transformers
from adarank.models.prompts import Ids, Prompts

AT_ONCE = 16  # prompts that are answered together


def batches_of_rows(prompts: Prompts, rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows whose prompts are answered together: of like length, the longest first. A function of the rows alone."""
    order = sorted(rows, key=lambda row: (-len(prompts.prompts[row]), row))
    return [tuple(order[start : start + AT_ONCE]) for start in range(0, len(order), AT_ONCE)]


def greedy_answers(
    family: GeneratingModels, module: nn.Module, prompts: Prompts, rows: Sequence[int]
) -> Iterator[dict[int, Ids]]:
    """Row -> the tokens of the model's answer to its prompt, batch by batch.

    An answer ends with the model's token for the end of text, at the first of the texts in `prompts.stop`, or after
    `prompts.max_new_tokens`. What ends it is part of it.
    """
    for batch in batches_of_rows(prompts, rows):
        yield answered(family, module, prompts, batch)
        advance(len(batch))


@torch.no_grad()
def answered(family: GeneratingModels, module: nn.Module, prompts: Prompts, rows: Sequence[int]) -> dict[int, Ids]:
    """Row -> the tokens of the model's answer, of rows that are answered together."""
    device = next(module.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in family.to_answer(prompts, rows).items()}
    settings = _settings(module, prompts)
    with quiet_transformers():
        network: Any = module
        out = network.generate(**inputs, generation_config=settings)
    answers = out[:, family.answer_begins(inputs) :].tolist()
    return {row: _ended(answer, settings.eos_token_id, prompts) for row, answer in zip(rows, answers, strict=True)}


def _settings(module: nn.Module, prompts: Prompts) -> Any:
    """The model's own settings of generation, without chance and without several beams."""
    network: Any = module
    settings = copy.deepcopy(network.generation_config)
    tokenizer: Any = prompts.tokenizer
    eos = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
    pad = settings.pad_token_id if settings.pad_token_id is not None else tokenizer.pad_token_id
    greedy: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    settings.update(
        **greedy,
        use_cache=True,
        max_length=None,
        max_new_tokens=prompts.new_tokens,
        eos_token_id=eos,
        pad_token_id=0 if pad is None else pad,
    )
    return settings


def _ended(answer: Sequence[int], eos: int | Sequence[int] | None, prompts: Prompts) -> Ids:
    """An answer up to what ends it; what was generated behind that is padding."""
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    end = next((place for place, token in enumerate(answer, start=1) if token in ends), len(answer))
    ids = tuple(answer[:end])
    if not any(stop in prompts.text_of(ids) for stop in prompts.stop):
        return ids
    return next(ids[:n] for n in range(1, end + 1) if any(stop in prompts.text_of(ids[:n]) for stop in prompts.stop))
