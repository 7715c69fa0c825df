"""Batches of pictures through the pipeline, on the one thread that owns it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image

from scaleweaver.contracts import Control
from scaleweaver.control_images import EncodedControl
from scaleweaver.metadata import write_settings
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.serve.exact import Watch
from scaleweaver.serve.metrics import Metrics
from scaleweaver.serve.orders import ControlSettings, Drawn, Picture, Preview, Settings


class Abandoned(Exception):
    """Nobody waits for any picture of the batch any more."""


class Artist:
    """Draws pictures that share their settings; what becomes of them goes to their `send`."""

    def __init__(self, pipe: Any, metrics: Metrics, exact: bool = True) -> None:
        self._pipe, self._metrics = pipe, metrics
        self._exact = exact
        # of the present batch and the one before: a request's pictures may be spread over several
        self._before: dict[Any, EncodedControl] = {}
        self._encoded: dict[Any, EncodedControl] = {}

    def draw(self, pictures: Sequence[Picture]) -> None:
        """All at once; with `exact`, those whose bits might depend on the batch once more alone."""
        watch = self._watch(pictures[0].settings) if self._exact and len(pictures) > 1 else None
        self._before, self._encoded = self._encoded, {}
        self._draw(pictures, watch)
        for picture in pictures:
            if not picture.over and not picture.cancelled:
                self._metrics.redrawn.inc()
                self._draw([picture], None)

    def _draw(self, pictures: Sequence[Picture], watch: Watch | None) -> None:
        """One call of the pipeline, given up at the next scale when nobody waits for any of the pictures."""
        with suppress(Abandoned):
            self._call(pictures, watch)

    def _call(self, pictures: Sequence[Picture], watch: Watch | None) -> None:
        settings = pictures[0].settings

        def follow(pipe: Any, index: int, step: Any, seen: dict[str, Any]) -> None:
            if all(picture.cancelled for picture in pictures):
                raise Abandoned
            doubtful = watch.doubtful if watch else ()
            for row, picture in enumerate(pictures):
                if index in picture.previews and row not in doubtful and not picture.cancelled:
                    picture.previews.remove(index)
                    (image,) = self._pipe.preview(seen["latent"][row : row + 1])
                    picture.send(Preview(picture.index, index, image))

        with self._metrics.drawing.time():
            out = self._pipe(
                [picture.prompt for picture in pictures],
                negative_prompt=[picture.negative_prompt for picture in pictures] if settings.has_negative else None,
                seed=[picture.seed for picture in pictures],
                height=settings.plan.height,
                width=settings.plan.width,
                control=self._controls(pictures) or None,
                sampler=watch,
                callback_on_step_end=follow,
                **settings.numbers,
            )
        self._metrics.batch.observe(len(pictures))
        doubtful = watch.doubtful if watch else ()
        for row, picture in enumerate(pictures):
            if row not in doubtful:
                image = out.images[row] if watch is None else _as_if_alone(out.images[row], out.settings[row], watch)
                self._metrics.images.inc()
                picture.finish(Drawn(picture.index, image, self._tokens(picture)))

    def _watch(self, settings: Settings) -> Watch:
        """The sampler that the pipeline would make, on the watch."""
        config = self._pipe.config
        given = (getattr(settings, name) for name in ("temperature", "top_k", "top_p"))
        own = (config[name] for name in ("temperature", "top_k", "top_p"))
        return Watch(
            BitwiseSampler(*(mine if value is None else value for value, mine in zip(given, own, strict=True)))
        )

    def _controls(self, pictures: Sequence[Picture]) -> list[Control]:
        made = []
        for place, control in enumerate(pictures[0].settings.controls):
            encoded = [self._encode(control, picture, place) for picture in pictures]
            masks = [picture.masks[place] for picture in pictures] if control.masked else None
            # one condition stream serves all rows where all have the same map
            shared = all(one is encoded[0] for one in encoded)
            made.append(
                Control(
                    control.kind,
                    encoded[0] if shared else encoded,
                    scale=control.scale,
                    start=control.start,
                    end=control.end,
                    mask=masks,
                    resize=control.resize,
                    scales=control.scales,
                    control_guidance_scale=control.control_guidance_scale,
                )
            )
        return made

    def _encode(self, control: ControlSettings, picture: Picture, place: int) -> EncodedControl:
        """The stream of one map on its own, whatever the batch; a map that was just encoded is not encoded again."""
        image, plan = picture.maps[place], picture.settings.plan
        key = (control.kind, plan, image.tobytes())
        encoded = self._encoded.get(key) or self._before.get(key)
        if encoded is None:
            encoded = self._pipe.encode_control(image, control.kind, height=plan.height, width=plan.width)
        self._encoded[key] = encoded
        return encoded

    def _tokens(self, picture: Picture) -> int:
        texts = [picture.prompt] + ([] if picture.negative_prompt is None else [picture.negative_prompt])
        return sum(len(self._pipe.tokenizer(text, verbose=False)["input_ids"]) for text in texts)


def _as_if_alone(image: Image.Image, settings: dict[str, Any], watch: Watch) -> Image.Image:
    """The picture with the settings of a plain call, which has numbers where this one had a sampler."""
    sampler = watch.sampler
    temperature = np.asarray(sampler.temperature, dtype=np.float64).tolist()
    numbers = {"temperature": temperature, "top_k": sampler.top_k, "top_p": float(sampler.top_p)}
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        plain |= numbers if name == "sampler" else {name: value}
    return write_settings(image, plain)
