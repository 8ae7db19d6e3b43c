"""What a recipe says of a task: its data, its columns, its metric, and how rows are split."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from adarank.data.metrics import Metric
from adarank.settings import Settings

Split = Literal["adapt", "select", "test"]
Kind = Literal[
    "text-classification", "image-classification", "zero-shot-image-classification", "text-generation", "text2text-generation",
    "token-classification", "question-answering", "multiple-choice", "sentence-similarity",
]  # fmt: skip
SPLITS: tuple[Split, ...] = ("adapt", "select", "test")


class HubData(Settings):
    """A `datasets` dataset: its id, configuration, split and revision."""

    dataset: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None


class SplitData(Settings):
    """A file per split. A split that is left out is empty."""

    adapt: str | HubData | None = None
    select: str | HubData | None = None
    test: str | HubData | None = None


class Columns(Settings):
    """Column names.

    Attributes:
        text: of token classification lists of words.
        text_pair: makes two-sentence inputs. Of question answering the context, by default column `context`.
        image: of image tasks.
        answer: of generating models: the answer to each prompt, by which models are scored and nothing else. Without it the
            text is running text, which is scored itself.
        choices: of generating models: the options that `answer` is one of, or the number of one, counted from 0. Of multiple
            choice the options, by default column `choices`.
    """

    text: str = "text"
    text_pair: str | None = None
    image: str = "image"
    label: str = "label"
    answer: str | None = None
    choices: str | None = None


class TaskSpec(Settings):
    """One task of a recipe.

    Arguments:
        name: what tables call it.
        kind: the family of models and data; if it is not given, the expert's config.json tells it.
        data: one file or dataset, split by fractions, or one per split.
        columns: where inputs and labels are.
        metric: what the task is scored by. Of one class an input `accuracy` (if not given), `f1`, `macro_f1`, `matthews`;
            of several `micro_f1` (if not given), `macro_f1`, `exact_match`; of numbers `pearson` (if not given), `spearman`;
            of any of these `loss`. Of words `accuracy` (if not given), `entity_f1`, `macro_f1`, `loss`; of answers in a context `f1`
            (if not given), `exact_match`; of options `accuracy`; of similarities `spearman` (if not given), `pearson`. Of generated text `perplexity` (if not given), `loss`, `token_accuracy`, `exact_match`,
            `choice_accuracy`. All are per cent but loss and perplexity, of which less is better.
        max_length: tokens per input at most; longer inputs are cut, and their number is reported.
        limit: use at most this many rows (a seeded choice).
        classes: of zero-shot tasks: the classes' names in the order of the labels, or a text file with one on each line.
        templates: of zero-shot tasks: prompts with {} where a class's name goes, or a file of them; by default one.
        head_file: of zero-shot tasks: a head that was saved by itself (task_vectors' `head_SUN397.pt`), in place of one made of
            class names and prompts.
        answers: of generating models: `generate`: what is adapted on and judged is each expert's own greedy answer to each text,
            which is a prompt. Without it every token of the text counts. Decoders behind an encoder always answer.
        max_new_tokens: of generating models: the most tokens of an answer.
        stop: of generating models: texts that end an answer, beside the model's own end of text.
    """

    name: str | None = None
    kind: Kind | None = None
    data: str | HubData | SplitData | None = None
    columns: Columns = Columns()
    metric: Metric | None = None
    max_length: int = Field(128, ge=2)
    limit: int | None = Field(None, ge=1)
    classes: tuple[str, ...] | str | None = None
    templates: tuple[str, ...] | str | None = None
    head_file: str | None = None
    answers: Literal["generate"] | None = None
    max_new_tokens: int = Field(32, ge=1)
    stop: tuple[str, ...] = ()

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("classes", mode="before")
    @classmethod
    def _digits(cls, given: Any) -> Any:
        """Classes that YAML reads as numbers. What it reads as true and false (`no`) needs quotes and is refused."""
        if not isinstance(given, (list, tuple)):
            return given
        if any(isinstance(label, bool) for label in given):
            raise ValueError(
                "names were needed, and YAML reads yes, no, on and off as truth values: put them in quotes"
            )
        return [str(label) if isinstance(label, int) else label for label in given]


def _share(given: Any) -> Any:
    """A share in (0, 1], also from per cent in words."""
    words = re.fullmatch(r"\s*([0-9.]+)\s*%\s*", given) if isinstance(given, str) else None
    try:
        share = float(words[1]) / 100 if words else given
    except ValueError:  # 1.2.3%
        share = given
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError("a share above 0 and at most 1, or per cent such as 1%, was needed")
    return float(share)


class DataSettings(Settings):
    """How rows become splits.

    Arguments:
        protocol: `disjoint` keeps adapt, select and test apart; `transductive` adapts on the test inputs
            themselves, as the papers do, and every table and record then says so.
        budget: under `transductive` the share of the test inputs that is adapted on, in (0, 1] or as `1%`; all of them are scored.
            None is all.
        adapt, select, test: fractions of a single file; at most 1 in sum.
        split_seed: seeds the split, apart from the seed of adaptation.
    """

    protocol: Literal["disjoint", "transductive"] = "disjoint"
    budget: Annotated[float, BeforeValidator(_share)] | None = None
    adapt: float = Field(0.4, ge=0, le=1)
    select: float = Field(0.2, ge=0, le=1)
    test: float = Field(0.4, ge=0, le=1)
    split_seed: int = 0

    @model_validator(mode="after")
    def _sum(self) -> DataSettings:
        if self.budget is not None and self.protocol != "transductive":
            raise ValueError(
                "budget: is a share of the test inputs, which only protocol: transductive adapts on. "
                "Under disjoint, adapt says how many inputs are adapted on"
            )
        if self.adapt + self.select + self.test > 1 + 1e-9:
            raise ValueError(
                f"the fractions adapt + select + test are {self.adapt + self.select + self.test:g}, more than 1"
            )
        return self
