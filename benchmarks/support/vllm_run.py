"""One model under vLLM, run by vLLM's own Python: its texts and its speed, as a line of JSON.

    VLLM_PYTHON vllm_run.py FOLDER '{"dtype": "bfloat16", ...}'

Imports nothing of this project: vLLM finds it by its entry point, if it is installed there.
"""

import json
import random
import sys
import time
from statistics import median
from typing import Any

from vllm import LLM, SamplingParams


def drawn(batch: int, length: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    """Random prompts, as vLLM's cache must know none of them."""
    draws = random.Random(seed)
    return [
        {"prompt_token_ids": [draws.randrange(vocabulary) for _ in range(length)]}
        for _ in range(batch)
    ]


def main(folder: str, wanted: dict[str, Any]) -> None:
    decoded: int = wanted["decoded"]
    method = {"quant_method": "tensorllm", "policy": wanted["policy"]}
    model = LLM(
        folder,
        dtype=wanted["dtype"],
        max_model_len=1024,
        enforce_eager=wanted["eager"],
        gpu_memory_utilization=0.3,  # of all memory, on a CPU too
        hf_overrides={"quantization_config": method} if wanted["policy"] else {},
    )

    def run(prompts: Any, tokens: int) -> Any:
        asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return model.generate(prompts, asked, use_tqdm=False)

    texts = [found.outputs[0].text for found in run(wanted["prompts"], wanted["text"])]
    vocabulary = len(model.get_tokenizer())
    speeds = {}
    for batch, length in wanted["batches"]:
        prompt_s, decode_s = [], []
        for turn in range(wanted["turns"]):
            started = time.perf_counter()
            run(drawn(batch, length, vocabulary, 2 * turn), 1)
            prompt_s.append(time.perf_counter() - started)
            started = time.perf_counter()
            run(drawn(batch, length, vocabulary, 2 * turn + 1), 1 + decoded)
            decode_s.append(time.perf_counter() - started - prompt_s[-1])
        speeds[batch] = {
            "prompt": batch * length / median(prompt_s),
            "decode": batch * decoded / median(decode_s),
        }
    print(json.dumps({"texts": texts, "speeds": speeds}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
