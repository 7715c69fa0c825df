"""The page for programs: named endpoints with plain JSON in and out, for `gradio_client` or any other."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from scaleweaver.contracts import Control
from scaleweaver.demo.drawing import Moment, Wish
from scaleweaver.demo.encoded import data_url, decode, to_bytes
from scaleweaver.demo.errors import told
from scaleweaver.demo.provenance import settings_and_python
from scaleweaver.demo.scenes import find_scene, render_scene
from scaleweaver.demo.studio import Studio

FIELDS = ("kind", "image_b64", "preprocess", "scale", "start", "end", "mask_b64")


def add_endpoints(studio: Studio) -> None:
    """/generate, /map, /scene and /settings of the page that is being built."""
    most = studio.limits.megapixels * 1_000_000

    def read(entry: dict[str, Any]) -> Control:
        unknown = [name for name in entry if name not in FIELDS]
        if unknown or not isinstance(entry.get("kind"), str) or "image_b64" not in entry:
            wanted = f"pass kind and image_b64, and any of {', '.join(FIELDS[2:])}"
            raise ValueError(f"a control has the fields {', '.join(entry) or 'none'}; {wanted}")
        kind = entry["kind"]
        picture = decode(entry["image_b64"], f"image of {kind}", most_pixels=most)
        if entry.get("preprocess"):
            picture = studio.map_of(kind, picture)
        mask = entry.get("mask_b64")
        return Control(
            kind,
            picture,
            mask=decode(mask, f"mask of {kind}", most_pixels=most) if mask else None,
            scale=float(entry.get("scale", 1.0)),
            start=float(entry.get("start", 0.0)),
            end=float(entry.get("end", 1.0)),
        )

    @told
    def generate(
        prompt: str,
        controls: list[dict] | None = None,
        seed: int = 0,
        count: int = 1,
        guidance_scale: float | None = None,
    ) -> Iterator[dict]:
        """Draw. Streams {scale, scales, pictures} after every scale, then {pictures, seeds, settings, seconds}.

        controls: [{kind, image_b64, preprocess, scale, start, end, mask_b64}]; with preprocess the image is a photo.
        Pictures are data URLs of PNGs, the last ones with their settings inside.
        """
        options = {} if guidance_scale is None else {"guidance_scale": float(guidance_scale)}
        wish = Wish(prompt, tuple(read(entry) for entry in controls or []), int(seed), int(count), options)
        for event in studio.draw(wish):
            pictures = [data_url(picture) for picture in event.pictures]
            if isinstance(event, Moment):
                yield {"scale": event.index + 1, "scales": event.scales, "pictures": pictures}
            else:
                settings = [picture.settings for picture in event.pictures]
                seeds = [entry["seed"] for entry in settings]
                yield {"pictures": pictures, "seeds": seeds, "settings": settings, "seconds": event.seconds}

    @told
    def make_map(image_b64: str, kind: str) -> str:
        """The control map of a photo, as a data URL."""
        return data_url(studio.map_of(kind, decode(image_b64, "photo", most_pixels=most)))

    @told
    def scene(number: int, kind: str = "") -> dict:
        """A scene of the built-in world, the first from `number` on that has something to show for the kind."""
        found = render_scene(find_scene(int(number), kind), min(studio.schedule.height, studio.schedule.width, 512))
        maps = {name: data_url(picture) for name, picture in found.maps.items()}
        return {"number": found.number, "prompt": found.prompt, "picture": data_url(found.picture), "maps": maps}

    @told
    def settings(image_b64: str) -> dict:
        """The settings inside a picture that was drawn here, and the Python that draws it again."""
        decode(image_b64, "picture", most_pixels=most)  # refuses what is none
        with Image.open(io.BytesIO(to_bytes(image_b64, "picture"))) as opened:
            found, python = settings_and_python(opened)
        return {"settings": found, "python": python}

    gr.api(generate, api_name="generate", concurrency_limit=1, concurrency_id="model")
    gr.api(make_map, api_name="map", concurrency_limit=2, concurrency_id="maps")
    gr.api(scene, api_name="scene", concurrency_limit=2, concurrency_id="maps")
    gr.api(settings, api_name="settings", concurrency_limit=2, concurrency_id="maps")
