"""What is installed: wheel and sdist, a light import, and a base that does without the extras."""

import importlib
import os
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import forked
import pytest
from cli_runs import piped, without_progress
from repository import ROOT

import tensorllm as tl

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECONDS = 2.0


def python(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}  # of --verbose
    return subprocess.run(
        [sys.executable, *options, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )


def without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process where what the extras bring cannot be imported."""
    return forked.run(["-c", BLOCK.format(absent=ABSENT, arguments=list(arguments))], bare=True)


def test_the_import_gives_no_warning() -> None:
    done = python("import tensorllm", "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_import_path_of_0_1_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="gone in 0.3: from tensorllm import factorize"):
        old = importlib.import_module("tensorllm.pipeline.runtime")
    assert old.factorize is tl.factorize


@pytest.mark.parametrize("script", ["import tensorllm", "import tensorllm_cli.app"])
def test_the_import_is_light(script: str) -> None:
    """No heavy package, and the processor at work for less than two seconds."""
    heavy = ["torch", "transformers", "lightning", "datasets", "optuna", "matplotlib", "pyarrow"]
    done = python(
        f"{script}\nimport sys, time\n"
        f"print([name for name in {heavy} if name in sys.modules], time.process_time())"
    )
    names, seconds = done.stdout.rsplit(" ", 1)
    assert names == "[]", done.stderr
    assert float(seconds) < SECONDS


def imported_by(arguments: list[str]) -> tuple[int, set[str]]:
    """The exit code of a command in a fresh process, and which slow packages it has imported."""
    slow = {"torch", "torchmetrics", "lightning", "transformers.modeling_utils"}
    done = python(
        f"import sys\nfrom tensorllm_cli.app import main\ntry: main({arguments})\n"
        f"finally: print(*{slow} & {{*sys.modules}})"
    )
    return done.returncode, set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("arguments", "code", "allowed"),
    [
        (["list", "models"], 0, set()),
        (["compress", "--model", "nosuch", "--mode", "laser"], 2, set()),
        (["evaluate", "--model", "nosuch", "--dataset", "demo"], 2, set()),
        (["compress", "--model", "demo", "--mode", "nosuch"], 2, {"torch"}),
        (["report", "nosuch"], 2, {"torch"}),
    ],
)
def test_nothing_slow_is_imported_before_it_is_needed(
    arguments: list[str], code: int, allowed: set[str]
) -> None:
    """What can be refused is refused first; torch alone knows the modes."""
    ended, found = imported_by(arguments)
    assert ended == code
    assert found <= allowed


def test_help_takes_less_than_two_seconds() -> None:
    def seconds() -> float:
        before = os.times()
        done = python("from tensorllm_cli.app import main; main(['--help'])")
        after = os.times()
        assert "search-ranks" in done.stdout
        return (
            after.children_user
            + after.children_system
            - (before.children_user + before.children_system)
        )

    assert min(seconds() for _ in range(3)) < SECONDS


BLOCK = """
import sys
assert not sys.modules.keys() & set({absent})
sys.modules.update(dict.fromkeys({absent}))  # imports as if it were not installed
from tensorllm_cli.app import main
sys.argv[1:] = {arguments}
main()
"""
# not matplotlib and tensorboard: libraries see that they are installed, and import them
ABSENT = ("optuna", "jinja2", "lm_eval", "torchao", "psycopg")


@pytest.mark.parametrize(
    ("arguments", "needs"),
    [
        (["search-ranks", "--model", "demo"], "pip install 'tensorllm[search]'"),
        (["report", "RUN"], "pip install 'tensorllm[report]'"),
    ],
)
def test_what_an_extra_is_needed_for_says_so(
    arguments: list[str], needs: str, tmp_path: Path
) -> None:
    if arguments[-1] == "RUN":
        compress = ("compress", "--model", "demo", "--mode", "laser", "--limit", "20")
        compressed = piped(*compress, "--out", tmp_path / "run")
        assert compressed.returncode == 0, compressed.stderr
        arguments = ["report", f"{tmp_path}/run", "--out", f"{tmp_path}/page.html"]
    done = without_extras(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert needs in done.stderr


def test_the_base_does_without_the_extras() -> None:
    arguments = ["evaluate", "--model", "demo", "--dataset", "demo", "--limit", "20", "--json"]
    done = without_extras(*arguments)
    assert (done.returncode, without_progress(done.stderr)) == (0, "")


def test_each_extra_is_named_by_what_needs_it() -> None:
    from tensorllm_cli.app import EXTRAS

    assert set(EXTRAS.values()) <= PROJECT["optional-dependencies"].keys()


def built(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist of a copy of what git has here; nothing is fetched."""
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source],
        check=True,
        capture_output=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_runs_the_demo_outside_the_repository(tmp_path: Path) -> None:
    """Installed without dependencies into a new environment that borrows this one's packages."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the package is not known")
    wheel, _ = built(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in ("tensorllm/**/*", "configs/**/*.yaml"):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                place = f"tensorllm/{name}" if name.startswith("configs/") else name
                assert place in names, f"the wheel lacks {name}"
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    site = next((environment / "lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    for hook in site.glob("__editable__*"):
        hook.unlink()
    script = (
        "import sys, tensorllm; print(tensorllm.__file__); sys.argv[1:] = %r;"
        "from tensorllm_cli.app import main; main()"
    )
    arguments = ["compress", "--model", "demo", "--mode", "hybrid", "--limit", "100"]
    started = time.monotonic()
    done = subprocess.run(
        [environment / "bin" / "python", "-c", script % arguments],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, without_progress(done.stderr)) == (0, "")
    assert done.stdout.startswith(str(site)), "the repository was used, not the wheel"
    assert "accuracy" in done.stdout
    assert time.monotonic() - started < 240
