"""vLLM's quantisation interface: its linears run in our factors, or dense where they must.

The first tests need no vLLM (tests/helpers/vllm_stand_in.py); the last one runs vLLM's own loader
and model where vLLM can be imported.
"""

import importlib
import json
from dataclasses import dataclass, replace
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import vllm_stand_in as stand_in
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor, nn

import tensorllm as tl
from tensorllm.checkpoint.loading import choices_of
from tensorllm.compressors.base import Job, Leaf
from tensorllm.compressors.calibrated.channels import narrowed_site
from tensorllm.errors import UserError
from tensorllm.tensors.kept_rows import KeptRows

SIZES = {"attention_bias": False, "max_position_embeddings": 64}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
INNER = torch.randn(5, 56, generator=torch.Generator().manual_seed(1))


@tl.COMPRESSORS.register("every-fourth-channel")
@dataclass(frozen=True, kw_only=True)
class EveryFourthChannel(Leaf):
    """FFNs without the others, each as one site over all of its matrices."""

    source: ClassVar[str] = "none"

    def jobs(self, spec: Any, layers: Any) -> list[Job]:
        sites = [narrowed_site(layer, spec.geometry(layer).roles) for layer in layers]
        return [Job(site, self) for site in sites if site is not None]

    def decompose(self, w: Tensor, statistics: object = None) -> KeptRows:
        return KeptRows.of(torch.arange(0, len(w), 4), w[::4].clone(), len(w))


KNOWN = {"every-fourth-channel": tl.COMPRESSORS._entries.pop("every-fourth-channel")}
METHODS = {
    "shared Tucker and one FFN matrix": tl.Hybrid(ranks=(20, 3, 2), rho=0.4, matrices=("in",)),
    "both inputs of the FFN": tl.LaserSVD(rho=0.5, matrices=("gate", "in", "out", "o")),
    "one of three": tl.LaserSVD(rho=0.5, matrices=("k",)),
    "over layers": tl.Trawl(rank=9, across_layers=True),
    "narrow FFNs": EveryFourthChannel(),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only here: other tests list the project's own modes."""
    monkeypatch.setattr(tl.COMPRESSORS, "_entries", tl.COMPRESSORS._entries | KNOWN)


def folder(compressor: Any, out: Path, **sizes: Any) -> Any:
    """A factored folder, and the dense model that it stands for."""
    model = tiny_model("llama", **SIZES | sizes)
    tl.compress(model, compressor)
    tl.save(model, out, overwrite=True)
    return model


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our module, imported as vLLM would import it."""
    stand_in.install(monkeypatch)
    return importlib.import_module("tensorllm.checkpoint.vllm")


def config_of(ours: Any, out: Path, **more: Any) -> Any:
    """What vLLM makes of the folder's config.json with `--hf-overrides`."""
    ours.register()
    values = json.loads((out / "config.json").read_text())["quantization_config"] | more
    config = stand_in.REGISTERED[values["quant_method"]].from_config(values)  # type: ignore[attr-defined]
    config.maybe_update_config(str(out), hf_config=SimpleNamespace(), revision=None)
    config.packed_modules_mapping.update(PACKED)
    return config


def layers_of(config: Any, number: int) -> dict[str, Any]:
    """The linears of one layer, as vLLM's LLaMA declares them."""
    at = f"model.layers.{number}"
    join, qkv = stand_in.LinearBase, stand_in.QKVParallelLinear
    return {
        "qkv": qkv(32, [32, 16, 16], config, f"{at}.self_attn.qkv_proj"),
        "o": join(32, [32], config, f"{at}.self_attn.o_proj"),
        "gate_up": join(32, [56, 56], config, f"{at}.mlp.gate_up_proj"),
        "down": join(56, [32], config, f"{at}.mlp.down_proj"),
    }


def load(layers: dict[str, Any], config: Any, out: Path, number: int) -> None:
    """What vLLM does: weights by name into the layers, then each layer's own last step."""
    mapper = config.get_checkpoint_weight_mapper()
    stored = mapper.apply(load_file(out / "factored.safetensors").items())
    places = {
        f"self_attn.{name}_proj": ("qkv", shard) for name, shard in zip("qkv", "qkv", strict=True)
    }
    places |= {"self_attn.o_proj": ("o", None), "mlp.down_proj": ("down", None)}
    places |= {"mlp.gate_proj": ("gate_up", 0), "mlp.up_proj": ("gate_up", 1)}
    for name, t in stored:
        path = name.removesuffix(".weight").removeprefix(f"model.layers.{number}.")
        if path in places:
            layer, shard = places[path]
            layers[layer].weight.weight_loader(layers[layer].weight, t, shard)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def wanted(model: Any, number: int) -> dict[str, Any]:
    block = model.model.layers[number]
    a, f = block.self_attn, block.mlp
    return {
        "qkv": torch.cat([a.q_proj(X), a.k_proj(X), a.v_proj(X)], dim=-1),
        "o": a.o_proj(X),
        "gate_up": torch.cat([f.gate_proj(X), f.up_proj(X)], dim=-1),
        "down": f.down_proj(INNER),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("split", "policy"), [(1, "always"), (2, "always"), (1, "auto")])
def test_linears_give_what_the_dense_weights_give(
    name: str, split: int, policy: str, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder(METHODS[name], tmp_path / "out")
    monkeypatch.setattr(ours, "get_tensor_model_parallel_world_size", lambda: split)
    config = config_of(ours, tmp_path / "out", policy=policy)
    for number in range(2):
        layers = layers_of(config, number)
        load(layers, config, tmp_path / "out", number)
        narrow = hasattr(layers["down"], "factored") and name == "narrow FFNs"
        for kind, want in wanted(model, number).items():
            if narrow and kind in ("gate_up", "down"):
                continue
            got, _ = layers[kind](INNER if kind == "down" else X)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            factored = hasattr(layers[kind], "factored")
            assert not (factored and (split > 1 or policy == "auto"))  # too small to be faster
            assert factored != hasattr(layers[kind], "weight")
        gate, up = layers["gate_up"](X)[0].chunk(2, dim=-1)
        got, _ = layers["down"](nn.functional.silu(gate) * up)
        torch.testing.assert_close(got, model.model.layers[number].mlp(X), rtol=1e-4, atol=1e-5)
        assert gate.shape[-1] == (14 if narrow else 56)
    assert not config.parts._rebuilt  # all that was made is in a layer, or was dropped


ALWAYS = {"policy": "always"}


def kinds_of(layers: dict[str, Any]) -> dict[str, str]:
    return {name: type(layer.quant_method).__name__ for name, layer in layers.items()}


def test_which_linears_run_in_factors(ours: Any, tmp_path: Path) -> None:
    folder(METHODS["shared Tucker and one FFN matrix"], tmp_path / "out")
    assert kinds_of(layers_of(config_of(ours, tmp_path / "out", **ALWAYS), 0)) == {
        "qkv": "FactoredMethod",
        "o": "FactoredMethod",
        "gate_up": "DenseMethod",  # the gate is dense
        "down": "UnquantizedLinearMethod",
    }


def test_a_layer_runs_in_factors_if_all_its_sites_are_chosen(
    ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = tl.LaserSVD(rho=0.4, matrices=("q", "k", "v", "o", "gate", "in", "out"))
    folder(every, tmp_path / "out")
    wanted = {"0.q", "0.k", "0.v", "0.in", "0.out", "1.q", "1.v", "1.gate", "1.in"}
    choose_all = ours.choose_all

    def chosen(sites: Any, geometry_of: Any, policy: Any, dtype: Any, *, on_cpu: bool) -> Any:
        assert policy == "auto"
        assert on_cpu
        return [
            replace(choice, factored=choice.site.removeprefix("layers.") in wanted)
            for choice in choose_all(sites, geometry_of, policy, dtype, on_cpu=on_cpu)
        ]

    monkeypatch.setattr(ours, "choose_all", chosen)
    config = config_of(ours, tmp_path / "out")
    factored = [
        {name for name, kind in kinds_of(layers_of(config, n)).items() if kind == "FactoredMethod"}
        for n in range(2)
    ]
    assert factored == [{"qkv", "down"}, {"gate_up"}]


def test_auto_chooses_what_load_chooses(ours: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
    out = tmp_path / "out"
    folder(tl.LaserSVD(rho=0.3, matrices=("q", "v", "in", "out")), out, **sizes)
    wanted = {choice.site for choice in choices_of(tl.load(out, policy="auto")) if choice.factored}
    assert wanted == {f"layers.{n}.{role}" for n in range(2) for role in ("in", "out")}
    config = config_of(ours, out)
    config.get_quant_method(stand_in.LinearBase.__new__(stand_in.LinearBase), "lm_head")
    assert config._chosen == wanted


def test_elsewhere_than_on_a_cpu_auto_is_always(
    ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(METHODS["shared Tucker and one FFN matrix"], tmp_path / "out")
    assert kinds_of(layers_of(config_of(ours, tmp_path / "out"), 0))["qkv"] == "DenseMethod"
    monkeypatch.setattr(stand_in.CURRENT.device_config, "device_type", "cuda")
    assert kinds_of(layers_of(config_of(ours, tmp_path / "out"), 0))["qkv"] == "FactoredMethod"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "allways"}, "policy must be one of auto, always, got 'allways'. Did you mean"),
        ({"policy": 1}, "policy must be one of auto, always, got '1'"),
        ({"polcy": "always"}, "quantization_config must be one of .*, got 'polcy'. Did you mean"),
    ],
)
def test_unknown_settings_are_refused(
    given: dict[str, Any], message: str, ours: Any, tmp_path: Path
) -> None:
    folder(METHODS["one of three"], tmp_path / "out")
    with pytest.raises(UserError, match=message):
        config_of(ours, tmp_path / "out", **given)


def test_a_graph_is_reused_only_for_the_same_factors_and_choice(ours: Any, tmp_path: Path) -> None:
    """vLLM knows a compiled graph by a hash of its config, which has no more of the folder."""
    hashed, marks = stand_in.CURRENT.model_config.hf_config, []
    for rho, policy in ((0.5, "always"), (0.5, "always"), (0.3, "always"), (0.3, "auto")):
        folder(tl.LaserSVD(rho=rho, matrices=("o",)), tmp_path / "out")
        layers_of(config_of(ours, tmp_path / "out", policy=policy), 0)
        marks.append(hashed.tensorllm_mark)
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_other_layers_and_folders(ours: Any, tmp_path: Path) -> None:
    folder(METHODS["one of three"], tmp_path / "out")
    config = config_of(ours, tmp_path / "out")
    assert config.get_quant_method(nn.Embedding(3, 4), "model.embed_tokens") is None
    assert config.get_supported_act_dtypes() == [torch.float32, torch.bfloat16, torch.float16]
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    for place in (tmp_path / "dense", "someone/absent"):
        with pytest.raises(UserError, match="is no factored folder on this machine"):
            type(config)().maybe_update_config(str(place))


def test_vllm_finds_the_entry_point() -> None:
    points = distribution("tensorllm").entry_points
    values = [point.value for point in points if point.group == "vllm.general_plugins"]
    assert values == ["tensorllm.checkpoint.vllm:register"]


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_vllm_itself_loads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own config, model and loader, linear by linear; its attention needs its kernels."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: its model and loader are not run")
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    if not vllm.platforms.current_platform.device_type:  # a build for GPUs, where there is none
        monkeypatch.setattr(vllm.platforms, "_current_platform", CpuPlatform())
    if not torch.accelerator.is_available():  # vLLM's worker for CPUs does the same
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    folder(METHODS["shared Tucker and one FFN matrix"], tmp_path / "out")
    tl.load(tmp_path / "out").save_pretrained(tmp_path / "dense")
    models = []
    for name in ("dense", "out"):
        settings = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
        if name == "out":
            settings["hf_overrides"] = {
                "quantization_config": {"quant_method": "tensorllm", "policy": "always"}
            }
        config = EngineArgs(str(tmp_path / name), **settings).create_engine_config()
        hashed = config.compute_hash()
        with set_current_vllm_config(config):
            if not models:
                init_distributed_environment(1, 0, "tcp://127.0.0.1:29527", 0, "gloo")
                initialize_model_parallel(1)
            models.append(get_model(vllm_config=config))
        assert (config.compute_hash() != hashed) == (name == "out")  # has our mark by now
    dense, ours = models
    linears = {name: m for name, m in dense.named_modules() if isinstance(m, LinearBase)}
    assert len(linears) == 8
    found = dict(ours.named_modules())
    for name, linear in linears.items():
        x = INNER if name.endswith("down_proj") else X
        torch.testing.assert_close(found[name](x)[0], linear(x)[0], rtol=1e-4, atol=1e-5)
    kinds = {type(found[name].quant_method).__name__ for name in linears}
    assert kinds == {"FactoredMethod", "DenseMethod", "UnquantizedLinearMethod"}
    plain = {name: p for name, p in dense.named_parameters() if "norm" in name or "emb" in name}
    assert plain
    assert all(torch.equal(dict(ours.named_parameters())[n], plain[n]) for n in plain)
