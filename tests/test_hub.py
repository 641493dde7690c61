"""A hub that cannot be reached: one line at once, and no word from the client's retries."""

import os
import subprocess
import sys
import time

import pytest

# Nothing listens there, on any machine.
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


@pytest.mark.parametrize(
    ("arguments", "way_on"),
    [
        (["compress", "--model", "gptj", "--mode", "hybrid"], "--model demo"),
        (["evaluate", "--model", "demo", "--dataset", "fever"], "--data-file"),
    ],
)
def test_an_unreachable_hub_is_one_line(arguments, way_on, tmp_path):
    environment = os.environ | NOWHERE | {"HF_HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tensorllm", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: cannot")
    assert way_on in done.stderr
    assert time.monotonic() - started < 60  # imports on a busy machine; the retries took longer
