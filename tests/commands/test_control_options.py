"""The `--control` options: which value goes with which control."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaleweaver.commands.control_options import read_controls, read_scales
from scaleweaver.contracts import Control


def test_one_for_all_or_one_for_each(tmp_path: Path) -> None:
    names = [f"canny={tmp_path / 'a.png'}", f"depth={tmp_path / 'b.png'}"]
    for file in ("a.png", "b.png"):
        (tmp_path / file).touch()
    one, two = read_controls(names, [0.5], [0.0, 0.25], [], ["2:", ":"])
    assert one == Control("canny", str(tmp_path / "a.png"), scale=0.5, scales=slice(2, None))
    assert two == Control("depth", str(tmp_path / "b.png"), scale=0.5, start=0.25, scales=slice(None))
    assert read_controls([], [], [], [], []) == []
    with pytest.raises(ValueError, match="3 times --control-start for 2 times --control"):
        read_controls(names, [], [0, 0, 0], [], [])
    with pytest.raises(ValueError, match=r"there is no file .*none.png"):
        read_controls([f"canny={tmp_path / 'none.png'}"], [], [], [], [])


def test_scales_as_in_python() -> None:
    assert read_scales("2:5") == slice(2, 5) and read_scales(":-1") == slice(None, -1) and read_scales("3,0") == [3, 0]
    for wrong in ("", "a", "1:2:3", "1.5", "2-5"):
        with pytest.raises(ValueError, match=r"neither FIRST:END, such as 2:5 or 2:, nor 0,3,5"):
            read_scales(wrong)
