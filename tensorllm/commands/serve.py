"""`tensorllm serve`: transformers' own server, in a process that knows the factored format.

`transformers serve` imports no other packages, so by itself it cannot open a factored folder.
"""

import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from tensorllm.checkpoint.loader import Loader, device_of, dtype_of
from tensorllm.checkpoint.loading import cache_elsewhere
from tensorllm.checkpoint.source import resolve
from tensorllm.commands.served import bad_requests_refused
from tensorllm.errors import UserError
from tensorllm.registry import load_plugins, one_of
from tensorllm.requests.others import ServeRequest
from tensorllm.runtime.cost import Cache

PORTS = range(1, 2**16)
MARK = "@"  # transformers' server takes what follows it as a revision


@dataclass(frozen=True, slots=True)
class Address:
    """Where a model is served.

    Attributes:
        url: what OpenAI's clients call `base_url`.
        model: what they call `model`; transformers' server answers to no other name.
        chat: whether the tokenizer has a chat template, which `/chat/completions` needs.
    """

    url: str
    model: str
    chat: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        ways = "/chat/completions and /completions" if self.chat else "/completions"
        return f"{self.url} will answer at {ways} for the model {self.model}, once it is loaded"


def serve(request: ServeRequest, announce: Callable[[Address], None]) -> None:
    """Answer requests of OpenAI's clients until the process is interrupted.

    Args:
        request: the model and the address.
        announce: called before the model is loaded, once everything else has been checked.

    Raises:
        UserError: no server is installed, the address cannot be used, or the model generates no
            text.
    """
    from transformers.utils.import_utils import is_serve_available

    load_plugins(request.plugins)
    if not is_serve_available():
        raise UserError("this needs transformers' server: pip install 'tensorllm[serve]'")
    one_of("--cache", request.cache, get_args(Cache))
    dtype, device = dtype_of(request.dtype), device_of(request.device)
    _check_address(request.host, request.port)
    folder = resolve(request.model, request.revision).folder
    if MARK in str(folder):
        raise UserError(
            f"transformers' server reads what follows {MARK} as a revision; give the folder "
            f"{folder} a name without it"
        )
    loader = Loader(folder)
    if loader.masked:
        raise UserError(f"{request.model} fills masks and writes no text; evaluate it instead")
    chat = bool(getattr(loader.tokenizer(), "chat_template", None))
    announce(Address(f"http://{request.host}:{request.port}/v1", str(folder), chat))

    from transformers.cli.serve import Serve

    with cache_elsewhere(request.cache), bad_requests_refused():
        Serve(
            str(folder),
            host=request.host,
            port=request.port,
            device=device,
            dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
        )


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be used, before a model is loaded for it."""
    if port not in PORTS:
        raise UserError(f"--port must be in {PORTS[0]}..{PORTS[-1]}, got {port}")
    try:
        (kind, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from None
