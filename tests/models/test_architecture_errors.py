"""Architectures and bad input: each wrong thing is named, with what was expected and what came."""

import pytest
from naive_layer import Layer
from tiny_models import TINY, tiny_config, tiny_model
from transformers import AutoConfig

from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, layout_of


@pytest.fixture(scope="module")
def llama() -> Layer:
    return Layer(tiny_model("llama"))


def test_a_structure_of_no_family_says_what_was_found_and_how_to_write_a_row() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=99)
    with pytest.raises(
        UserError, match=r"'mamba'.*no known attention.*mixer.in_proj.*docs/add_an_architecture.md"
    ):
        layout_of(config)


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


def test_sizes_that_do_not_divide_are_refused() -> None:
    config = tiny_config("mistral")
    config.num_key_value_heads = 3
    with pytest.raises(UserError, match="must be a multiple of"):
        layout_of(config)


def test_a_role_that_is_not_there_names_those_that_are() -> None:
    roles = Layer(tiny_model("gptj")).roles
    with pytest.raises(UserError, match="layer 1 has no matrix 'gate'; it has q, k, v, o, in, out"):
        roles.stored(1, "gate")


def test_an_ffn_width_that_the_config_leaves_open_is_four_times_the_model_width() -> None:
    """As in GPT-2, whose `n_inner` is None, and BLOOM, whose config has no such field."""
    assert layout_of(tiny_config("gpt2", n_inner=None)).spec.geometry(0).F == 4 * 32
    bloom = AutoConfig.for_model("bloom", hidden_size=32, n_head=4)
    assert layout_of(bloom).spec.geometry(0).F == 4 * 32
