"""Requests to transformers' server that cannot be met, answered with what is wrong with them.

The server reads the settings of a request as they come: a wrong one would end in an error of Python
somewhere inside, which is answered 500, as if the server were to blame.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    Json,
    PositiveInt,
    ValidationError,
    model_validator,
)
from transformers import GenerationConfig, StoppingCriteriaList

from tensorllm.errors import UserError, first_line
from tensorllm.evaluation.scorer import context_of, embedding_rows
from tensorllm.models.ends import Ends
from tensorllm.options import MAX_SEED

LOG = logging.getLogger(__name__)
WRONG, IMPOSSIBLE = 422, 400  # HTTP: a request of wrong values, or one that this model cannot meet
# What Python raises at a wrong value; a fault of the server itself is most often another error.
AT_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _listed(value: Any) -> Any:
    """One string is as a list of it; what is neither is left for the check."""
    return [value] if isinstance(value, str) else value


def _in_parts(value: Any) -> Any:
    """A text is as a list of one part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


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
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] | None = (
        None
    )
    suffix: str | None = None
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]+$")], FiniteFloat] | None = None
    tools: list[dict[str, Any]] | None = None
    generation_config: Json[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Part(BaseModel):
    """A part of a message; those of other types than text have other fields."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _has_its_text(self) -> Self:
        if self.type == "text" and self.text is None:
            raise ValueError("a part of type text must have a text")
        return self


class Called(BaseModel):
    """The function of a tool that an answer called."""

    name: str
    arguments: Json[Any] | dict[str, Any]


class ToolCall(BaseModel):
    """A call of a tool in an answer of before."""

    function: Called


class Message(BaseModel):
    """A message of a chat."""

    role: str
    content: Annotated[list[Part], BeforeValidator(_in_parts)] | None = None
    tool_calls: list[ToolCall] | None = None


class Chat(Settings):
    """A request to `/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]


class Turn(Settings):
    """A request to `/responses`."""

    input: str | list[dict[str, Any]]


@contextmanager
def bad_requests_refused() -> Iterator[None]:
    """Within the block, transformers' server says what is wrong with a request, by a status 4xx."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import BaseHandler, GenerateManager

    kinds: dict[type, type[Settings]] = {
        ChatCompletionHandler: Chat,
        CompletionHandler: Settings,
        ResponseHandler: Turn,
    }
    with ExitStack() as stack:
        for handler in kinds:
            stack.enter_context(_wrapped(handler, "handle_request", _answered))
        # What all handlers do first, with the whole request.
        stack.enter_context(_wrapped(BaseHandler, "_resolve_model", lambda f: _checked(f, kinds)))
        for name in ("generate_streaming", "generate_non_streaming"):
            stack.enter_context(_wrapped(GenerateManager, name, _fitted))
        yield


@contextmanager
def _wrapped(owner: type, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """A method within another, until the block ends."""
    method = getattr(owner, name)
    setattr(owner, name, wrap(method))
    try:
        yield
    finally:
        setattr(owner, name, method)


def _answered(handle: Any) -> Any:
    """`handle_request` whose errors at the request's values are answers, not faults."""
    from fastapi import HTTPException
    from jinja2 import TemplateError  # a chat template may refuse messages by it

    async def handle_request(handler: Any, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await handle(handler, body, request_id)
        except UserError as error:
            raise HTTPException(IMPOSSIBLE, str(error)) from None
        except (*AT_VALUES, TemplateError) as error:
            LOG.warning("the request %s cannot be met", request_id, exc_info=True)
            raise HTTPException(
                IMPOSSIBLE, f"this request cannot be met: {first_line(error)}"
            ) from None

    return handle_request


def _checked(resolve: Any, kinds: dict[type, type[Settings]]) -> Any:
    """`_resolve_model` after a check of the request's values, which it completes."""
    from fastapi import HTTPException

    def resolve_model(handler: Any, body: dict[str, Any]) -> tuple[str, Any, Any]:
        kind = kinds.get(type(handler), Settings)
        if problem := problem_of(body, kind):
            raise HTTPException(WRONG, problem)
        for field in kind.model_fields:
            if field in body and body[field] is None:  # transformers takes null for a value
                del body[field]
        if kind is Chat:  # clients send back the answers that they got, with every field
            body["messages"] = [
                {name: x for name, x in message.items() if x is not None and x != []}
                for message in body["messages"]
            ]
        name, model, processor = resolve(handler, body)
        if kind is not Settings and not getattr(processor, "chat_template", None):
            raise UserError(f"{name} has no chat template: ask for /v1/completions with a prompt")
        return name, model, processor

    return resolve_model


def _fitted(generate: Any) -> Any:
    """A method of the manager that generates what the model can, and refuses what it cannot."""

    def generate_fitting(
        manager: Any, model: Any, processor: Any, inputs: Any, gen_config: Any, **rest: Any
    ) -> Any:
        ids_BT, tokenizer = inputs["input_ids"], getattr(processor, "tokenizer", processor)
        read = ids_BT.shape[1]
        fit(gen_config, model, tokenizer, read)
        if gen_config.stop_strings:
            ends = Ends(gen_config.stop_strings, tokenizer, read)
            inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([ends])}
        gen_config.stop_strings = None
        return generate(manager, model, processor, inputs, gen_config, **rest)

    return generate_fitting


def fit(config: GenerationConfig, model: Any, tokenizer: Any, read: int) -> None:
    """Fit the settings of a generation, in place, to what the model can still write.

    Args:
        read: tokens of the prompt.

    Raises:
        UserError: the model cannot read the prompt, or has no such tokens.
    """
    context = context_of(model.config, tokenizer)
    if not 0 < read < context:
        raise UserError(f"the prompt must have 1..{context - 1} tokens, got {read}")
    if config.max_new_tokens is not None:
        config.max_new_tokens = min(config.max_new_tokens, context - read)
    bias: Any = config.sequence_bias
    if isinstance(bias, dict):  # a list is of generation_config, and as transformers wants it
        rows = embedding_rows(model)
        if unknown := [token for tokens in bias for token in tokens if token >= rows]:
            raise UserError(f"logit_bias: tokens are 0..{rows - 1}, got {unknown[0]}")
        bias = {tokens: float(value) for tokens, value in bias.items()}  # no whole numbers
        config.sequence_bias = bias or None


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
