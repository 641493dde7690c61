"""Architectures and bad input: each wrong thing is named, with what was expected and what came."""

from typing import Any

import pytest
from naive_layer import Layer
from tiny_models import TINY, tiny_config, tiny_model
from transformers import AutoConfig

from tensorllm.errors import UserError
from tensorllm.models import ARCHITECTURES, RoleMatrices, architecture_of


@pytest.fixture(scope="module")
def llama() -> Layer:
    return Layer(tiny_model("llama"))


def test_unknown_model_type_says_how_to_add_it() -> None:
    config = tiny_config("llama")
    config.model_type = "lama"
    with pytest.raises(
        UserError, match=r"'lama'.*Did you mean 'llama'.*docs/add_an_architecture.md"
    ):
        architecture_of(config)


@pytest.mark.parametrize("layers", [[2], [-1], [0, 0], [], [1, 0, 1]])
def test_wrong_layers_are_refused(llama: Layer, layers: list[int]) -> None:
    with pytest.raises(UserError, match="layers must be"):
        llama.roles.check_layers(layers)


def test_layers_keep_their_order(llama: Layer) -> None:
    assert llama.roles.check_layers([1, 0]) == (1, 0)


@pytest.mark.parametrize("name", TINY)
def test_shapes_that_contradict_the_config_are_refused(name: str) -> None:
    layer = Layer(tiny_model(name))
    good = {n: tuple(w.shape) for n, w in layer.weights.items()}
    for role in layer.geo.roles:
        wrong = layer.roles.name(1, role)
        with pytest.raises(UserError, match=rf"{wrong} has shape .* but the config says"):
            layer.roles.check_shapes({**good, wrong: (good[wrong][0], good[wrong][1] + 1)})
        with pytest.raises(UserError, match=f"no {wrong}, which the config asks for"):
            layer.roles.check_shapes({n: s for n, s in good.items() if n != wrong})


def test_weights_of_another_architecture_are_refused(llama: Layer) -> None:
    with pytest.raises(UserError, match="do not look like a 'gptj' model"):
        RoleMatrices(tiny_config("gptj"), llama.weights)


@pytest.mark.parametrize(
    "sizes", [{"num_key_value_heads": 3}, {"hidden_size": 30, "head_dim": None}]
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, Any]) -> None:
    config = tiny_config("mistral")
    for key, value in sizes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match="must be a multiple of"):
        ARCHITECTURES["mistral"].geometry(config)


def test_a_role_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UserError, match="no matrix 'gate'; it has q, k, v, o, in, out"):
        ARCHITECTURES["gptj"].stored("gate")


def test_an_ffn_width_that_the_config_leaves_open_is_four_times_the_model_width() -> None:
    """As in GPT-2, whose `n_inner` is None, and BLOOM, whose config has no such field."""
    assert ARCHITECTURES["gpt2"].geometry(tiny_config("gpt2", n_inner=None)).F == 4 * 32
    bloom = AutoConfig.for_model("bloom", hidden_size=32, n_head=4)
    assert ARCHITECTURES["gpt_neox"].geometry(bloom).F == 4 * 32
