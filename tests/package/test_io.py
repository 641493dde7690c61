"""Files are whole or not there; locks end with their process; journals survive it."""

import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tensorllm import io
from tensorllm.errors import UserError

PROCESSES = multiprocessing.get_context("fork")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        io.write_json(tmp_path / "a.json", {"x": [1]})
        io.write_tensors(tmp_path / "a.safetensors", {"w": torch.eye(2).mT[:, :1]})
    finally:
        os.umask(before)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o666 & ~umask}
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1]}
    assert (tmp_path / "a.json").read_text().endswith("}\n")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], torch.tensor([[1.0], [0.0]]))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    io.write_text(path, "old")

    def fails() -> None:
        with io.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    with pytest.raises(TypeError):
        io.write_json(path, {"x": object()})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        io.write_tensors(tmp_path / "gone" / "a.safetensors", {"w": torch.ones(1)})


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    io.write_text(path, "old")

    def dies() -> None:
        with io.replacing(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    child = PROCESSES.Process(target=dies)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    io.remove_temporary(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def hold(path: Path, ready: Any) -> None:
    with io.locked(path):
        ready.set()
        time.sleep(60)


def test_a_lock_refuses_a_second_holder_until_its_process_is_killed(tmp_path: Path) -> None:
    path, ready = tmp_path / "x.lock", PROCESSES.Event()
    child = PROCESSES.Process(target=hold, args=(path, ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=r"^busy$"), io.locked(path, refusal="busy"):
        pass
    child.kill()
    child.join()
    with io.locked(path, refusal="busy"):
        assert path.exists()
        with pytest.raises(UserError, match=r"^busy$"), io.locked(path, refusal="busy"):
            pass
    assert not path.exists()


@pytest.mark.parametrize("refusal", [None, "busy"])
def test_a_lock_that_cannot_be_made_is_not_one_that_is_held(refusal: str | None) -> None:
    with pytest.raises(FileNotFoundError), io.locked(Path("/proc/x.lock"), refusal=refusal):
        pass


def append(folder: Path, number: int) -> None:
    for n in range(50):
        with io.locked(folder / "x.lock"):
            count = int((folder / "count").read_text())
            (folder / "count").write_text(str(count + 1))
        io.Journal(folder).append([{"worker": number, "n": n}])


def test_a_waiting_lock_lets_one_in_at_a_time_and_a_journal_keeps_all(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    children = [PROCESSES.Process(target=append, args=(tmp_path, n)) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert (tmp_path / "count").read_text() == "150"
    got = sorted((r["worker"], r["n"]) for r in io.Journal(tmp_path).records())
    assert got == [(w, n) for w in range(3) for n in range(50)]


def test_a_journal_passes_over_what_a_crash_cut_short(tmp_path: Path) -> None:
    journal = io.Journal(tmp_path, "rows")
    journal.append([{"n": 1}])
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("rows-")
    with file.open("a") as half:
        half.write('{"n": ')
    journal.append([{"n": 2}, {"n": 3}])
    assert [record["n"] for record in journal.records()] == [1, 2, 3]
    assert list(io.Journal(tmp_path, "other").records()) == []


def test_checksums(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    want = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    assert io.sha256(tmp_path / "a") == want
    assert list(io.sha256s([tmp_path / "b", tmp_path / "a"]))[1] == want


def test_a_folder_is_not_made_in_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`new/..` would be made for `new/../new`, and be in its way."""
    monkeypatch.chdir(tmp_path)
    assert io.at_home(Path("new/../new")) == tmp_path / "new"
