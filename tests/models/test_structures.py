"""Models without a row, found by structure: what holds for rows holds for one of each family."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_layer import Layer, assert_heads_are_the_modules
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from tensorllm.calibration.sequences import Calibration
from tensorllm.checkpoint.loading import load
from tensorllm.compression.engine import compress, compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.settings import make_compressor
from tensorllm.evaluation.last_layer import last_matrices
from tensorllm.models import RoleMatrices, layout_of, parameters_of
from tensorllm.models.shrink import shrunk

IDS = torch.tensor([[7, 41, 19, 78, 5, 63]])


@dataclass(frozen=True)
class Kind:
    """One model type of a family.

    Attributes:
        attention, ffn: the families it must be found to be of.
        layers: how many a tiny one has; `whole` of them have attention.
    """

    attention: str
    ffn: str = ""
    masked: bool = False
    layers: int = 2
    whole: tuple[int, ...] = (0, 1)
    config: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "cohere": Kind("separate q, k, v, o", "gated FFN"),
    "olmo2": Kind("separate q, k, v, o", "gated FFN"),  # norms over all heads
    "starcoder2": Kind("separate q, k, v, o", "plain FFN"),
    "glm4": Kind("separate q, k, v, o", "gate and in fused"),
    "gemma4_text": Kind("separate q, k, v, o", "gated FFN"),  # norms of values, shared KV
    "qwen3_next": Kind("separate q, k, v, o", layers=4, whole=(3,)),  # output gates, hybrid
    "jamba": Kind("separate q, k, v, o", "gated FFN", layers=5, whole=(4,)),
    "falcon_h1": Kind("separate q, k, v, o", "gated FFN"),
    "mpt": Kind("q, k, v fused role by role", "plain FFN"),
    "gpt_bigcode": Kind("q, k, v fused role by role", "plain FFN"),
    "bloom": Kind("q, k, v fused group by group", "plain FFN"),
    "codegen": Kind("q, v, k fused in four blocks", "plain FFN"),
    "openai-gpt": Kind("q, k, v fused role by role", "plain FFN"),
    "electra": Kind("separate query, key, value (BERT)", "plain FFN (BERT)", masked=True),
    "xlm-roberta": Kind("separate query, key, value (BERT)", "plain FFN (BERT)", masked=True),
    "modernbert": Kind("q, k, v fused role by role", "gate and in fused", masked=True),
    "deberta-v2": Kind("separate q, k, v, o", "plain FFN (BERT)", masked=True),
}
# One of each way to store attention and FFN; the others are `slow`.
EACH_WAY = ("cohere", "glm4", "falcon_h1", "gpt_bigcode", "openai-gpt", "modernbert")
every_kind = pytest.mark.parametrize("name", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def made(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model whose matrices are large enough to matter."""
    kind = KINDS[name]
    config = shrunk(AutoConfig.for_model(name, **kind.config), kind.layers)
    auto = AutoModelForMaskedLM if kind.masked else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.15)
    return model


@cache
def untouched(name: str) -> PreTrainedModel:
    return made(name)


def roles_of(model: Any) -> RoleMatrices:
    return RoleMatrices(model.config, parameters_of(model))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


@every_kind
def test_the_family_is_found(name: str) -> None:
    kind, layout = KINDS[name], layout_of(untouched(name).config)
    assert layout.by == "structure"
    assert layout.task == ("masked" if kind.masked else "causal")
    assert layout.spec.having(("q", "k", "v", "o")) == kind.whole
    assert layout.layers[kind.whole[0]].families[0] == kind.attention
    assert kind.ffn in ("", *layout.families)
    assert "verified on a tiny model" in layout.describe()


@every_kind
def test_read_then_write_keeps_logits_bit_for_bit(name: str) -> None:
    model = made(name)
    want, roles, weights = logits(model), roles_of(model), parameters_of(model)
    for layer, geometry in enumerate(roles.spec.geometries):
        for role in geometry.roles:
            w = roles.read(weights, layer, role)
            assert tuple(w.shape) == geometry.shape(role)
            roles.write(weights, layer, role, w.clone())
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", ["starcoder2", "mpt", "bloom", "gpt_bigcode"])
def test_heads_are_what_the_module_computes(name: str) -> None:
    """By the same naive loop as the rows, where the attention is plain."""
    model = made(name)
    layer = Layer(model)
    seen = layer.run()
    geo = layer.geo
    want = seen["o"].input
    assert want.shape[1] == geo.H * geo.K
    if name == "starcoder2":
        assert_heads_are_the_modules(layer)


@pytest.mark.parametrize(
    "name", [n if n in EACH_WAY else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)
def test_memory_folder_and_factors_agree(name: str, tmp_path: Path) -> None:
    """Compressed in memory, in a folder, dense or factored: the same logits."""
    model = made(name)
    model.save_pretrained(tmp_path / "model")
    matrices = [r for r in roles_of(model).spec.roles if r not in ("q_a", "kv_a")]
    for mode, settings in (
        ("shared-tucker", {"ranks": (20, 8, 3)}),
        ("laser", {"rank": 8, "matrices": matrices}),
    ):
        strategy = make_compressor(mode, settings)
        given = {"source": tmp_path / "model", "compressor": strategy}
        compress_folder(FolderTask(target=tmp_path / f"{mode}-dense", **given))
        compress_folder(FolderTask(target=tmp_path / f"{mode}-small", format="factored", **given))
        mine = made(name)
        report = compress(mine, strategy)
        want = logits(mine)
        assert not torch.allclose(want, logits(model), atol=1e-4)
        assert {n for site in report.sites for n in site.layers} >= set(KINDS[name].whole)
        auto = AutoModelForMaskedLM if KINDS[name].masked else AutoModelForCausalLM
        opened = auto.from_pretrained(tmp_path / f"{mode}-dense", attn_implementation="eager")
        torch.testing.assert_close(logits(opened.eval()), want, rtol=1e-3, atol=1e-4)
        factored = load(tmp_path / f"{mode}-small", policy="always")
        torch.testing.assert_close(logits(factored), want, rtol=1e-3, atol=1e-3)
        if not KINDS[name].masked:
            text = factored.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            assert text.shape == (1, IDS.shape[1] + 2)


@pytest.mark.parametrize("name", ["cohere", "olmo2", "glm4", "bloom", "codegen"])
@pytest.mark.parametrize("mode", ["svd-llm", "activation-tucker"])
def test_modes_fitted_to_text_work(name: str, mode: str) -> None:
    drawn = torch.randint(3, 80, (16, 16), generator=torch.Generator().manual_seed(3)).tolist()
    text = Calibration(tuple(map(tuple, drawn)))
    model = made(name)
    settings = {"kept": 0.5} if mode == "svd-llm" else {"target_ratio": 1.6}
    report = compress(model, make_compressor(mode, settings), calibration=text)
    assert {n for site in report.sites for n in site.layers} == set(KINDS[name].whole)
    assert torch.isfinite(logits(model)).all()


def test_layers_without_attention_are_reported() -> None:
    model = made("qwen3_next")
    report = compress(model, make_compressor("shared-tucker", {"ranks": (8, 4, 2)}))
    assert report.layers == (3,)
    assert [each["layer"] for each in report.to_json()["passed_over"]] == [0, 1, 2]


def test_an_output_gate_stays_as_it_is() -> None:
    """It is stored beside the queries, head by head, in one parameter with them."""
    model = made("qwen3_next")
    roles, weights = roles_of(model), parameters_of(model)
    geo = roles.spec.geometry(3)
    name = roles.name(3, "q")
    before = weights[name].clone().view(geo.H, 2, geo.K, geo.D)
    assert torch.equal(roles.read(weights, 3, "q"), before[:, 0].reshape(-1, geo.D))
    compress(model, make_compressor("shared-tucker", {"ranks": (8, 4, 2)}))
    after = parameters_of(model)[name].view(geo.H, 2, geo.K, geo.D)
    assert torch.equal(after[:, 1], before[:, 1])
    assert not torch.equal(after[:, 0], before[:, 0])


def test_shortcuts_of_scoring_are_for_rows_alone() -> None:
    """Of a structure nobody knows that positions and layers can be left out."""
    assert not list(last_matrices(untouched("cohere")))
    assert not roles_of(untouched("cohere")).layout.plain
