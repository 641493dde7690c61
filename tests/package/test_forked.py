"""A forked process is one of its own, and ends as a Python that was started does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

PIPE = subprocess.PIPE


def test_what_a_script_is_given_and_gives(tmp_path: Path) -> None:
    script = (
        "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['SAID'], __name__);"
        "print(sys.stdin.read(), file=sys.stderr); sys.exit(3)"
    )
    process = forked.Popen(
        ["-c", script, "a", 2], env={**os.environ, "SAID": "so"}, cwd=tmp_path,
        stdin=PIPE, stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    with process.stdin as given:
        given.write("given")
    assert process.communicate(60) == (f"['a', '2'] {tmp_path} so __main__\n", "given\n")
    assert process.returncode == 3
    assert process.seconds > 0
    assert process.pid != os.getpid()


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("print('x')", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os._exit(9)", 9, ""),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'end')", 0, "end"),
    ],
)
def test_how_it_ends(script: str, code: int, said: str) -> None:
    done = forked.run(["-c", script])
    assert done.returncode == code
    assert done.stderr.endswith(said)
    assert bool(done.stderr) == bool(said)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_killed_as_any_process(number: signal.Signals) -> None:
    with forked.Popen(["-c", "print('on', flush=True); input()"], stdin=PIPE, stdout=PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "on\n"
        assert one.poll() is None
        assert os.getpgid(one.pid) == one.pid
        one.send_signal(number)
        assert one.wait(60) == -number
    with pytest.raises(ProcessLookupError):
        os.kill(one.pid, 0)


def test_what_is_imported_already() -> None:
    names = "import sys; print(*sorted({'torch', 'transformers', 'tensorllm'} & {*sys.modules}))"
    assert forked.run(["-c", names]).stdout.split() == ["tensorllm", "torch", "transformers"]
    assert forked.run(["-c", names], bare=True).stdout.split() == ["torch"]
    other = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}  # read at import
    assert forked.run(["-c", names], env=other).stdout.split() == ["torch"]


def test_a_stand_in_for_subprocess(tmp_path: Path) -> None:
    module = forked.stand_in()
    (tmp_path / "script.py").write_text("import sys; print(sys.argv[1], 'torch' in sys.modules)")
    words = [sys.executable, str(tmp_path / "script.py"), "x"]
    assert module.run(words, stdout=PIPE, text=True, check=True).stdout == "x True\n"
    assert module.Popen(words, stdout=PIPE, text=True).communicate() == ("x True\n", "")
    assert module.run(["echo", "x"], stdout=PIPE, text=True).stdout == "x\n"
    with pytest.raises(subprocess.CalledProcessError):
        module.run([sys.executable, "-c", "1 / 0"], check=True)
