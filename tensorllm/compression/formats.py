"""The formats of a compressed model: one list for commands, reports and cards.

`compress` writes three of them itself; `export` makes the others, and also two of those, from a
finished folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tensorllm.errors import UserError
from tensorllm.registry import one_of

Format = Literal["dense", "factored", "narrow"]  # what `compress` writes
TRANSFORMERS = (
    "from transformers import {auto}, AutoTokenizer\n\n"
    'model = {auto}.from_pretrained("this folder or repository")\n'
    'tokenizer = AutoTokenizer.from_pretrained("this folder or repository")'
)
GRAPH = (
    "from transformers import AutoTokenizer\n\n"
    'tokenizer = AutoTokenizer.from_pretrained("this folder")\n'
    'given = tokenizer("Once upon a time", return_tensors="{arrays}")\n'
    'inputs = {{name: given[name] for name in ("input_ids", "attention_mask")}}\n'
)


@dataclass(frozen=True, slots=True)
class Written:
    """One format.

    Attributes:
        library: the hub's name for the library that opens it.
        how: a card's sentence before the code.
        code: opens it; `{auto}` is the class of transformers.
        by_compress: whether `compress` writes it; else `export` does, from a factored folder.
        by_export: whether `export` writes it.
        also: a card's sentence after the code.
    """

    library: str
    how: str
    code: str
    by_compress: bool = False
    by_export: bool = True
    also: str = ""


FORMATS = {
    "dense": Written(
        "transformers",
        "An ordinary checkpoint; every tool that reads the original reads it:",
        TRANSFORMERS,
        by_compress=True,
    ),
    "factored": Written(
        "tensorllm",
        "The compressed matrices are stored as their factors, and run as such:",
        "import tensorllm  # teaches transformers this format\n" + TRANSFORMERS,
        by_compress=True,
        by_export=False,
        also="`tensorllm export THIS_FOLDER DENSE` writes an ordinary checkpoint.",
    ),
    "narrow": Written(
        "transformers",
        "An ordinary checkpoint whose FFNs are less wide; every tool that reads the original's "
        "architecture reads it:",
        TRANSFORMERS,
        by_compress=True,
    ),
    "onnx": Written(
        "onnx",
        "A graph from `input_ids` and `attention_mask` to `logits`, whose weights are the factors; "
        "onnxruntime runs it:",
        "import onnxruntime\n"
        + GRAPH.format(arrays="np")
        + 'session = onnxruntime.InferenceSession("this folder/model.onnx")\n'
        '(logits,) = session.run(["logits"], inputs)',
    ),
    "exported-program": Written(
        "pytorch",
        "A graph from `input_ids` and `attention_mask` to `logits`, whose weights are the factors; "
        "plain torch runs it:",
        "import torch\n"
        + GRAPH.format(arrays="pt")
        + 'model = torch.export.load("this folder/model.pt2").module()\n'
        "logits = model(**inputs)",
    ),
}
COMPRESSED = tuple(name for name, one in FORMATS.items() if one.by_compress)
EXPORTED = tuple(name for name, one in FORMATS.items() if one.by_export)
# What another tool makes of an ordinary checkpoint, and how.
ELSEWHERE = {
    "gguf": "is written by llama.cpp, of a dense or narrow folder: python "
    "llama.cpp/convert_hf_to_gguf.py FOLDER (docs/serve.md, llama.cpp)",
}


def chosen_format(name: str, known: Sequence[str]) -> str:
    """`name`, which must be a format that the command writes.

    Raises:
        UserError: it is not; how it is made, where another tool makes it.
    """
    if name.lower() in ELSEWHERE:
        raise UserError(f"--format {name} {ELSEWHERE[name.lower()]}")
    return one_of("--format", name, known)
