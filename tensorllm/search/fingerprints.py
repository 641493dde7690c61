"""Short hashes that identify a study's model and examples, the same on every machine."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from tensorllm.data.example import Example

SAMPLES = 512  # values of each parameter that are hashed


def model_fingerprint(model: nn.Module) -> str:
    """A hash of all parameters' names, shapes and types, and of evenly spaced values of each."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        flat = p.data.reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLES)].to(torch.float32).cpu()
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """A hash of prompts, answers, choices and their order."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(repr((e.prompt, e.answer, e.choices, e.index, e.tokens)).encode())
    return digest.hexdigest()[:16]
