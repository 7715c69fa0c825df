"""Renders the scene of examples/canny.png in the built-in world and takes its edges: how that file came about.

python examples/make_canny.py
"""

from __future__ import annotations

from math import atan
from pathlib import Path

from scaleweaver.controls import canny
from scaleweaver.toybox.render import render
from scaleweaver.toybox.scene import Camera, Scene, Thing

SCENE = Scene(  # a red cube left of a small green ball on grass at noon
    items=(
        Thing("cube", "red", "medium", "matte", x=-0.75, y=0.0, z=0.0, yaw=0.5),
        Thing("ball", "green", "small", "matte", x=0.75, y=-0.1, z=0.0, yaw=0.0),
    ),
    ground="grass",
    sky="noon",
    sun_azimuth=0.7,
    sun_elevation=0.9,
    camera=Camera(height=1.7, pitch=atan(1.2 / 5), focal=2.2, distance=5.0),
)


def main() -> None:
    photo = render([SCENE], size=128).image[0]  # (3, 128, 128)
    out = Path(__file__).with_name("canny.png")
    canny(photo).save(out)
    print(out)


if __name__ == "__main__":
    main()
