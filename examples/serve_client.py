"""Draw through a running server, `scaleweaver serve`, with OpenAI's client: a picture under a control, then a stream.

python examples/serve_client.py --url http://127.0.0.1:8000 --out out        (pip install openai)
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

from openai import OpenAI

CANNY = Path(__file__).resolve().parent / "canny.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompt", default="a large red rocket on grass at noon")
    parser.add_argument("--control", type=Path, default=CANNY, help="an edge map")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    api = OpenAI(base_url=f"{options.url}/v1", api_key=os.environ.get("SCALEWEAVER_API_KEY", "none"))
    control = {"kind": "canny", "image_b64": base64.b64encode(options.control.read_bytes()).decode()}
    # what OpenAI's API has no word for goes into extra_body
    extra = {"seed": options.seed, "controls": [control]}

    answer = api.images.generate(prompt=options.prompt, n=2, extra_body=extra)
    for number, image in enumerate(answer.data or []):
        file = options.out / f"picture-{number}.png"
        file.write_bytes(base64.b64decode(image.b64_json or ""))
        print(file)

    for event in api.images.generate(prompt=options.prompt, stream=True, partial_images=3, extra_body=extra):
        done = event.type == "image_generation.completed"
        file = options.out / ("stream.png" if done else f"stream-{event.partial_image_index}.png")
        file.write_bytes(base64.b64decode(event.b64_json))
        print(file)


if __name__ == "__main__":
    main()
