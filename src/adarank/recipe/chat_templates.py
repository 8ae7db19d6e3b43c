"""The chat template of a merge: the models' most common one, one of a known format, or the recipe's own text.

The formats are facts of the models that use them; their templates here are written for this project, and keep to what
`transformers` gives every template: `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from adarank.errors import RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import read_json
from adarank.io.side_files import tokenizer_files
from adarank.settings import nearest

FILE, CONFIG, KEY = "chat_template.jinja", "tokenizer_config.json", "chat_template"
AUTO = "auto"


@dataclass(frozen=True)
class _Format:
    """A known format: what it puts before all, around each role's text, and before an answer; and its tokens."""

    text: str
    tokens: tuple[str, ...] = ()


FORMATS: Mapping[str, _Format] = {
    "chatml": _Format(
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": _Format(
        r"{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        r"+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": _Format(
        r"{{ bos_token }}{% set state = namespace(system='') %}{% for message in messages %}"
        r"{% if message['role'] == 'system' %}{% set state.system = message['content'] + '\n\n' %}"
        r"{% elif message['role'] == 'user' %}{{ '[INST] ' + state.system + message['content'] + ' [/INST]' }}"
        r"{% set state.system = '' %}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    ),
    "alpaca": _Format(
        r"{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        r"{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        r"{% else %}{{ '### Response:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
    "exaone": _Format(
        r"{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}"
        r"{{ '[|' + message['role'] + '|]' + message['content'] + ('\n' if message['role'] == 'user' else '[|endofturn|]\n') }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
        ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    ),
}


@dataclass(frozen=True)
class ChatTemplate:
    """What is written as an output's chat template, and what is said of it. Without a text nothing is written."""

    text: str | None
    notes: tuple[str, ...] = ()


def wrong_template(given: str) -> list[str]:
    """What is wrong with a recipe's `chat_template`, in sentences."""
    if given == AUTO or given in FORMATS:
        return []
    if "{{" not in given and "{%" not in given:
        known = [AUTO, *FORMATS]
        return [f"chat_template: '{given[:60]}' is no known format and no Jinja template.{nearest(given, known)}"]
    try:
        if "generation" not in given:  # a tag that transformers adds
            Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"]).parse(given)
    except TemplateSyntaxError as error:
        return [f"chat_template: no valid Jinja template (line {error.lineno}: {error.message}). Correct it."]
    return []


def choose_template(
    given: str, models: Iterable[Checkpoint], written: Checkpoint, tokens: Iterable[str]
) -> ChatTemplate:
    """The template that a recipe asks for.

    Arguments:
        given: `auto`, the name of a format, or a template's text.
        models: the base, then the experts. `auto` takes the template that most have; of equally many the first's.
        written: the model whose tokenizer is written.
        tokens: the output's, to say which of a format's are none of them.

    Raises:
        RecipeError: the output has no tokenizer that a template could belong to.
    """
    if not tokenizer_files(written.side_files()):
        raise RecipeError(f"chat_template: {written.label} has no tokenizer, and a template belongs to one. Copy its files there, or remove chat_template.")  # fmt: skip
    if given == AUTO:
        folders = dict.fromkeys(model.folder for model in models if model.path.is_dir())
        stored = [text for folder in folders if (text := stored_template(folder)) is not None]
        if not stored:
            return ChatTemplate(None, ("chat_template: no model has one, and none is written.",))
        return ChatTemplate(Counter(stored).most_common(1)[0][0])
    if given not in FORMATS:
        return ChatTemplate(given)
    known = set(tokens)
    lacking = [token for token in FORMATS[given].tokens if token not in known]
    note = f"chat_template: {given} writes {', '.join(lacking)}, which are no tokens of the output: they are split into others. tokenizer: tokens adds them."  # fmt: skip
    return ChatTemplate(FORMATS[given].text, (note,) if lacking else ())


def stored_template(folder: Path) -> str | None:
    """The chat template beside a model's weights: in a file of its own, or in the tokenizer's settings."""
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    given = read_json(folder / CONFIG).get(KEY) if (folder / CONFIG).is_file() else None
    if isinstance(given, list):  # several, by name
        given = next((each.get("template") for each in given if isinstance(each, dict) and each.get("name") == "default"), None)  # fmt: skip
    return given if isinstance(given, str) else None
