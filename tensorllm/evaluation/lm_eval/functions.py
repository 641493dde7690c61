"""What the tasks of this folder cannot express in YAML; lm_eval finds them by `!function`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorllm.data.bios_profession import CHOICES, PROFESSIONS
from tensorllm.data.fever import ANSWERS


def claims(docs: Any) -> Any:
    """Claims whose label is consistent, without duplicates."""
    labels: dict[str, set[str]] = {}
    for doc in docs:
        labels.setdefault(doc["claim"], set()).add(str(doc["label"]).lower())
    seen: set[str] = set()

    def kept(doc: Mapping[str, Any]) -> bool:
        label = str(doc["label"]).lower()
        new = doc["claim"] not in seen
        seen.add(doc["claim"])
        return new and label in ANSWERS and len(labels[doc["claim"]]) == 1

    return docs.filter(kept, load_from_cache_file=False)


def claim_target(doc: Mapping[str, Any]) -> int:
    """The index of the right choice: 0 true, 1 false."""
    return ("true", "false").index(ANSWERS[str(doc["label"]).lower()])


def biographies(docs: Any) -> Any:
    """Biographies with one of the eight professions that are a single token."""
    return docs.filter(lambda doc: profession(doc) in CHOICES, load_from_cache_file=False)


def profession(doc: Mapping[str, Any]) -> str:
    """A row's profession by name; some versions of the dataset give its number."""
    value = str(doc["profession"]).strip()
    return PROFESSIONS[int(value)] if value.isdigit() else value.lower().replace(" ", "_")


def biography_prompt(doc: Mapping[str, Any]) -> str:
    """The biography, and a sentence that the profession completes."""
    text = str(doc.get("hard_text") or doc.get("bio")).strip()
    mark = "" if text.endswith((".", "?")) else "."
    return (
        f"Consider the following text: {text}{mark} What is the profession of the person in this "
        "text? The profession of this person is"
    )


def profession_target(doc: Mapping[str, Any]) -> int:
    """The index of the right choice."""
    return CHOICES.index(profession(doc))


def question_prompt(doc: Mapping[str, Any]) -> str:
    """The question, and the beginning of its answer."""
    question = str(doc["question"]).strip()
    return f"{question}{'' if question.endswith(('?', '.')) else '?'} The answer is"


def contains(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the generation contains the answer, by the papers' rule."""
    answer = doc.get("answer") or doc.get("target")
    wanted = answer[0] if isinstance(answer, list) else answer
    return {"contains": float(str(wanted).strip().lower() in results[0].lower())}
