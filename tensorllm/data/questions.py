"""Questions of your own: any file with prompts and answers, optionally described by a YAML file."""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.example import Example
from tensorllm.data.reading import Row
from tensorllm.dataset_names import ALIASES
from tensorllm.errors import UserError, first_line
from tensorllm.io import from_yaml
from tensorllm.registry import did_you_mean

SETTINGS = {
    "data_file": str,
    "template": str,
    "choices": list,
    "max_new_tokens": int,
    "fields": dict,
}


@DATASETS.register("questions", aliases=ALIASES["questions"])
class Questions(ReasoningDataModule):
    """Questions of your own: rows with `prompt` and `answer`, and `choices` if there are any.

    Args:
        template: makes a prompt from the row's fields in braces: `"Q: {question} A:"`.
        choices: the answers allowed for every row.
        max_new_tokens: the most tokens of a generated answer.
    """

    field_names: ClassVar = {
        "prompt": ("prompt", "question", "input", "inputs"),
        "answer": ("answer", "target", "targets", "label"),
        "choices": ("choices",),
    }

    def __init__(
        self,
        *args: Any,
        template: str | None = None,
        choices: list[str] | None = None,
        max_new_tokens: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.template = template
        self.choices = _choices(choices or [], "choices")
        self.max_new_tokens = max_new_tokens

    def example(self, row: Row, where: str) -> Example | None:
        answer = self.text(row, "answer", where)
        own = row.get("choices")
        choices = _choices(own, f"{where}: choices") if own else self.choices
        if choices and answer not in choices:
            raise UserError(f"{where}: answer must be one of {', '.join(choices)}, got {answer!r}")
        return Example(self._prompt(row, where), answer, choices)

    def _prompt(self, row: Row, where: str) -> str:
        if self.template is None:
            return self.text(row, "prompt", where)
        held = {name: value for name, value in row.items() if value is not None}  # else "None"
        try:
            return self.template.format_map(held)
        except KeyError as error:
            raise UserError(
                f"{where}: the template's field {error} is not in the row, or empty: it has "
                f"{', '.join(map(repr, held))}"
            ) from None
        except (ValueError, LookupError, AttributeError) as error:  # the errors of str.format
            raise UserError(
                f"the template must have a row's fields in braces, such as 'Q: {{question}}', "
                f"got {self.template!r:.80}: {error}"
            ) from None


def _choices(values: Any, what: str) -> tuple[str, ...]:
    """Texts, as answers are, or numbers; YAML reads a bare yes or no as a boolean."""
    if isinstance(values, list | tuple):
        numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in values]
        values = [str(v) if n else v for v, n in zip(values, numbers, strict=True)]
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise UserError(f'{what} must be a list of texts such as ["yes", "no"], got {values!r:.60}')
    texts = tuple(value.strip() for value in values)  # as an answer is
    if texts and not (all(texts) and 1 < len(set(texts)) == len(texts)):
        raise UserError(f"{what} must be two or more, each once and not empty, got {values!r:.60}")
    return texts


def questions_from_yaml(path: Path, **options: Any) -> Questions:
    """The dataset that a YAML file describes (docs/add_a_dataset.md).

    Args:
        options: take precedence over the file.

    Raises:
        UserError: a key is unknown or of the wrong type.
    """
    try:
        settings = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read the dataset {path}: {reason}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold keys and values, got {settings!r:.60}")
    for key, value in settings.items():
        if key not in SETTINGS:
            hint = did_you_mean(str(key), list(SETTINGS))
            raise UserError(f"{path}: unknown key {key!r}.{hint} Known: {', '.join(SETTINGS)}")
        if not isinstance(value, SETTINGS[key]):
            raise UserError(f"{path}: {key} must be {SETTINGS[key].__name__}, got {value!r:.60}")
    file = settings.pop("data_file", None)
    if file is not None:
        settings["data_file"] = path.parent / file
    return Questions(**{**settings, **{k: v for k, v in options.items() if v is not None}})
