"""Four nodes: load a pipeline, make a control map, add a control, draw."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from scaleweaver import Control, VARControlPipeline
from scaleweaver.control_maps import map_of_photo
from scaleweaver.controls import KINDS, preprocessor
from scaleweaver.precision import read_dtype

from .tensors import image_of, masks_of, pictures_of

Pipeline = io.Custom("SCALEWEAVER_PIPELINE")
Controls = io.Custom("SCALEWEAVER_CONTROLS")

CATEGORY = "scaleweaver"
LARGEST_SEED = 2**63 - 1025  # image i gets seed + i
OWN = 0.0  # a number of this value leaves the choice to the model


class Load(io.ComfyNode):
    """A pipeline: the built-in one, a Hub id, or a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ScaleweaverLoad",
            display_name="Load scaleweaver model",
            category=CATEGORY,
            inputs=[
                io.String.Input("model", default="toybox", tooltip="toybox, a Hub id or a folder"),
                io.Combo.Input("device", options=["auto", "cuda", "mps", "cpu"], default="auto"),
                io.Combo.Input("dtype", options=["auto", "float32", "bfloat16", "float16"], default="auto"),
            ],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def execute(cls, model: str, device: str, dtype: str) -> io.NodeOutput:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        pipe = VARControlPipeline.from_pretrained(model.strip(), dtype=read_dtype(dtype, device)).to(device)
        pipe.set_progress_bar_config(disable=True)
        return io.NodeOutput(pipe)


class Preprocess(io.ComfyNode):
    """Control maps from photos, of the same size; with a pipeline, as its control was trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        kinds = [kind for kind in KINDS if kind != "inpaint"]  # which needs a mask, not only a photo
        return io.Schema(
            node_id="ScaleweaverPreprocess",
            display_name="Control map from photo",
            category=CATEGORY,
            inputs=[
                io.Image.Input("image"),
                io.Combo.Input("kind", options=kinds, default="canny"),
                Pipeline.Input("pipeline", optional=True, tooltip="make the map as its control of this kind saw it"),
            ],
            outputs=[io.Image.Output(display_name="map")],
        )

    @classmethod
    def execute(cls, image: Tensor, kind: str, pipeline: Any = None) -> io.NodeOutput:
        photos = pictures_of(image)
        if pipeline is not None and kind in pipeline.controls:
            config = pipeline.controls[kind].config
            return io.NodeOutput(image_of([map_of_photo(photo, config) for photo in photos]))
        detect = preprocessor(kind)
        return io.NodeOutput(image_of([detect(photo) for photo in photos]))


class AddControl(io.ComfyNode):
    """One control: its map, and how strongly, when and where it acts. Chain several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ScaleweaverControl",
            display_name="scaleweaver control",
            category=CATEGORY,
            inputs=[
                io.Image.Input("image", tooltip="a map; for a photo put the map node before"),
                io.String.Input("kind", default="canny", tooltip="a control of the pipeline"),
                io.Float.Input("strength", default=1.0, min=0.0, max=4.0, step=0.05),
                io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.05),
                io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.05),
                io.Combo.Input("resize", options=["crop", "pad", "stretch"], default="crop"),
                io.Mask.Input("mask", optional=True, tooltip="where it acts"),
                Controls.Input("controls", optional=True, tooltip="the ones before"),
            ],
            outputs=[Controls.Output(display_name="controls")],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        kind: str,
        strength: float,
        start: float,
        end: float,
        resize: str,
        mask: Tensor | None = None,
        controls: tuple[Control, ...] = (),
    ) -> io.NodeOutput:
        masks = None if mask is None else masks_of(mask)
        made = Control(
            kind.strip(), pictures_of(image), scale=strength, start=start, end=end, resize=resize, mask=masks
        )
        return io.NodeOutput((*(controls or ()), made))


class Sample(io.ComfyNode):
    """Draw. A batch of control images gives one picture for each of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ScaleweaverSample",
            display_name="Draw with scaleweaver",
            category=CATEGORY,
            inputs=[
                Pipeline.Input("pipeline"),
                io.String.Input("prompt", multiline=True, default="a large red rocket on grass at noon"),
                io.String.Input("negative_prompt", multiline=True, default="", tooltip="empty: none"),
                io.Int.Input("seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True),
                io.Int.Input("images", default=1, min=1, max=64, tooltip="of each prompt; image i has seed + i"),
                io.Int.Input("width", default=0, min=0, max=8192, tooltip="0: the model's own"),
                io.Int.Input("height", default=0, min=0, max=8192, tooltip="0: the model's own"),
                io.Float.Input(
                    "guidance_scale", default=OWN, min=0.0, max=30.0, step=0.1, tooltip="0: the model's own"
                ),
                io.Float.Input(
                    "control_guidance_scale", default=OWN, min=0.0, max=30.0, step=0.1, tooltip="0: the model's own"
                ),
                io.Float.Input("temperature", default=OWN, min=0.0, max=4.0, step=0.05, tooltip="0: the model's own"),
                Controls.Input("controls", optional=True),
            ],
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="settings")],
        )

    @classmethod
    def execute(
        cls,
        pipeline: Any,
        prompt: str,
        negative_prompt: str,
        seed: int,
        images: int,
        width: int,
        height: int,
        guidance_scale: float,
        control_guidance_scale: float,
        temperature: float,
        controls: tuple[Control, ...] = (),
    ) -> io.NodeOutput:
        numbers = {
            "guidance_scale": guidance_scale,
            "control_guidance_scale": control_guidance_scale,
            "temperature": temperature,
        }
        rows = max((len(control.image) for control in controls or ()), default=1)
        drawn = pipeline(
            [prompt] * rows,
            negative_prompt=negative_prompt.strip() or None,
            seed=seed,
            num_images_per_prompt=images,
            width=width or None,
            height=height or None,
            control=list(controls or ()) or None,
            output_type="np",
            **{name: value for name, value in numbers.items() if value != OWN},
        )
        settings = json.dumps(drawn.settings, indent=2, ensure_ascii=False)
        return io.NodeOutput(torch.from_numpy(drawn.images), settings)  # (B, H, W, 3)


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Load, Preprocess, AddControl, Sample]


async def comfy_entrypoint() -> Extension:
    """What ComfyUI asks for the nodes."""
    return Extension()
