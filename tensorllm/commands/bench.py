"""`tensorllm bench`: a factored folder beside the dense model that it represents."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tensorllm.checkpoint.loader import device_of, dtype_of
from tensorllm.checkpoint.loading import How, choices_of, load, predicted_of
from tensorllm.checkpoint.manifest import factored_manifest
from tensorllm.compression.publish import peak_resident_bytes
from tensorllm.environment import environment
from tensorllm.errors import Incomplete, UserError
from tensorllm.models.task import context_length
from tensorllm.progress import Progress, quiet
from tensorllm.registry import load_plugins, one_of
from tensorllm.requests.others import BenchRequest
from tensorllm.runtime.cost import Cache, Choice, Policy
from tensorllm.runtime.measure import Measured, measure

KINDS = ("dense", "factored")
PROMPT, NEW = 512, 32  # tokens, if the model's context allows


@dataclass(frozen=True, slots=True)
class Bench:
    """Both models' figures, how every site ran, and the environment."""

    models: dict[str, Measured]
    choices: list[Choice]
    predicted: tuple[float, float] | None
    prompt_tokens: int
    new_tokens: int
    repeats: int
    environment: dict[str, Any]
    model: str
    compressor: dict[str, Any]

    def ratios(self) -> dict[str, float]:
        """Dense over factored for bytes, factored over dense for speed: above 1 is better."""
        dense, small = self.models["dense"], self.models["factored"]
        out = {
            "prefill": small.prefill_tokens_per_second / dense.prefill_tokens_per_second,
            "weights": dense.weight_bytes / small.weight_bytes,
        }
        if dense.decode_tokens_per_second and small.decode_tokens_per_second:
            out["decode"] = small.decode_tokens_per_second / dense.decode_tokens_per_second
            out["keys"] = dense.key_bytes / small.key_bytes
            out["values"] = dense.value_bytes / small.value_bytes
        if dense.peak_bytes and small.peak_bytes:
            out["peak"] = dense.peak_bytes / small.peak_bytes
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "compressor": self.compressor,
            "models": {name: measured.to_json() for name, measured in self.models.items()},
            "ratios": self.ratios(),
            "predicted": dict(zip(("prefill", "decode"), self.predicted or (), strict=False)),
            "sites": [{"site": c.site, "factored": c.factored, "why": c.why} for c in self.choices],
            **{name: getattr(self, name) for name in ("prompt_tokens", "new_tokens", "repeats")},
            "environment": self.environment,
        }


def bench(request: BenchRequest, progress: Progress = quiet) -> Bench:
    """Measure a factored folder, as factors and as a dense model, alternately in one process.

    Args:
        request: the folder, and what is measured.
        progress: called with (rounds done, rounds in all, what is timed), then with (models done,
            models in all, that it is their memory).

    Raises:
        UserError: not a factored folder, or invalid numbers.
        Incomplete: a process that measures memory died.
    """
    for name in ("prompt_tokens", "new_tokens", "repeats"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")
    one_of("--policy", request.policy, get_args(Policy))
    one_of("--cache", request.cache, get_args(Cache))
    load_plugins(request.plugins)
    manifest = factored_manifest(request.model)
    if manifest is None:
        raise UserError(f"{request.model} is not factored; there is nothing to compare")
    request = replace(request, device=device_of(request.device))
    dense, factored = _load(request, "dense"), _load(request, request.policy)
    choices, predicted = choices_of(factored), predicted_of(factored, request.model)
    prompt, new = _lengths(request, context_length(dense.config))
    models = {"dense": dense, "factored": factored}
    found = measure(models, prompt, new, request.repeats, progress=progress)
    if request.peak and request.device == "cpu":
        del dense, factored, models
        for done, (kind, one) in enumerate(list(found.items())):
            progress(done, len(found), f"memory, {kind}")
            found[kind] = replace(one, peak_bytes=_peak(request, kind, prompt, new))
    return Bench(
        found,
        choices,
        predicted,
        prompt,
        new,
        request.repeats,
        environment(),
        str(manifest.source.get("model")),
        manifest.compressor,
    )


def _lengths(request: BenchRequest, limit: int | None) -> tuple[int, int]:
    """Numbers of prompt tokens and new tokens, which must fit the model's context together."""
    prompt, new = request.prompt_tokens, request.new_tokens
    if new is None:
        new = NEW if limit is None else min(NEW, limit // 4)
    if prompt is None:
        prompt = PROMPT if limit is None else max(1, min(PROMPT, limit - new))
    if limit is not None and prompt + new > limit:
        raise UserError(f"prompt and new tokens must fit the model's {limit}, got {prompt + new}")
    return prompt, new


def _load(request: BenchRequest, how: How) -> Any:
    model = load(request.model, policy=how, cache=request.cache, dtype=dtype_of(request.dtype))
    return model.to(request.device).eval()


def _peak(request: BenchRequest, kind: str, prompt: int, new: int) -> int:
    """Peak resident bytes of a fresh process that loads one model and runs it once."""
    values = [str(request.model), kind, request.policy, request.cache, str(request.dtype or "")]
    sizes = [str(prompt), str(new)]
    run = subprocess.run(
        [sys.executable, "-m", "tensorllm.commands.bench", *values, *sizes, *request.plugins],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        said = run.stderr.strip().splitlines() or ["killed; is there memory for both models?"]
        raise Incomplete(f"measuring the memory failed (exit code {run.returncode}): {said[-1]}")
    return int(json.loads(run.stdout.splitlines()[-1]))


def _main(
    model: str, kind: str, policy: Any, cache: Any, dtype: str, prompt: str, new: str, *plugins: str
) -> None:
    load_plugins(plugins)
    request = BenchRequest(model=Path(model), policy=policy, cache=cache, dtype=dtype or None)
    made = _load(request, policy if kind == "factored" else "dense")
    measure({kind: made}, int(prompt), int(new), 1)
    sys.stdout.write(f"{peak_resident_bytes()}\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
