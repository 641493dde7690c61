"""The road to llama.cpp, end to end: convert an exported folder and compare the greedy text.

Needs llama.cpp's `convert_hf_to_gguf.py` with its `gguf-py` and `pip install xllamacpp` (llama.cpp
as a wheel); none of them is a dependency. Prints one JSON document; exit code 1 where a text
differs.

    python scripts/try_llama_cpp.py dense/ --converter llama.cpp/convert_hf_to_gguf.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tensorllm.commands.generate import generate
from tensorllm.environment import environment
from tensorllm.requests.others import GenerateRequest

PROMPTS = ("Once upon a time", "The history of tea", "Water boils when", "def fibonacci(n):")


def convert(folder: Path, converter: Path, out: Path) -> None:
    """A GGUF file of the folder, in float32: rounding must not decide between near words."""
    path = os.pathsep.join([str(converter.parent / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(converter), str(folder), "--outtype", "f32"]
    subprocess.run(
        [*command, "--outfile", str(out)], env={**os.environ, "PYTHONPATH": path}, check=True
    )


def llama_cpp(file: Path, tokens: int) -> list[str]:
    """What llama.cpp writes behind each prompt, always the likeliest token."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(file), 512, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    asked: dict[str, Any] = {"max_tokens": tokens, "temperature": 0}
    answers = [server.handle_completions({"prompt": prompt, **asked}) for prompt in PROMPTS]
    return [
        prompt + each["choices"][0]["text"] for prompt, each in zip(PROMPTS, answers, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an ordinary checkpoint")
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        convert(options.folder, options.converter, file)
        converted, size = llama_cpp(file, options.tokens), file.stat().st_size
    request = GenerateRequest(
        model=str(options.folder), prompts=PROMPTS, max_new_tokens=options.tokens, dtype="fp32"
    )
    ours = generate(request)
    rows = [
        {"llama.cpp": a, "transformers": b, "same": a == b}
        for a, b in zip(converted, ours, strict=True)
    ]
    print(json.dumps({"texts": rows, "gguf_bytes": size, "environment": environment()}, indent=2))
    sys.exit(not all(row["same"] for row in rows))


if __name__ == "__main__":
    main()
