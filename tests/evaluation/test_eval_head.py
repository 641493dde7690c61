"""The output embedding: only wanted columns are read, and the most probable token is the same."""

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import linear

from tensorllm.evaluation import head
from tensorllm.evaluation.forward import ModelForward, left_padded
from tensorllm.evaluation.head import BLOCK, Screen, Strips

CPU = torch.device("cpu")


def planted(vocabulary, width, seed, bias):
    """Embeddings of unequal norms, some of them nearly the same, and what they are asked with."""
    torch.manual_seed(seed)
    weight = torch.randn(vocabulary, width) * torch.rand(vocabulary, 1).mul(3).exp()
    weight[7:9] = weight[3:5] * (1 + 1e-3 * torch.randn(2, width))
    x = torch.cat([torch.randn(40, width), weight[:20] / 5, -weight.mean(0)[None]])
    return weight, (torch.randn(vocabulary) * 4 if bias else None), x


@pytest.mark.parametrize("finder", [Screen, Strips])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocabulary", [4 * BLOCK, 5 * BLOCK + 3])
def test_the_most_probable_token_is_found(vocabulary, bias, finder, monkeypatch):
    monkeypatch.setattr(head, "STRIP", BLOCK)
    for seed in range(5):
        weight, bias_V, x = planted(vocabulary, 48, seed, bias)
        for scale in (1e-3, 1.0, 1e3):
            got = finder(weight, bias_V)(scale * x)
            assert torch.equal(got, linear(scale * x, weight, bias_V).argmax(-1))


def test_where_all_logits_are_negative_no_filling_is_chosen():
    weight = -torch.rand(BLOCK + 5, 16) - 1
    x = torch.rand(6, 16) + 1
    assert torch.equal(Screen(weight, None)(x), linear(x, weight).argmax(-1))


def test_bounds_hold_and_leave_few_tokens():
    weight, _, x = planted(8 * BLOCK, 256, 0, bias=False)
    screen = Screen(weight, None)
    rough = linear(x.bfloat16(), screen.narrow_VD).view(len(x), -1, BLOCK).float()
    lowest = screen.lowest(x, x.bfloat16(), rough.amax(-1))
    true = linear(x.double(), weight.double())
    at = true.argmax(-1)
    needed = lowest.gather(1, (at // BLOCK)[:, None])[:, 0]
    assert (rough.view(len(x), -1).gather(1, at[:, None])[:, 0] >= needed).all()
    assert (rough >= lowest[..., None]).sum() < 8 * len(x)
    # Adverse roundings: every number is off by nearly half a step, in the same direction.
    ones = torch.full((BLOCK, 512), 1 + 2.0**-8 - 2.0**-20)
    ones[1] = 1 + 2.0**-8 + 2.0**-20
    assert int(Screen(ones, None)(ones[:1])) == 1


@pytest.mark.parametrize("finder", [Screen, Strips])
@pytest.mark.parametrize("infinite", [torch.inf, torch.nan])
def test_what_is_not_finite_gives_what_all_logits_would(infinite, finder, monkeypatch):
    monkeypatch.setattr(head, "STRIP", BLOCK)
    weight, _, x = planted(4 * BLOCK, 16, 0, bias=False)
    x[0, 0] = infinite
    assert torch.equal(finder(weight, None)(x), linear(x, weight).argmax(-1))


@pytest.mark.parametrize(("faster", "finder"), [(0.0, Screen), (torch.inf, Strips)])
@pytest.mark.parametrize("name", ["gptj", "llama", "gemma2", "opt", "gpt2", "falcon"])
@torch.no_grad()
def test_wanted_columns_of_every_row(name, faster, finder, monkeypatch):
    monkeypatch.setattr(head, "LARGE", 0)
    monkeypatch.setattr(head, "FASTER", faster)
    model = tiny_model(name)
    forward = ModelForward(model)
    batch = left_padded([[5, 9, 11, 4, 8], [7, 3], [6, 6, 2, 9]], CPU)
    plain = model(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT.long(),
        **({"position_ids": batch.positions_BT} if name != "falcon" else {}),
    ).logits
    wanted = torch.cat([plain[0, -3:], plain[1, -1:], plain[2, :0]])
    got, _ = forward(batch, keep=[3, 1, 0])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for _ in range(3):  # first seen, then found so where the model leaves its logits as they are
        best, _ = forward(batch, keep=[3, 1, 0], best=True)
        assert torch.equal(best, wanted.argmax(-1))
    capped = name == "gemma2"
    assert isinstance(forward._head._finder, type(None) if capped else finder)
    del forward
    assert not model.get_output_embeddings()._forward_pre_hooks
