"""Names of models; without torch, so that a wrong name is refused at once."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tensorllm.errors import UserError
from tensorllm.io import WEIGHTS, at_home
from tensorllm.registry import did_you_mean

GGUF = ".gguf"


@cache
def short_names() -> dict[str, dict[str, Any]]:
    """Facts about the models that have a short name."""
    import yaml

    return dict(yaml.safe_load((files("tensorllm.configs") / "models.yaml").read_text()))


def check_name(model: str) -> None:
    """Refuse a name that cannot be a model, without asking the hub."""
    if model in short_names():
        return
    path = at_home(Path(model), opened_by=WEIGHTS)
    if path.is_dir():
        return
    if path.suffix.lower() == GGUF:
        raise UserError(_convert(path))
    if path.exists():
        raise UserError(f"the model {model} is a file; give the folder that holds it")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        close = did_you_mean(model, list(short_names()))
        names = ", ".join(short_names())
        raise UserError(
            f"no model {model!r}: not a local folder, not a hub id (owner/name), and not one of "
            f"{names}.{close}"
        )


def _convert(path: Path) -> str:
    """How to turn a GGUF file into a folder."""
    folder, file = path.parent, path.name
    return (
        f"{path} is a GGUF file, whose weights are mostly quantised. Make a folder of it once, in "
        "Python (pip install gguf): model = AutoModelForCausalLM.from_pretrained("
        f"{str(folder)!r}, gguf_file={file!r}); model.save_pretrained(NEW_FOLDER), and the same "
        "with AutoTokenizer"
    )
