"""Write a checkpoint of a real architecture's sizes with random weights, shard by shard.

    python scripts/make_random_checkpoint.py big/ --layers 28 --width 4096 --heads 16

The default is GPT-J: 28 layers, 6B parameters, bfloat16, 12 GB. For trying what memory and time
compression takes; the weights mean nothing.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTJConfig


def main() -> None:
    args = parse()
    config = GPTJConfig(n_embd=args.width, n_layer=args.layers, n_head=args.heads)
    config.architectures, config.dtype = ["GPTJForCausalLM"], torch.bfloat16
    args.folder.mkdir(parents=True)
    config.save_pretrained(args.folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    generator = torch.Generator().manual_seed(args.seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards(shapes, args.shard_bytes), 1):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: random_like(shapes[name], generator) for name in names}
        save_file(tensors, args.folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {len(names)} tensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shards(shapes: dict[str, torch.Tensor], limit: int) -> Iterator[list[str]]:
    """Names in their order, cut where a shard would grow past `limit` bytes."""
    names: list[str] = []
    held = 0
    for name, tensor in shapes.items():
        if names and held + 2 * tensor.numel() > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += 2 * tensor.numel()
    yield names


def random_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal weights of standard deviation 0.02; a float32 normal takes twice as long."""
    return torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=2**31)
    return parser.parse_args()


if __name__ == "__main__":
    main()
