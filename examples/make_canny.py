"""Renders a scene of the built-in world and takes its edges: how examples/photo.png and examples/canny.png came about.

python examples/make_canny.py
"""

from __future__ import annotations

import argparse
from math import atan
from pathlib import Path

from PIL import Image

from scaleweaver.controls import canny
from scaleweaver.toybox.render import render
from scaleweaver.toybox.scene import Camera, Scene, Thing

SCENE = Scene(  # a large red rocket on grass at noon
    items=(Thing("rocket", "red", "large", "matte", x=0.0, y=0.0, z=0.0, yaw=0.5),),
    ground="grass",
    sky="noon",
    sun_azimuth=0.7,
    sun_elevation=0.9,
    camera=Camera(height=1.7, pitch=atan(1.2 / 5), focal=3.4, distance=5.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for photo.png and canny.png")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    pixels = render([SCENE], size=128).image[0].mul(255).round().byte()  # (3, 128, 128)
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for name, picture in (("photo.png", photo), ("canny.png", canny(photo))):
        out = folder / name
        picture.save(out)
        print(out)


if __name__ == "__main__":
    main()
