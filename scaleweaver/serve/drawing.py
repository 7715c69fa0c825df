"""Batches of pictures through the pipeline, on the one thread that owns it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from scaleweaver.contracts import Control
from scaleweaver.control_images import EncodedControl
from scaleweaver.metadata import write_settings
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.serve.exact import Watch
from scaleweaver.serve.metrics import Metrics
from scaleweaver.serve.options import public_name
from scaleweaver.serve.orders import ControlSettings, Drawn, Picture, Preview, Settings


class Abandoned(Exception):
    """Nobody waits for any picture of the batch any more."""


class Artist:
    """Draws pictures that share their settings; what becomes of them goes to their `send`."""

    def __init__(self, pipe: Any, metrics: Metrics, *, name: str, rounding: float | None) -> None:
        """name: of the model, in the settings of a picture. rounding: of `Watch`; None: batches as they come out."""
        self._pipe, self._metrics = pipe, metrics
        self._name, self._rounding = name, rounding
        # of the present batch and the one before: a request's pictures may be spread over several
        self._before: dict[Any, EncodedControl] = {}
        self._encoded: dict[Any, EncodedControl] = {}

    def draw(self, pictures: Sequence[Picture]) -> None:
        """All at once; those that are doubtful to a watch once more alone."""
        watch = self._watch(pictures[0].settings) if len(pictures) > 1 else None
        self._before, self._encoded = self._encoded, {}
        self._draw(pictures, watch)
        for picture in pictures:
            if not picture.over and not picture.cancelled:
                self._metrics.redrawn.inc()
                self._draw([picture], None)

    def forget(self) -> None:
        """Let go of the controls that are kept for the next batch."""
        self._before, self._encoded = {}, {}

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
                image = write_settings(out.images[row], self._as_if_alone(out.settings[row], watch))
                self._metrics.images.inc()
                picture.finish(Drawn(picture.index, image, self._tokens(picture)))

    def _watch(self, settings: Settings) -> Watch | None:
        """The sampler that the pipeline would make, on the watch; None where nobody asked for one."""
        if self._rounding is None:
            return None
        config = self._pipe.config
        given = (getattr(settings, name) for name in ("temperature", "top_k", "top_p"))
        own = (config[name] for name in ("temperature", "top_k", "top_p"))
        numbers = (mine if value is None else value for value, mine in zip(given, own, strict=True))
        return Watch(BitwiseSampler(*numbers), self._rounding)

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

    def _as_if_alone(self, settings: dict[str, Any], watch: Watch | None) -> dict[str, Any]:
        """Settings of a plain call, which has numbers where a watch was the sampler; no places on this machine."""
        numbers = {}
        if watch is not None:
            sampler = watch.sampler
            temperature = np.asarray(sampler.temperature, dtype=np.float64).tolist()
            numbers = {"temperature": temperature, "top_k": sampler.top_k, "top_p": float(sampler.top_p)}
        plain: dict[str, Any] = {"model": self._name}
        for name, value in settings.items():
            if name == "loras":
                plain[name] = [{**lora, "source": public_name(lora["source"])} for lora in value]
            elif name != "model":
                plain |= numbers if name == "sampler" else {name: value}
        return plain
