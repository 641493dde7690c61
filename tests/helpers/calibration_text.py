"""Random calibration sets, and how far two models are apart on one."""

import torch
from torch import Tensor

from tensorllm.calibration import Calibration


def text(seed: int = 0, count: int = 24, vocabulary: int = 101) -> Calibration:
    """`count` sequences of 5 to 19 tokens each."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 20, (count,), generator=draws).tolist()
    drawn = [torch.randint(3, vocabulary, (n,), generator=draws).tolist() for n in lengths]
    return Calibration(tuple(map(tuple, drawn)), source="random", seed=seed)


@torch.no_grad()
def logits(model, calibration: Calibration) -> Tensor:
    """(N, V): of all tokens, padding left out."""
    found = [
        model(b.ids_BT, attention_mask=b.mask_BT.long())[0][b.mask_BT]
        for b in calibration.batches(64)
    ]
    return torch.cat(found)


def distance(model, other, calibration: Calibration) -> float:
    """KL divergence of `other` from `model`, in nats per token."""
    p, q = (logits(m, calibration).double().log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def long_text(count: int = 60) -> Calibration:
    """Sequences of 60 tokens; some seventeen are a batch."""
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 101, (count, 60), generator=draws).tolist()
    return Calibration(tuple(map(tuple, rows)), source="random", seed=0)
