"""What machines do per second: one measured by benchmarks/scaling.py, two that are assumed."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from support.counts import Sizes, eigen_sizes, necessary_multiply_adds
from support.scaling_tensors import SHARES, K, ranks_at

ROOT = Path(__file__).parents[1]

# The assumptions that docs/scaling.md shows: a server, and a node of GPUs (NVIDIA's data sheet).
CORES, CORE_SHARE, EIGEN_SPEEDUP = 64, 0.7, 4.0
DISK_READ, DISK_WRITE, MEMORY, PCIE = 5e9, 3e9, 400e9, 50e9  # bytes per second
GPU, GPU_BF16, GPU_FLOAT32 = "H200", 989e12, 67e12  # flop per second at peak
GPU_SHARE, GPU_EIGEN = 0.4, 0.05  # of the peak: large products; 9 n^3 flop of eigenvectors
ORDER = 4096  # of the eigenproblem that times are stated for
WIDE = 2048  # from this width on a layer's time says how fast decompositions are


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine does per second. MACs are multiply-adds.

    Attributes:
        macs: of large matrix products on the processor, by dtype.
        bandwidth: bytes of memory; `moved` those between where products and sums are.
        eigen_s: seconds of an eigenproblem of order 4096 on the processor, by dtype.
        share: of the speed of products, which decompositions reach on the processor.
        forward: the same of a forward pass.
        gpu: whether there are GPUs; one works at a time, layer after layer.
    """

    name: str
    cores: int
    macs: dict[str, float]
    read: float
    write: float
    hashed: float
    moved: float
    eigen_s: dict[str, float]
    share: float = 1.0
    forward: float = 1.0
    gpu: bool = False

    def eigen(self, orders: Iterable[int], dtype: str = "float64") -> float:
        """Seconds for eigenvectors, cubic in the order."""
        return sum(self.eigen_s[dtype] * (n / ORDER) ** 3 for n in orders)

    def decompose(self, sizes: Sizes, share: str) -> tuple[float, float]:
        """Seconds of one layer's products and of its eigenvectors."""
        ranks = ranks_at(share, *sizes[:3])
        macs, orders = necessary_multiply_adds(sizes, ranks, 1), eigen_sizes(sizes, ranks, 1)
        if self.gpu:
            flop = sum(9.0 * n**3 for n in orders)
            return 2 * macs / (GPU_SHARE * GPU_FLOAT32), flop / (GPU_EIGEN * GPU_FLOAT32)
        return macs / (self.share * self.macs["float32"]), self.eigen(orders, "float32")

    def passes(self, macs: float) -> float:
        """Seconds of forward passes, in bfloat16 where there is a GPU."""
        if self.gpu:
            return 2 * macs / (GPU_SHARE * GPU_BF16)
        return macs / (self.forward * self.macs["float32"])

    def products(self, macs: float, dtype: str) -> float:
        """Seconds of products beside a pass; float64 is as fast as float32 on that GPU."""
        return 2 * macs / (GPU_SHARE * GPU_FLOAT32) if self.gpu else macs / self.macs[dtype]


@cache
def results(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def scaling() -> Any:
    """The curves, by their parts."""
    return results("scaling")


def last(part: str, name: str) -> tuple[float, float]:
    """The largest size of a curve, and its seconds."""
    size, seconds = scaling()[part]["curves"][name]["points"][-1]
    return size, seconds


def measured_layers() -> list[tuple[str, Sizes, str, float]]:
    """The wide layers that scaling.py timed: name, sizes, ranks, seconds."""
    out = []
    for share in SHARES:
        curve = scaling()["decompose"]["curves"][f"one layer, {share} ranks, over width"]
        for width, seconds in curve["points"]:
            if width >= WIDE:
                d = round(width)
                out.append((f"width {d:,}, {share} ranks", (d, K, 4, d // K), share, seconds))
    return out


@cache
def machines() -> list[Machine]:
    """The one that was measured, a server, and a node of GPUs."""
    rates = scaling()["machine"]["curves"]["rates"]
    disk = results("load_save")["12 x 2048"]
    eigen_s = {}
    for dtype in ("float32", "float64"):
        n, seconds = last("eigenvectors", f"eigenvectors, {dtype}")
        eigen_s[dtype] = seconds * (ORDER / n) ** 3
    here = Machine(
        name=f"{scaling()['machine']['threads']} cores",
        cores=scaling()["machine"]["threads"],
        macs={dtype: rates[f"multiply_adds_{dtype}"] for dtype in eigen_s},
        read=disk["bytes"]["dense"] / disk["seconds"]["read dense"],
        write=disk["bytes"]["dense"] / disk["seconds"]["copy and sync"],
        hashed=rates["bytes_hashed"],
        moved=rates["bytes_read"],
        eigen_s=eigen_s,
    )
    shares = [_share(here, *layer[1:]) for layer in measured_layers()]
    here = replace(here, share=min(shares), forward=_forward())
    more = CORES / scaling()["machine"]["threads"] * CORE_SHARE
    server = replace(
        here,
        name=f"{CORES} cores",
        cores=CORES,
        macs={dtype: more * macs for dtype, macs in here.macs.items()},
        read=DISK_READ,
        write=DISK_WRITE,
        moved=MEMORY,
        eigen_s={dtype: s / EIGEN_SPEEDUP for dtype, s in eigen_s.items()},
    )
    return [here, server, replace(server, name=f"{CORES} cores, 8 {GPU}", moved=PCIE, gpu=True)]


def _share(machine: Machine, sizes: Sizes, share: str, seconds: float) -> float:
    """Of the speed of products, what a measured layer came to once eigenvectors are taken off."""
    products, eigenvectors = machine.decompose(sizes, share)
    return products / max(seconds - eigenvectors, products)


def _forward() -> float:
    parameters, seconds = last("evaluate", "evaluate over parameters")
    part = scaling()["evaluate"]["curves"]["evaluate over parameters"]
    rate = scaling()["machine"]["curves"]["rates"]["multiply_adds_float32"]
    return min(1.0, parameters * part["prompt_tokens"] / seconds / rate)


def assumptions() -> dict[str, Any]:
    """What the page says of these machines."""
    here = machines()[0]
    return {
        "share": 100 * here.share,
        "forward": 100 * here.forward,
        "cores": CORES,
        "core_share": 100 * CORE_SHARE,
        "eigen_speedup": EIGEN_SPEEDUP,
        "gpu": GPU,
        "gpu_bf16": GPU_BF16 / 1e12,
        "gpu_float32": GPU_FLOAT32 / 1e12,
        "gpu_share": 100 * GPU_SHARE,
        "gpu_eigen": 100 * GPU_EIGEN,
        "read": DISK_READ / 1e9,
        "write": DISK_WRITE / 1e9,
        "memory": MEMORY / 1e9,
        "pcie": PCIE / 1e9,
    }
