"""The last layer narrowed to the wanted columns: the same logits as the whole model's, cheaper."""

import inspect
from dataclasses import replace

import eval_world as world
import pytest
import torch
from support.naive import naive
from tiny_models import TINY, tiny_model

from tensorllm.evaluation.evaluate import score
from tensorllm.evaluation.forward import ModelForward, left_padded
from tensorllm.models import ARCHITECTURES, RoleMatrices, parameters_of

CAUSAL = [name for name in TINY if TINY[name].task == "causal"]
FLAT = ("opt",)  # rows and columns are one axis there: left as it is
IDS = [[5, 9, 11, 4, 8], [7, 3], [6, 6, 2, 9]]


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_logits_are_those_of_the_whole_model(name):
    model = tiny_model(name)
    batch = left_padded(IDS, torch.device("cpu"))
    want_BTV = model(
        input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), **positions(model, batch)
    ).logits
    roles = RoleMatrices(model.config, parameters_of(model))
    forward = ModelForward(model)
    widths = {}
    for role in ("in", "out", "o"):
        for layer in range(roles.layers):
            module = model.get_submodule(roles.name(layer, role).removesuffix(".weight"))
            module.register_forward_hook(
                lambda m, args, out, at=(layer, role): widths.update({at: args[0].shape[-2]})
            )
    for keep in (1, 2, 5):
        got_BNV, _ = forward(batch, keep=keep, grow=True)
        shown = batch.mask_BT[:, -keep:, None]
        torch.testing.assert_close(
            got_BNV.where(shown, 0), want_BTV[:, -keep:].where(shown, 0), rtol=1e-5, atol=1e-5
        )
        last = roles.layers - 1
        assert widths[last, "o"] == keep
        assert widths[0, "o"] == 5
        if name not in FLAT:
            assert (widths[last, "in"], widths[last, "out"]) == (keep, keep)
            assert (widths[0, "in"], widths[0, "out"]) == (5, 5)


def positions(model, batch):
    known = inspect.signature(model.forward).parameters
    return {"position_ids": batch.positions_BT} if "position_ids" in known else {}


@pytest.fixture
def without_ffn(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA by a row that names its attention only."""
    known = {name: ARCHITECTURES[name] for name in ARCHITECTURES}
    known["llama"] = replace(known["llama"], ffn=())
    monkeypatch.setattr(ARCHITECTURES, "_entries", known)


@pytest.mark.usefixtures("without_ffn")
@torch.no_grad()
def test_a_row_of_attention_only_scores_the_same():
    model = tiny_model("llama")
    batch = left_padded(IDS, torch.device("cpu"))
    want_BTV = model(
        input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), **positions(model, batch)
    ).logits
    widths = []
    model.model.layers[-1].self_attn.o_proj.register_forward_hook(
        lambda module, args, out: widths.append(args[0].shape[1])
    )
    got_BNV, _ = ModelForward(model)(batch, keep=2)
    shown = batch.mask_BT[:, -2:, None]
    torch.testing.assert_close(got_BNV.where(shown, 0), want_BTV[:, -2:].where(shown, 0))
    assert widths == [2]


@pytest.mark.usefixtures("without_ffn")
def test_a_row_of_attention_only_is_evaluated_in_full():
    model, tokenizer = world.model("llama"), world.tokenizer()
    found = score(model, tokenizer, world.questions(12), max_new_tokens=3)
    want = [naive(model, tokenizer, e, 3) for e in world.questions(12)]
    for prediction, one in zip(found, want, strict=True):
        assert prediction.correct == one.correct
        assert prediction.log_probability == pytest.approx(one.log_probability, abs=1e-3)


@torch.no_grad()
def test_outside_of_a_pass_and_afterwards_the_model_is_as_it_was():
    model = tiny_model("llama")
    batch = left_padded(IDS, torch.device("cpu"))
    want = model(input_ids=batch.ids_BT).logits
    forward = ModelForward(model)
    forward(batch, keep=1)
    assert torch.equal(model(input_ids=batch.ids_BT).logits, want)
    del forward
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
