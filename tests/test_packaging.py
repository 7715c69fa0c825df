"""Wheel, sdist, editable install and bare checkout offer the same names, and never a top-level `kernels`."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import scaleweaver
from scaleweaver.doctor import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "peft", "cv2", "numpy")


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Stdout of the code in a fresh interpreter that stands in cwd; `path` goes in front of site-packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, so that builds leave nothing in it."""
    target = tmp_path_factory.mktemp("checkout") / "scaleweaver"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("scaleweaver", "controls", "demo", "kernels", "tests", "examples", "recipes", "benchmarks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


@pytest.fixture(scope="module")
def archives(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_every_module_below_scaleweaver(archives: tuple[Path, Path], checkout: Path) -> None:
    names = zipfile.ZipFile(archives[1]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"scaleweaver", f"scaleweaver-{scaleweaver.__version__}.dist-info"}
    expected = {
        f"scaleweaver/{file.relative_to(checkout / 'scaleweaver')}" for file in (checkout / "scaleweaver").rglob("*.py")
    }
    for folder in ("controls", "demo", "kernels"):
        expected |= {f"scaleweaver/{file.relative_to(checkout)}" for file in (checkout / folder).rglob("*.py")}
    assert expected <= set(names)
    assert "scaleweaver/py.typed" in names


def test_wheel_holds_the_assets(archives: tuple[Path, Path], checkout: Path) -> None:
    names = set(zipfile.ZipFile(archives[1]).namelist())
    files = [file for file in (checkout / "scaleweaver" / "assets").rglob("*") if file.is_file()]
    assert {str(file.relative_to(checkout)) for file in files} <= names
    pages = [file for file in (checkout / "demo").rglob("*") if file.is_file()]
    assert {f"scaleweaver/{file.relative_to(checkout)}" for file in pages} <= names


def test_sdist_holds_what_a_rebuild_and_a_test_run_need(archives: tuple[Path, Path], checkout: Path) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}
    for folder in ("scaleweaver", "controls", "demo", "kernels", "tests", "examples", "recipes"):
        wanted |= {
            str(f.relative_to(checkout)) for f in (checkout / folder).rglob("*") if f.suffix in (".py", ".yaml", ".png")
        }
    assert wanted <= names


def test_installed_wheel_works_outside_the_checkout(archives: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(archives[1])], check=True, capture_output=True)
    code = (
        "import importlib.util, sys, scaleweaver, scaleweaver.controls.canny, scaleweaver.kernels.attention\n"
        "from scaleweaver.controls import canny\n"
        "assert callable(canny)\n"
        "from scaleweaver.kernels.measured import load\n"
        "load()\n"
        "assert 'kernels' not in sys.modules and 'controls' not in sys.modules\n"
        "print(scaleweaver.__file__, len(scaleweaver.__path__))\n"
        "print(scaleweaver.controls.__file__, scaleweaver.kernels.__file__, sep='\\n')\n"
    )
    package, controls, kernels = run_python(code, tmp_path, site).splitlines()
    assert package == f"{site / 'scaleweaver' / '__init__.py'} 1"
    assert controls == str(site / "scaleweaver" / "controls" / "__init__.py")
    assert kernels == str(site / "scaleweaver" / "kernels" / "__init__.py")


def test_bare_checkout_works_from_its_root(checkout: Path) -> None:
    code = (
        "import sys, scaleweaver.controls, scaleweaver.kernels.attention\n"
        "assert 'kernels' not in sys.modules and 'controls' not in sys.modules\n"
        "print(scaleweaver.__file__, scaleweaver.controls.__file__, scaleweaver.kernels.__file__, sep='\\n')\n"
    )
    files = run_python(code, checkout).splitlines()
    assert files == [str(checkout / name / "__init__.py") for name in ("scaleweaver", "controls", "kernels")]


def test_editable_install_works_outside_the_checkout(tmp_path: Path) -> None:
    # the build's egg-info in the checkout is a distribution too, and says nothing of how it was installed
    found = importlib.metadata.distributions(name="scaleweaver")
    origins = [json.loads(each.read_text("direct_url.json") or "{}") for each in found]
    if not any(origin.get("dir_info", {}).get("editable") for origin in origins):
        pytest.skip("scaleweaver is not installed in editable form here")
    code = "import scaleweaver.controls, scaleweaver.kernels.attention; print(scaleweaver.kernels.__file__)"
    assert run_python(code, tmp_path) == str(ROOT / "kernels" / "__init__.py")


def test_folder_kernels_steps_aside_for_an_installed_package(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.18.5'\ndef get_kernel(): ...\n")
    code = (
        "import sys; before = list(sys.path)\n"
        "import kernels, scaleweaver.kernels\n"
        "from kernels import get_kernel\n"
        "assert sys.path == before\n"
        "print(kernels.__file__, scaleweaver.kernels.__file__, sep='\\n')\n"
    )
    theirs, ours = run_python(code, checkout, tmp_path).splitlines()
    assert theirs == str(tmp_path / "kernels" / "__init__.py")
    assert ours == str(checkout / "kernels" / "__init__.py")


def test_folder_kernels_is_no_usable_package_to_transformers(checkout: Path) -> None:
    code = (
        "from transformers.utils.import_utils import is_kernels_available\n"
        "import kernels; print(kernels.__version__, is_kernels_available())"
    )
    assert run_python(code, checkout) == "0 False"


@pytest.mark.parametrize(
    "code", ["import scaleweaver", "from scaleweaver.cli import app; app(['--help'], standalone_mode=False)"]
)
def test_import_and_help_load_no_heavy_library(code: str, tmp_path: Path) -> None:
    out = run_python(f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])", tmp_path)
    assert out.splitlines()[-1] == "[]"


def test_public_names_resolve_and_are_known_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "scaleweaver" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == scaleweaver._MODULE_OF
    assert sorted([*typed, "__version__"]) == sorted(scaleweaver.__all__)
    for name in scaleweaver.__all__:
        assert getattr(scaleweaver, name) is getattr(scaleweaver, name)
        assert name in dir(scaleweaver)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        scaleweaver.Nonsense  # noqa: B018


def test_canny_stays_a_function_whatever_is_imported_first(tmp_path: Path) -> None:
    code = (
        "import scaleweaver.controls.canny\n"
        "from scaleweaver.controls import Canny, canny\n"
        "print(canny.__name__, type(canny).__name__, Canny.__name__)"
    )
    assert run_python(code, tmp_path) == "canny function Canny"


def test_every_package_is_listed() -> None:
    folders = {file.parent for file in (ROOT / "scaleweaver").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    for beside in ("controls", "demo", "kernels"):
        inside = {file.parent for file in (ROOT / beside).rglob("*.py")}
        names |= {".".join(("scaleweaver", *folder.relative_to(ROOT).parts)) for folder in inside}
        folders |= inside
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_doctor_looks_at_every_extra() -> None:
    assert sorted(EXTRAS) == sorted(PROJECT["project"]["optional-dependencies"])


def test_one_version_everywhere() -> None:
    assert re.search(rf"^version: {re.escape(scaleweaver.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"## {scaleweaver.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert importlib.metadata.version("scaleweaver") == scaleweaver.__version__


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {pin.name: pin.specifier for pin in map(Requirement, lines)}
    extras = PROJECT["project"]["optional-dependencies"]
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]:
        wanted = Requirement(line)
        versions = [specifier.version for specifier in pins[wanted.name] if specifier.operator in ("==", ">=")]
        assert versions and wanted.specifier.contains(versions[0]), line
