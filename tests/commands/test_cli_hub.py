"""A hub that hangs, breaks down, or wants a licence accepted: one line each, after few requests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cli_runs import piped

MOST = 4  # requests, none of which takes more than a second; retries would make more


@contextmanager
def hub(status: int) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that answers all by one status, 0: never; and what it was asked."""
    over = threading.Event()
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            if status == 0:
                over.wait()
                return
            self.send_response(status)
            if status in (401, 403):
                self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("X-Error-Message", "Access to this model is restricted.")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


COMMANDS = {
    "model": (("compress", "--model", "gptj", "--mode", "hybrid"), "--model demo"),
    "dataset": (("evaluate", "--model", "demo", "--dataset", "fever"), "--data-file"),
}


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize(("status", "word"), [(0, "timed out"), (500, "500"), (401, "restricted")])
def test_a_misbehaving_hub(what: str, status: int, word: str, tmp_path: Path) -> None:
    arguments, way_on = COMMANDS[what]
    with hub(status) as (address, asked):
        done = piped(
            *arguments,
            HF_ENDPOINT=address,
            HF_HUB_OFFLINE="0",
            HF_DATASETS_OFFLINE="0",
            HF_HUB_ETAG_TIMEOUT="1",
            HF_HOME=str(tmp_path),
        )
    assert 0 < len(asked) <= MOST, asked
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: cannot")
    assert word in done.stderr
    assert way_on in done.stderr
