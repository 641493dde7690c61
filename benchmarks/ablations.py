"""What was tried of the fit, one choice at a time: held-out KL divergence from the original model.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --model SmolLM2-first-3/ --text wikitext2_test.raw --quantity 16

Parts of docs/results/ablations.json, named after the model's folder and the refit.
`activation-hybrid` is fitted to sequences from the first 60 % of the text and scored on others from
its last 40 %: nats per token of KL(original || compressed), and of the next token's loss. Every
choice is a wrapper round the strategy or a setting of it; all else, the numbers stored included,
stays the same:

- *rank multiple*: ranks are multiples of it;
- *least rank*: no matrix has less than this share of its full rank;
- *depth*: errors of a layer cost more by a power of its depth, the best of a few by the KL of 8
  sequences of the calibration text (LEMS tunes such a multiplier so);
- *better start*: each layer is refitted from the correction and from the fit without it, and the
  nearer result is kept;
- *ridge*: the pull of the correction towards no correction, 0.01 as it is;
- *without* a switch of the strategy (`SWITCHES`): shared input factors, channels of an FFN, the
  correction, and what errors cost by the gradients alone or by their mean square alone.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from support.results import RESULTS, Comparison, begin, parser, real, save
from torch import nn

from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.context import Context
from tensorllm.calibration.smallest import with_factors
from tensorllm.compressors import ActivationHybrid
from tensorllm.compressors.base import ErrorCurve, LayerFit, Leaf
from tensorllm.compressors.layer import LayerContext, LayerResult, Site
from tensorllm.compressors.wrapped import Wrapped, WrappedFit
from tensorllm.models import RoleMatrices, parameters_of

HELD, TUNED = 48, 8  # sequences that are scored, and that a multiplier is tuned on
POWERS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of depth: the last layer's errors cost e^power the first's
SHARES = (0.1, 0.2, 0.3)
RIDGES = (0.1, 1.0)
CHOICES = ("switches", "multiple", "ridge", "floor", "depth", "start")
SWITCHES: dict[str, dict[str, Any]] = {
    "without shared input factors": {"sharing": False},
    "without fewer channels": {"narrowing": False},
    "without correction": {"correction": False},
    "errors by the gradients alone": {"plain": 0.0},
    "errors by their mean square": {"plain": 1.0},
}
NO_CORRECTION = 1e9  # a ridge so strong that the correction is the identity


class LeastRank(WrappedFit):
    """No matrix with less than a share of its largest size, where it becomes smaller at all."""

    def __init__(self, inner: LayerFit, share: float) -> None:
        super().__init__(inner)
        self.share = share

    def curves(self, sites: Sequence[Site], context: LayerContext) -> Mapping[Site, ErrorCurve]:
        out = {}
        for site, curve in self.inner.curves(sites, context).items():
            enough = curve.sizes_NC[:, 0] >= self.share * float(curve.sizes_NC[:, 0].max())
            out[site] = ErrorCurve(*(t[enough] for t in curve))
        return out


class Deeper(WrappedFit):
    """Errors that cost more, or less, the deeper the layer."""

    def __init__(self, inner: LayerFit, power: float, layers: int) -> None:
        super().__init__(inner)
        self.power, self.layers = power, layers

    def curves(self, sites: Sequence[Site], context: LayerContext) -> Mapping[Site, ErrorCurve]:
        times = math.exp(self.power * context.layer / max(1, self.layers - 1))
        curves = self.inner.curves(sites, context).items()
        return {site: curve._replace(error_N=curve.error_N * times) for site, curve in curves}


class BetterStart(WrappedFit):
    """The nearer of two refits of a layer: from the correction, and from the fit without it."""

    chosen: list[str]

    def __init__(self, inner: LayerFit, other: LayerFit) -> None:
        super().__init__(inner)
        self.other, self.chosen = other, []

    def fit_layer(self, context: LayerContext) -> LayerResult:
        assert isinstance(context, Context), "the layer's module is set back"
        block = context.compressed.block
        before = copy.deepcopy(block.state_dict())
        first = self.inner.fit_layer(context)
        error = context.output_error()
        block.load_state_dict(before)
        context.replace_parameters({})  # nothing that was measured of the first fit holds
        second = self.other.fit_layer(context)
        if context.output_error() < error:
            self.chosen.append("without correction")
            return second
        self.chosen.append("correction")
        block.load_state_dict(before)
        context.replace_parameters({})
        for site, factors in first.factors.items():
            context.replace(site, factors)
        return first


@dataclass
class Bench:
    """The original with its predictions, and sequences of tokens."""

    model: nn.Module
    calibrated: Calibration
    tuned: Calibration
    held: Calibration

    @torch.no_grad()
    def score(self, smaller: nn.Module, text: Calibration) -> dict[str, float]:
        """KL(original || compressed) and the next token's loss, nats per token."""
        divergence, loss, tokens = 0.0, 0.0, 0
        for batch in text.batches():
            mask = batch.mask_BT
            p, q = (
                run(input_ids=batch.ids_BT, attention_mask=mask.long())
                .logits[:, :-1][mask[:, 1:]]
                .float()
                .log_softmax(-1)
                for run in (self.model, smaller)
            )
            divergence += float((p.exp() * (p - q)).sum())
            words = batch.ids_BT[:, 1:][mask[:, 1:]]
            loss += float(nn.functional.nll_loss(q, words, reduction="sum"))
            tokens += len(words)
        return {"kl": divergence / tokens, "loss": loss / tokens}

    def fitted(self, strategy: Any) -> nn.Module:
        found = fit(strategy, self.model, self.calibrated)
        roles = RoleMatrices(self.model.config, parameters_of(self.model))
        return with_factors(self.model, roles, {site: found.factors(site) for site in found.sites})


def documents(path: Path) -> list[str]:
    """The texts of a JSON file of them, or of a plain one by its paragraphs joined in pieces."""
    if path.suffix == ".json":
        rows = json.loads(path.read_text())
        return [row if isinstance(row, str) else next(iter(row.values())) for row in rows]
    lines, out, piece = path.read_text().split("\n"), [], ""
    for line in lines:
        piece += line + "\n"
        if len(piece) > 4000:
            out.append(piece)
            piece = ""
    return out


def bench(args: argparse.Namespace, seed: int) -> Bench:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = documents(args.text)
    cut = int(0.6 * len(texts))
    order = torch.randperm(cut, generator=torch.Generator().manual_seed(seed)).tolist()
    every = (
        texts[i] for i in [*order[: args.quantity], *range(cut, min(len(texts), cut + args.held))]
    )
    ids = [tuple(tokenizer(text)["input_ids"][: args.length]) for text in every]
    first, held = tuple(ids[: args.quantity]), tuple(ids[args.quantity :])
    return Bench(model, *(Calibration(part, source="benchmark", seed=seed)
                          for part in (first, first[:TUNED], held)))  # fmt: skip


def wrapped(strategy: ActivationHybrid, wrap: Callable[[LayerFit], LayerFit]) -> Wrapped:
    def only_fits(inner: Leaf | LayerFit) -> Leaf | LayerFit:
        assert isinstance(inner, LayerFit), "activation-hybrid fits layers"
        return wrap(inner)

    return Wrapped(strategy, only_fits)


def tried(
    here: Bench, ratio: float, epochs: int, choices: Sequence[str], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Held-out scores by choice, beside those that are known."""
    plain = ActivationHybrid(target_ratio=ratio, refit_epochs=epochs)
    out: dict[str, Any] = dict(known)

    def note(name: str, wanted: Any, **more: Any) -> nn.Module:
        smaller = here.fitted(wanted)
        out[name] = here.score(smaller, here.held) | more
        print(ratio, epochs, name, out[name], flush=True)
        return smaller

    settings = {} if "as it is" in known else {"as it is": {}}
    settings |= SWITCHES if "switches" in choices else {}
    if "multiple" in choices:
        settings |= {f"rank multiple {n}": {"rank_multiple": n} for n in (1, 4, 16)}
    if "ridge" in choices:
        settings |= {f"ridge {ridge:g}": {"ridge": ridge} for ridge in RIDGES}
    for name, setting in settings.items():
        note(name, replace(plain, **setting))
    if "floor" in choices:
        for share in SHARES:
            note(f"least rank {share}", wrapped(plain, lambda inner: LeastRank(inner, share)))  # noqa: B023
    if "depth" in choices:
        name, power = deepest(here, plain, note)
        out["depth, tuned"] = out[name] | {"power": power}
    if "start" in choices and epochs:
        far = replace(plain, ridge=NO_CORRECTION)
        made = BetterStart(plain, far)
        note("better start", wrapped(plain, lambda inner: made), chosen=made.chosen)
        note("start without correction", far)
    return out


def deepest(
    here: Bench, plain: ActivationHybrid, note: Callable[[str, Any], nn.Module]
) -> tuple[str, float]:
    """The name and the power of depth with the least KL on the sequences for that."""
    layers = RoleMatrices(here.model.config, parameters_of(here.model)).layers
    names = {0.0: "as it is"}
    on_text = {0.0: here.score(here.fitted(plain), here.tuned)["kl"]}
    for power in (power for power in POWERS if power):
        names[power] = f"depth, power {power}"
        deeper = wrapped(plain, lambda inner: Deeper(inner, power, layers))  # noqa: B023
        on_text[power] = here.score(note(names[power], deeper), here.tuned)["kl"]
    best = min(on_text, key=lambda power: on_text[power])
    return names[best], best


def earlier(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """What the results have of the same model, text and draws: other choices are added to it."""
    path = args.out or RESULTS / "ablations.json"
    if args.quick or not path.is_file():
        return {}
    found = json.loads(path.read_text()).get(part, {})
    same = all(found.get(name) == value for name, value in about(args).items())
    return dict(found["rows"]) if same else {}


def about(args: argparse.Namespace) -> dict[str, Any]:
    kept = ("quantity", "length", "held", "seeds")
    return {"text": args.text.name, **{name: getattr(args, name) for name in kept}}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder; tinystories-656K of --shared")
    options.add_argument("--text", type=Path, help=".json of texts, or plain text; its stories")
    options.add_argument("--quantity", type=int, default=64, help="sequences that are fitted to")
    options.add_argument("--held", type=int, default=HELD, help="sequences that are scored")
    options.add_argument("--length", type=int, default=512, help="tokens of a sequence, at most")
    options.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.5])
    options.add_argument("--epochs", type=int, nargs="+", default=[0, 4])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES)
    args = options.parse_args()
    begin(args)
    args.model = args.model or real(args, "models/tinystories-656K")
    args.text = args.text or real(args, "data/tinystories_1000.json")
    if args.quick:
        args.quantity, args.length, args.ratios, args.epochs, args.seeds = 8, 64, [2.0], [1], [0]
        args.choices = ["switches", "floor", "start"]
    for epochs in args.epochs:
        part = f"{args.model.name}, {epochs} refit epochs"
        rows = earlier(args, part)
        shown: dict[str, Comparison] = {}
        for ratio in args.ratios:
            known = rows.get(f"{ratio:g}", {})
            draws = [
                tried(
                    bench(args, seed), ratio, epochs, args.choices,
                    {name: found[at] for name, found in known.items()},
                )
                for at, seed in enumerate(args.seeds)
            ]  # fmt: skip
            rows[f"{ratio:g}"] = {name: [draw[name] for draw in draws] for name in draws[0]}
            kl = {name: fmean(d["kl"] for d in found) for name, found in rows[f"{ratio:g}"].items()}
            for name, value in kl.items():
                if name != "as it is":
                    shown[f"ratio {ratio:g}: {name}"] = Comparison(
                        ours=value, unit="nats of KL", peer=kl["as it is"], peer_name="as it is"
                    )
            save("ablations", part, shown, args, rows=rows, **about(args))


if __name__ == "__main__":
    main()
