"""Requests to transformers' server that cannot be met, answered with what is wrong with them.

The server reads the settings of a request as they come: a wrong one would end in an error of Python
somewhere inside, which is answered 500, as if the server were to blame.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Json, PositiveInt, ValidationError

from tensorllm.options import MAX_SEED

WRONG, IMPOSSIBLE = 422, 400  # HTTP: a request of wrong values, or one that this model cannot meet


class Settings(BaseModel):
    """What every request may set; null is as if it was not given."""

    model_config = ConfigDict(strict=True)

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, allow_inf_nan=False)] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    max_output_tokens: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stream: bool | None = None
    stop: str | list[str] | None = None
    suffix: str | None = None
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]+$")], float] | None = None
    tools: list[dict[str, Any]] | None = None
    generation_config: Json[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Part(BaseModel):
    """A part of a message; those of other types than text have other fields."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message of a chat."""

    role: str
    content: str | list[Part] | None = None


class Chat(Settings):
    """A request to `/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]


class Turn(Settings):
    """A request to `/responses`."""

    input: str | list[dict[str, Any]]


@contextmanager
def bad_requests_refused() -> Iterator[None]:
    """Within the block, transformers' server says what is wrong with a request, by a status 4xx."""
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import BaseHandler

    resolve = BaseHandler._resolve_model  # what all handlers do first, with the whole request

    def checked(handler: BaseHandler, body: dict[str, Any]) -> tuple[str, Any, Any]:
        kinds: dict[type, type[Settings]] = {ChatCompletionHandler: Chat, ResponseHandler: Turn}
        kind = kinds.get(type(handler), Settings)
        if problem := problem_of(body, kind):
            raise HTTPException(WRONG, problem)
        for field in kind.model_fields:
            if field in body and body[field] is None:  # transformers takes null for a value
                del body[field]
        name, model, processor = resolve(handler, body)
        if kind is not Settings and not getattr(processor, "chat_template", None):
            raise HTTPException(
                IMPOSSIBLE, f"{name} has no chat template: ask for /v1/completions with a prompt"
            )
        return name, model, processor

    BaseHandler._resolve_model = checked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        BaseHandler._resolve_model = resolve  # type: ignore[method-assign]


def problem_of(body: dict[str, Any], kind: type[Settings]) -> str | None:
    """What is wrong with a request, in one line; None if nothing is."""
    try:
        kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        return f"{place}: {first['msg']}{got}"
    return None
