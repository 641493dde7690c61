"""What a checkpoint's model predicts, and the transformers class for it.

The architecture's row decides, not the class that `architectures` in config.json happens to name:
that may be missing, a base model without a head, or a classifier.
"""

from typing import Any

from tensorllm.errors import UserError
from tensorllm.models.spec import ARCHITECTURES, Task

TEXT_PARTS = ("text_config", "decoder", "generator")  # wrappers' names for the text model's config


def task_of(config: Any) -> Task:
    """Whether a model of this config predicts the next token or a masked one.

    Raises:
        UserError: it is neither kind of language model.
    """
    if config.model_type in ARCHITECTURES:
        return ARCHITECTURES[config.model_type].task
    causal, masked = _class_for("causal", config), _class_for("masked", config)
    named = masked is not None and masked.__name__ in (config.architectures or ())
    bare = not config.architectures and not getattr(config, "is_decoder", True)
    if masked is not None and (causal is None or named or bare):
        return "masked"
    if causal is not None or _wrapper_class(config) is not None:
        return "causal"
    raise UserError(
        f"a {config.model_type!r} model is neither a causal nor a masked language model"
    )


def is_masked(config: Any) -> bool:
    """Whether a model of this config is a masked language model, which generates no text."""
    return task_of(config) == "masked"


def language_model_class(config: Any) -> Any:
    """The transformers class for the model's task, whatever class the weights were saved from.

    Raises:
        UserError: there is none, or the config declares a masked model to be a decoder.
    """
    task = task_of(config)
    kind = _class_for(task, config)
    if task == "causal" and (kind is None or text_config_of(config) is not config):
        kind = _wrapper_class(config) or kind
    if kind is None:
        raise UserError(f"transformers has no {task} language model for {config.model_type!r}")
    if task == "masked" and getattr(config, "is_decoder", False):
        raise UserError(
            f"config.json says is_decoder: true, but a {config.model_type!r} model is run with a "
            "masked head, which needs is_decoder: false"
        )
    return kind


def saved_class(config: Any) -> Any:
    """The transformers class the weights were saved from; else that of the model's task.

    Where `architectures` names several, it is the class of the model's task if that is among them:
    the one that is scored.
    """
    import transformers

    named = []
    for name in config.architectures or ():
        kind: Any = getattr(transformers, str(name), None)
        wanted = getattr(kind, "config_class", None)
        if isinstance(wanted, type) and isinstance(config, wanted):
            named.append(kind)
    if len(named) == 1:
        return named[0]
    of_task = language_model_class(config)
    return of_task if not named or of_task in named else named[0]


def base_class(config: Any) -> Any:
    """The class of the model without a head; None if transformers has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return MODEL_MAPPING.get(type(config), None)


def text_config_of(config: Any) -> Any:
    """The config of the model that generates text: a wrapper's part, or the config itself."""
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # there are several, and none is marked as the decoder
        return config
    parts = [getattr(config, name, None) for name in (*type(config).sub_configs, *TEXT_PARTS)]
    return text if any(part is text for part in parts) else config


def text_class(config: Any) -> Any:
    """The causal language model class of a wrapper's text config; None if transformers has none."""
    return _class_for("causal", config)


def _wrapper_class(config: Any) -> Any:
    """The class that reads images and generates text, around a text model."""
    from transformers.models.auto import modeling_auto as auto

    return auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)


def _class_for(task: Task, config: Any) -> Any:
    from transformers.models.auto import modeling_auto as auto

    mapping: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if task == "masked":
        mapping = auto.MODEL_FOR_MASKED_LM_MAPPING
    return mapping.get(type(config), None)


def name_of(config: Any) -> str:
    """What a model was loaded from, by its config; otherwise its type."""
    return str(getattr(config, "_name_or_path", "") or config.model_type)


def context_length(config: Any) -> int | None:
    """How many positions the text model has; None if its config does not say."""
    found = getattr(text_config_of(config), "max_position_embeddings", None)
    return int(found) if found else None


def hidden_size(config: Any) -> int:
    """The model width D by the text model's config; 0 if it does not say."""
    return int(getattr(text_config_of(config), "hidden_size", 0) or 0)
