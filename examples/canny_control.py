"""One prompt under one canny map, drawn with four seeds and without control beside them.

python examples/canny_control.py                       # the map that lies beside this file
python examples/canny_control.py --photo my_photo.jpg  # edges of a photo of yours
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from scaleweaver import VARControlPipeline
from scaleweaver.controls import canny

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a large red rocket on grass at noon")
    parser.add_argument("--photo", type=Path, help="take the edges of this photo instead of the ready map")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/canny_control.png"))
    options = parser.parse_args()

    edges = canny(Image.open(options.photo)) if options.photo else Image.open(HERE / "canny.png")
    pipe = VARControlPipeline.from_pretrained("toybox")
    controlled = pipe(options.prompt, control={"canny": edges}, seed=options.seed, num_images_per_prompt=4).images
    free = pipe(options.prompt, seed=options.seed).images

    row = [edges.convert("RGB").resize(controlled[0].size, Image.Resampling.NEAREST), *controlled, *free]
    width, height = controlled[0].size
    sheet = Image.new("RGB", (width * len(row), height))
    for column, image in enumerate(row):
        sheet.paste(image, (column * width, 0))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out)
    print(f"{options.out}: the map, four pictures under it, one without it")


if __name__ == "__main__":
    main()
