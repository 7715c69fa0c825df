"""The page for programs: named endpoints with plain JSON in and out, for `gradio_client` or any other."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import gradio as gr

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
    most = studio.most_pixels

    def read(given: Any) -> tuple[Control, ...]:
        # all is looked at before any picture is decoded
        if not isinstance(given, list | None) or not all(isinstance(entry, dict) for entry in given or []):
            raise ValueError("the controls are no list of objects; pass [{kind, image_b64}]")
        entries = given or []
        studio.check_controls(len(entries))
        for entry in entries:
            unknown = [name for name in entry if name not in FIELDS]
            if unknown or not isinstance(entry.get("kind"), str) or "image_b64" not in entry:
                wanted = f"pass kind and image_b64, and any of {', '.join(FIELDS[2:])}"
                raise ValueError(f"a control has the fields {', '.join(entry) or 'none'}; {wanted}")
            studio.map_kind(entry["kind"])  # refuses what the model has not
        made: list[Control] = []
        size = None
        for entry in entries:
            kind, mask = entry["kind"], entry.get("mask_b64")
            picture = decode(entry["image_b64"], f"image of {kind}", most_pixels=most)
            size = size or studio.size_under(picture)
            # none is kept at its own size, which may be large
            picture = studio.map_of(kind, picture, size) if entry.get("preprocess") else studio.fitted(picture, size)
            if mask:
                mask = studio.fitted(decode(mask, f"mask of {kind}", most_pixels=most), size, lines=False)
            scale, start, end = (float(entry.get(name, own)) for name, own in (("scale", 1), ("start", 0), ("end", 1)))
            made.append(Control(kind, picture, scale, start, end, mask or None))
        return tuple(made)

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
        wish = Wish(prompt, read(controls), int(seed), int(count), options)
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
        found, python = settings_and_python(io.BytesIO(to_bytes(image_b64, "picture")), most)
        return {"settings": found, "python": python}

    gr.api(generate, api_name="generate", concurrency_limit=1, concurrency_id="model")
    gr.api(make_map, api_name="map", concurrency_limit=2, concurrency_id="maps")
    gr.api(scene, api_name="scene", concurrency_limit=2, concurrency_id="maps")
    gr.api(settings, api_name="settings", concurrency_limit=2, concurrency_id="maps")
