"""What a fit to text costs beside the forward passes that it cannot do without, and how that grows.

    python benchmarks/scaling_fit.py --parts widths layer
    python benchmarks/scaling_fit.py --parts model --model SmolLM2-135M-Instruct/ --epochs 0 4

Parts of docs/results/scaling_fit.json: *widths*, one random LLaMA layer of 512 to 4,096 on
4,096 tokens with fitted exponents; *layer*, one of LLaMA-2-7B's size on 16,384 tokens; *model*, a
real model as a whole on 32,768 tokens; *first*, its first three layers on 8,192. Each is
`activation-hybrid` at ratio 1.25, measured in a process of its own. Times are processor seconds of
all threads (the machine is shared), also as multiples of two forward passes of these layers over
the same tokens: the original's and the compressed model's. Memory is the peak of the process's
resident bytes, imports and model included. `time_left` is what the progress said was left, over
what was left, at each per cent of the time.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.curves import fit as power_law
from support.results import Comparison, begin, parser, save
from torch import nn

from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.layers import InMemory, Layers
from tensorllm.compression.publish import peak_resident_bytes
from tensorllm.compressors import ActivationHybrid

VOCABULARY, LENGTH, RATIO = 1024, 512, 1.25
WITHOUT, WITH = 3.0, 10.0  # times two forward passes that a fit may cost, without refit and with
GIB = 2**30
FIRST = 3  # layers of a real model that are measured where there is no time for all


def random_layer(width: int) -> nn.Module:
    """One LLaMA layer with LLaMA-2-7B's proportions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11008 // 4096,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 128),
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def model_of(what: str) -> nn.Module:
    """A random layer by its width, a folder's model, or after a colon its first layers."""
    if what.isdigit():
        return random_layer(int(what))
    from transformers import AutoModelForCausalLM

    folder, _, first = what.partition(":")
    fewer = {"num_hidden_layers": int(first)} if first else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **fewer)
    return model.eval()


class Said:
    """The time left that progress says, to be compared with the truth afterwards."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.reported: list[tuple[float, float]] = []  # seconds, share

    def __call__(self, done: int, total: int, what: str) -> None:
        self.reported.append((time.perf_counter() - self.start, done / total))

    def over_truth(self) -> dict[str, float]:
        """By per cent of the whole time, from the second on: what was said over what was true."""
        whole = time.perf_counter() - self.start
        out = {}
        for per_cent in range(2, 100):
            now = whole * per_cent / 100
            at, share = max((one for one in self.reported if one[0] <= now), default=(0.0, 0.0))
            if share:
                left = at * (1 - share) / share - (now - at)
                out[str(per_cent)] = left / (whole - now)
        return out


def child(what: str, tokens: int, epochs: int) -> dict[str, Any]:
    """Processor seconds of one forward pass through the layers and of the fit; peak bytes."""
    base = peak_resident_bytes()
    model = model_of(what)
    draws = torch.Generator().manual_seed(0)
    rows = max(1, tokens // LENGTH)
    drawn = torch.randint(VOCABULARY, (rows, min(tokens, LENGTH)), generator=draws)
    text = Calibration(tuple(map(tuple, drawn.tolist())), source="random")
    source = InMemory(model)
    layers = Layers(source, text.batches(4096), source.roles.layers)
    states, started = layers.start, time.process_time()
    for number in range(layers.layers):
        states = list(
            layers.run(number, model.get_submodule(source.roles.layer_path(number)), states)
        )
    forward = time.process_time() - started
    del layers, states
    wanted = ActivationHybrid(target_ratio=RATIO, refit_epochs=epochs)
    said = Said()
    started, clock = time.process_time(), time.perf_counter()
    fit(wanted, model, text, progress=said)
    seconds = time.process_time() - started
    return {
        "time_left": said.over_truth(),
        "forward_cpu_s": forward,
        "fit_cpu_s": seconds,
        "fit_wall_s": time.perf_counter() - clock,
        "times_two_forward_passes": seconds / (2 * forward),
        "imports_bytes": base,
        "peak_bytes": peak_resident_bytes(),
        "tokens": tokens,
        "refit_epochs": epochs,
    }


def measured(what: str, tokens: int, epochs: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same from a process of its own."""
    options = ["--child", what, str(tokens), str(epochs), "--threads", str(args.threads)]
    run = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    shown = {k: round(v, 2) for k, v in found.items() if not isinstance(v, dict)}
    print(what, shown, flush=True)
    return found


def compared(found: dict[str, Any], memory: float | None) -> dict[str, Comparison]:
    """The two promises: time in multiples of the forward passes, and memory."""
    limit = WITH if found["refit_epochs"] else WITHOUT
    kind = "with refit" if found["refit_epochs"] else "without refit"
    out = {
        f"time, {kind}": Comparison(
            ours=found["times_two_forward_passes"], unit="times two forward passes", peer=limit,
            peer_name="allowed",
        )
    }  # fmt: skip
    if memory is not None:
        out[f"peak resident memory, {kind}"] = Comparison(
            ours=found["peak_bytes"] / GIB, unit="GiB", peer=memory, peer_name="allowed"
        )
    return out


def widths(args: argparse.Namespace) -> None:
    """How time grows with the width, tokens fixed."""
    sizes, tokens = ((64, 128), 512) if args.quick else ((512, 1024, 2048, 4096), 4096)
    rows = {width: measured(str(width), tokens, 0, args) for width in sizes}
    curves = {
        name: power_law([[width, row[key]] for width, row in rows.items()])
        for name, key in (("fit", "fit_cpu_s"), ("forward", "forward_cpu_s"))
    }
    largest = rows[sizes[-1]]
    shown = {f"width {sizes[-1]:,}, {tokens:,} tokens": Comparison(
        ours=largest["times_two_forward_passes"], unit="times two forward passes"
    )}  # fmt: skip
    save("scaling_fit", "widths", shown, args, rows=rows, curves=curves)


def layer(args: argparse.Namespace) -> None:
    """One layer of LLaMA-2-7B's size."""
    width, tokens = (64, 512) if args.quick else (4096, 16384)
    side_by_side("layer", str(width), tokens, 12.0, args)


def model(args: argparse.Namespace) -> None:
    """A real model as a whole."""
    if args.model is None:
        sys.exit("give --model FOLDER")
    side_by_side("model", str(args.model), 32768, 2.5, args)


def first(args: argparse.Namespace) -> None:
    """A real model's first layers, where there is no time for the whole."""
    if args.model is None:
        sys.exit("give --model FOLDER")
    side_by_side(f"first {FIRST} layers", f"{args.model}:{FIRST}", 8192, None, args)


def side_by_side(
    part: str, what: str, tokens: int, memory: float | None, args: argparse.Namespace
) -> None:
    """A fit with each number of epochs of the refit, in parts of its own beside each other."""
    for epochs in args.epochs:
        found = measured(what, args.tokens or tokens, epochs, args)
        name = f"{part}, {epochs} refit epochs" if epochs else part
        save("scaling_fit", name, compared(found, memory), args, **found)


PARTS = {"widths": widths, "layer": layer, "model": model, "first": first}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=["widths", "layer"])
    options.add_argument("--model", type=Path, help="folder of the model of `model` and `first`")
    options.add_argument("--epochs", type=int, nargs="+", default=[0], help="of the refit")
    options.add_argument("--tokens", type=int, help="of all parts but widths")
    options.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = options.parse_args()
    begin(args)
    if args.child:
        what, tokens, epochs = args.child
        print(json.dumps(child(what, int(tokens), int(epochs))))
        return
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    main()
