"""Directories of runs: private, removed by whoever is left, swept by the next run when nobody was."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from protocol import rundir


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


def old(path: Path, mode: int = 0o700) -> Path:
    path.mkdir(mode=mode)
    (path / "accel0.log").write_text("last words")
    os.utime(path, (1, 1))
    return path


def test_made_private_and_removed() -> None:
    path = rundir.run_directory()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    rundir.remove_run_directory(path)
    assert not Path(path).exists()


def test_what_a_killed_run_left_is_swept(base: Path) -> None:
    dead = old(base / f"{rundir.PREFIX}dead")
    rundir.remove_run_directory(rundir.run_directory())
    assert not dead.exists()


def test_nothing_else_is_touched(base: Path) -> None:
    alive = Path(rundir.run_directory())  # its lock is held
    os.utime(alive, (1, 1))
    others = [old(base / "somebody-elses"), old(base / f"{rundir.PREFIX}open", 0o755)]
    rundir.remove_run_directory(rundir.run_directory())
    rundir.remove_run_directory(str(others[0]))
    assert alive.exists()
    assert all(path.exists() for path in others)
    rundir.remove_run_directory(str(alive))


@pytest.mark.parametrize("stubborn_s", [0.5, 0.0])
def test_what_appears_meanwhile_is_removed_too(stubborn_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that binds its socket while another one removes the directory; however long each attempt takes."""
    monkeypatch.setattr(rundir, "_STUBBORN_S", stubborn_s)
    path = rundir.run_directory()
    rmdir, late = os.rmdir, [f"{path}/one.sock", f"{path}/two.sock"]

    def slow(name: str, *, dir_fd: int | None = None) -> None:
        if late:
            Path(late.pop()).touch()
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", slow)
    rundir.remove_run_directory(path)
    assert not late
    assert not os.path.exists(path)
