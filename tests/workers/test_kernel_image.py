"""The image of all kernels: the same bits as numba's own, and refused when anything about it is not right."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_execute import ROOT, sample_outputs

from protocol.features import has
from workers.kernels import elf, image, warm
from workers.kernels.stage import KERNELS

pytestmark = pytest.mark.skipif(not has("image"), reason="images are for x86-64 Linux")

PROGRAM = """
import sys
from workers.kernels import image
assert image.load()
import workers.engine
assert not {"numba", "llvmlite"} & set(sys.modules)
import test_execute
sys.stdout.buffer.write(b"".join(test_execute.sample_outputs()))
"""


COMPILED_TWICE = """
import shutil, subprocess, sys
from workers.kernels import elf, warm
kernel = next(k for k in warm.KERNELS if k.name == "unary")
compiled = kernel.compiled()
if len(sys.argv) == 1:
    shutil.rmtree(warm.CACHE)
    subprocess.run([sys.executable, __file__, "again"], check=True)
    elf.link({kernel.key: warm._object_file(compiled)})
"""


@pytest.fixture(scope="module")
def path() -> Path:
    warm.warm()
    assert image.where().is_file()
    return image.where()


def elsewhere(program: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program in a process that has not loaded any kernels."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environ = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, check=False)


def test_same_bits_as_numba_and_without_it(path: Path) -> None:
    done = elsewhere(PROGRAM)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"".join(sample_outputs())


def test_a_damaged_image_is_none(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for number, data in enumerate((b"", whole[:-1], whole[:40], whole[1:], bytes(flipped))):
        (tmp_path / str(number)).write_bytes(data)
        with pytest.raises((ValueError, KeyError)):
            image.read(tmp_path / str(number))
    ours = {
        kernel.key for kernel in KERNELS if not kernel.key.startswith("workers.kernels.ggml.")
    }  # other tests' imports
    assert image.read(path).entries.keys() == ours
    assert not image.loaded()


def test_an_image_is_written_whole_or_not_at_all(path: Path, tmp_path: Path) -> None:
    linked = image.read(path)
    image.write(linked, tmp_path / "new" / "image")
    assert image.read(tmp_path / "new" / "image") == linked
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["image"]


@pytest.mark.parametrize("there", ["nothing", "damaged"])
def test_warming_makes_the_image_that_is_missing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """As with another checkout's kernels in the cache, or with another CPU's image."""
    ours, other = tmp_path / "ours.image", tmp_path / "other.image"
    monkeypatch.setattr(image, "where", lambda: ours)
    warm.make_image()  # not the one that is there: it may be another checkout's, of the same sources compiled elsewhere
    monkeypatch.setattr(image, "where", lambda: other)
    if there == "damaged":
        other.write_bytes(path.read_bytes()[:-1])
    assert not warm.is_warm()
    warm.warm()
    assert warm.is_warm()
    assert image.read(other) == image.read(ours)


@pytest.mark.slow
def test_another_process_may_have_compiled_the_same_kernel(tmp_path: Path) -> None:
    """numba names its symbols anew in each process; the cache then holds the other's."""
    program = tmp_path / "twice.py"
    program.write_text(COMPILED_TWICE)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(program)], env=environ, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_no_image_when_switched_off(path: Path) -> None:
    ask = "from workers.kernels import image; print(image.load(), image.loaded())"
    assert elsewhere(ask).stdout == b"True True\n"
    assert elsewhere(f"import os; os.environ['CROSSDOCK_DISABLE'] = 'image'; {ask}").stdout == b"False False\n"


@pytest.mark.parametrize("damage", ["nothing", "magic", "machine", "cut", "symbol"])
def test_only_object_files_are_linked(damage: str) -> None:
    kernel = next(k for k in KERNELS if k.name == "unary")
    data, symbol = warm._object_file(kernel.compiled())
    if damage == "nothing":
        linked = elf.link({"a": (data, symbol), "b": (data, symbol)})
        assert linked.entries["a"] != linked.entries["b"]
        assert len(linked.absolute) > 10
        assert not set(linked.absolute) & {at for offsets in linked.foreign.values() for at in offsets}
        return
    wrong = {
        "magic": (b"\x7fELG" + data[4:], symbol),
        "machine": (data[:18] + b"\x28\x00" + data[20:], symbol),
        "cut": (data[: len(data) // 2], symbol),
        "symbol": (data, symbol + "x"),
    }
    with pytest.raises(ValueError):
        elf.link({"a": wrong[damage]})


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of a user who has no other place to write to."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", os.devnull)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_every_process_takes_the_same_directory(homeless: Path) -> None:
    assert image.cache_directory() == image.cache_directory()
    assert [path.stat().st_mode & 0o777 for path in homeless.iterdir()] == [0o700]


@pytest.mark.parametrize("kind", ["link", "writable", "file"])
def test_a_directory_that_others_may_have_made_is_not_taken(homeless: Path, kind: str) -> None:
    taken = homeless / f"crossdock-cache-{os.getuid()}"
    if kind == "link":
        (homeless / "theirs").mkdir(mode=0o700)
        taken.symlink_to(homeless / "theirs")
    elif kind == "writable":
        taken.mkdir()
        taken.chmod(0o777)
    else:
        taken.touch()
    chosen = image.cache_directory()
    assert chosen != taken
    assert chosen.stat().st_mode & 0o777 == 0o700
