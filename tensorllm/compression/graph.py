"""A factored model as a graph that runs without our code: torch's exported program, or ONNX.

The graph takes `input_ids` and `attention_mask`, both (B, T) int64, and returns `logits` (B, T, V):
a whole text at once, without a key-value cache. B and T are free. Its weights are the factors, so a
file is as small as the factored folder.

Shapes: B texts, T tokens, V vocabulary.
"""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tensorllm.checkpoint.loading import load
from tensorllm.checkpoint.writer import ShardWriter, check_target, exclusive
from tensorllm.compression.complete import complete, dense_config
from tensorllm.compression.exported import exported_report
from tensorllm.errors import Incomplete, UserError, first_line
from tensorllm.io import no_space
from tensorllm.progress import Progress, quiet
from tensorllm.registry import one_of

NAMES = ("input_ids", "attention_mask")
EXAMPLE, TRIED = (2, 9), (3, 17)  # (B, T) for tracing, and for testing the written file
# max |logits - the model's| / max |the model's|: other kernels sum in another order.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
ROUGH = 5e-2  # in float16 and bfloat16


class GraphFormat(ABC):
    """A file format of graphs."""

    file: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()  # required besides torch; in the extra of that name
    extra: ClassVar[str] = ""

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of written weights if none is given, by the dtype they are stored in."""
        return stored

    @abstractmethod
    def write(self, program: ExportedProgram, folder: Path) -> None:
        """Write the graph and its weights into an existing folder."""

    @abstractmethod
    def logits(self, folder: Path, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, T, V), computed from the file alone."""


class Program(GraphFormat):
    """`model.pt2`: a zip of JSON and raw weights, without a pickle; plain torch runs it."""

    file = "model.pt2"

    def write(self, program: ExportedProgram, folder: Path) -> None:
        torch.export.save(program, folder / self.file)

    def logits(self, folder: Path, inputs: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = torch.export.load(folder / self.file).module()(**inputs)
        return found


class Onnx(GraphFormat):
    """`model.onnx` and its weights, `model.onnx.data`."""

    file = "model.onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """float32 for bfloat16, of which onnxruntime has no products on a CPU."""
        return torch.float32 if stored == torch.bfloat16 else stored

    def write(self, program: ExportedProgram, folder: Path) -> None:
        names: dict[str, Any] = {"input_names": list(NAMES), "output_names": ["logits"]}
        made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        assert made is not None
        made.save(folder / self.file, external_data=True)

    def logits(self, folder: Path, inputs: Mapping[str, Tensor]) -> Tensor:
        import onnxruntime

        path, providers = str(folder / self.file), ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, providers=providers)
        given = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(None, given)[0])


GRAPHS: dict[str, GraphFormat] = {"onnx": Onnx(), "exported-program": Program()}


def export_graph(
    source: Path,
    target: Path,
    kind: str,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> int:
    """Write a factored folder's model as a graph, with the tokenizer and the config beside it.

    Nothing appears unless the written file reproduces the model's logits, on a text of another
    length than the one that was traced.

    Args:
        source: a factored folder.
        target: the folder to make.
        kind: one of `GRAPHS`.
        dtype: of the weights; None: as stored, but float32 for bfloat16 in ONNX.
        overwrite: replace an existing folder.
        progress: called with (steps done, steps in all, the step).

    Returns:
        Bytes of the graph and its weights.

    Raises:
        UserError: a package is missing, the folder is not factored, or the model has no such graph.
    """
    form = _form(kind)
    check_target(target, overwrite=overwrite, source=source)
    progress(0, 4, "read the model")
    model = load(source, policy="always", dtype=dtype, verify=True)
    written = dtype or form.dtype(model.dtype)
    if form.dtype(written) != written:
        raise UserError(f"--format {kind} takes no --dtype bf16; give fp32 or fp16")
    model = model.to(written)
    progress(1, 4, "trace it")
    with _refused(f"torch.export cannot trace {_name(model)}"):
        program = trace(model)
    with exclusive(target):
        writer = ShardWriter(target, stem="model", fingerprint={}, overwrite=overwrite)
        try:
            progress(2, 4, "write it")
            with _refused(f"{_name(model)} cannot be written as {kind}", writer.folder):
                form.write(program, writer.folder)
            files = [path for path in writer.folder.iterdir() if path.name.startswith("model.")]
            size = sum(path.stat().st_size for path in files)
            progress(3, 4, "compare logits")
            _compare(form, kind, model, writer.folder)
            complete(
                writer,
                source,
                config=dense_config(source, written),
                manifest=None,
                report=exported_report(source, kind, size, written),
            )
        except BaseException:  # a graph is written as a whole: no later run could resume it
            writer.discard()
            raise
    return size


def _form(kind: str) -> GraphFormat:
    """The format with that name; refused if a package that it needs is missing."""
    form = GRAPHS[one_of("--format", kind, tuple(GRAPHS))]
    missing = [package for package in form.packages if find_spec(package) is None]
    if missing:
        raise UserError(
            f"--format {kind} needs {', '.join(missing)}: pip install 'tensorllm[{form.extra}]'"
        )
    return form


class _Logits(nn.Module):
    """A transformers model with the two inputs and the one output of the graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if hasattr(self.model.config, "use_cache"):
            given["use_cache"] = False
        logits: Tensor = self.model(**given).logits
        return logits


@torch.no_grad()
def trace(model: Any) -> ExportedProgram:
    """The graph of a model, for any B and T that it takes; contains no paths of this machine."""
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}  # B, and T up to the position table's size
    given = _inputs(model, EXAMPLE)
    shapes = dict.fromkeys(given, free)
    program = torch.export.export(_Logits(model).eval(), (), given, dynamic_shapes=shapes)
    program.example_inputs = None  # would be pickled
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths, and half of a small graph's bytes
    return program


def _inputs(model: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Random tokens, the first text padded on the left, by NAMES."""
    random = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().num_embeddings
    ids_BT = torch.randint(words, shape, generator=random)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, : shape[1] // 3] = 0
    return dict(zip(NAMES, (ids_BT, mask_BT), strict=True))


@torch.no_grad()
def _compare(form: GraphFormat, kind: str, model: Any, folder: Path) -> None:
    """Refuse a written graph whose logits differ from the model's."""
    inputs = _inputs(model, TRIED)
    want = _Logits(model)(**inputs)
    with _refused(f"{_name(model)} as {kind} does not run"):
        got = form.logits(folder, inputs)
    read = inputs["attention_mask"].bool()
    error = float((got - want)[read].abs().max() / want[read].abs().max())
    if not error <= TOLERANCE.get(want.dtype, ROUGH):
        raise UserError(
            f"{_name(model)} as {kind} gives other logits ({error:.1e} of the largest); "
            "export it dense"
        )


@contextmanager
def _refused(what: str, folder: Path | None = None) -> Iterator[None]:
    """Turn whatever an exporter raises into a one-line error, and silence its messages.

    Args:
        what: begins the error.
        folder: where it writes; None: nowhere.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, Incomplete):
        raise
    except Exception as error:
        if folder is not None and isinstance(error, OSError):
            raise no_space(folder, error) from error
        raise UserError(f"{what}: {first_line(error)}; export it dense") from error
    finally:
        logging.disable(level)


def _name(model: Any) -> str:
    return type(model).__name__
