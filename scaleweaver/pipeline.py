"""VARControlPipeline: prompts and control images in, pictures out.

A diffusers pipeline: components in folders, `to`, offloading, sharded saving and progress bars are diffusers' own. Its
names are kept where the meaning is the same; where diffusers has a step, there is a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.checkpoints import StoredPipeline
from scaleweaver.conditions import build, check_prompts, encode_prompts, make_generators
from scaleweaver.contracts import (
    CachePolicy,
    Conditions,
    Control,
    Router,
    Sampler,
    Search,
    TextFeatures,
)
from scaleweaver.control_images import (
    EncodedControl,
    acts,
    encode_pictures,
    first_size,
    make_injector,
    read_controls,
    settle,
)
from scaleweaver.estimate import Estimate, estimate
from scaleweaver.graphs import GraphedBackbone, backbone_of
from scaleweaver.images import to_pil
from scaleweaver.loop import SingleModel, generate
from scaleweaver.metadata import write_settings
from scaleweaver.precision import other_than_float32
from scaleweaver.quantize import check_format, quantize
from scaleweaver.request import (
    Callback,
    Follower,
    Lineage,
    Numbers,
    Request,
    check_call,
    read_features,
    read_guidance,
    read_numbers,
    read_prompts,
    read_schedule,
    with_parts,
)
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.tokenizers.tiling import Tiles


@dataclass
class VARPipelineOutput(BaseOutput):
    """Images in the asked form, prompt by prompt, and what made them.

    images: list of PIL pictures, np (B, H, W, 3) or pt (B, 3, H, W) in [0, 1], or the latent (B, d, Hl, Wl). seeds: one
    per image, which makes it again on its own. codes: per scale (B, n, N) uint8. settings: per image, as in its file.
    """

    images: Any
    seeds: list[int]
    latent: Tensor
    codes: list[Tensor]
    settings: list[dict[str, Any]]


class VARControlPipeline(StoredPipeline):
    """Text to image by next-scale prediction, with any number of control images.

    `schedule` says which grids a picture is built from: `ScaleSchedule.to_dict()` for a model of one size, or
    {"family": "infinity", "budget": "1M"} for the aspect-ratio templates. The other numbers are the defaults of a call;
    that of control_guidance_scale holds where a control acts.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        transformer: InfinityTransformer,
        vae: BSQTokenizer,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        schedule: dict[str, Any] | None = None,
        guidance_scale: float | list[float] = 3.0,
        temperature: float | list[float] = 0.5,
        top_k: int = 0,
        top_p: float = 0.97,
        control_guidance_scale: float | list[float] | None = None,
    ) -> None:
        super().__init__()
        if vae.target.width != transformer.config["bits"]:
            raise ValueError(
                f"the tokenizer has {vae.target.width} bits per token, the transformer {transformer.config['bits']};"
                " pass a pair that was trained together"
            )
        self.graphs: GraphedBackbone | None = None
        self._tiles: Tiles | None = None
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            schedule=schedule or {"family": "infinity", "budget": "1M"},
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            control_guidance_scale=control_guidance_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        control: Mapping[str, Any] | Control | Sequence[Control] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: Numbers | None = None,
        control_guidance_scale: Numbers | None = None,
        guidance_layer: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: Numbers | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        schedule: ScaleSchedule | Mapping[str, Any] | None = None,
        cache: CachePolicy | None = None,
        router: Router | None = None,
        sampler: Sampler | None = None,
        search: Search | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | TextFeatures | None = None,
        forced: Sequence[Tensor] | None = None,
        stop_after: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
    ) -> VARPipelineOutput | tuple[Any, ...]:
        """Draw pictures; what is left out comes from the model's config.

        control: {"canny": image}, a Control or a list of them, in any order; an image may be an EncodedControl, or a
        list with one per prompt. guidance_scale, temperature: one number or one per scale. control_guidance_scale:
        weigh controls apart from the text, 1 for not. guidance_layer: guide the state after this layer, not the
        logits; -5 is the fifth from the end. seed: image i gets seed + i, or a list. cache, router, sampler, search:
        see contracts.py. forced: codes (B, n, N) of leading scales. stop_after: number of scales to draw.
        callback_on_step_end(pipe, index, step, {"latent", "preview"}): after every scale; preview() decodes pictures.
        """
        # the plan: a mistake of the caller shows before any network runs
        numbers = (guidance_scale, control_guidance_scale, guidance_layer, temperature, top_k, top_p)
        parts = {"cache": cache, "router": router, "sampler": sampler, "search": search}
        check_call(num_images_per_prompt, output_type, callback_on_step_end)
        texts = read_prompts(prompt, prompt_embeds)
        given = read_controls(control, self.controls)
        plan = self._plan(schedule, height, width, first_size(given))
        controls = [settle(item, plan, len(texts)) for item in given]
        active = sorted((item for item in controls if acts(item, plan)), key=lambda item: item.kind)
        values = with_parts(read_numbers(self.config, *numbers, controlled=bool(active)), parts, forced)
        guidance = read_guidance(values, len(plan), controls, active, len(self.transformer.blocks))
        sampler = sampler or BitwiseSampler(values["temperature"], values["top_k"], values["top_p"])
        generators = make_generators(seed, len(texts) * num_images_per_prompt, generator=generator)
        request = Request(plan, guidance, texts, generators, num_images_per_prompt, controls)

        # conditions: all that does not depend on drawn tokens
        text = read_features(prompt_embeds) if prompt is None else self.encode_prompt(prompt)
        negative = None if negative_prompt is None else self.encode_prompt(negative_prompt, "negative_prompt")
        encoded = [(item, self._encode(item, plan)) for item in active]
        conditions_for = partial(self._conditions, request, text, negative, encoded)
        router = router or SingleModel(self._network())
        conditions = conditions_for(router.route(plan.steps[0]).backbone)

        lineage = Lineage(search, len(generators))
        with self.progress_bar(total=stop_after or len(plan)) as bar:
            follower = Follower(self, bar, callback_on_step_end)
            drawn = generate(
                conditions, plan, router=router, target=self.vae.target, guidance=guidance, sampler=sampler,
                search=lineage if search else None, policy=cache, forced=forced, stop_after=stop_after,
                on_scale=follower, conditions_for=conditions_for,
            )  # fmt: skip

        # pictures, each with the settings that make it again
        values |= {"stop_after": stop_after, "schedule": None if schedule is None else plan.to_dict()}
        values |= {"loras": self._active_loras() or None, "dtype": other_than_float32(self.transformer.dtype)}
        values |= {"quantize": self._quantized}
        settings = [
            request.settings(image, {**values, "model": self.name_or_path, "seed": one.initial_seed()}, negative_prompt)
            for image, one in zip(lineage.origins, follower.generators, strict=True)
        ]
        latent, codes = drawn.latent.clone(), [scale.clone() for scale in drawn.codes]  # ordinary tensors again
        images = self._finish(latent, output_type, settings)
        self.maybe_free_model_hooks()
        result = VARPipelineOutput(images, [entry["seed"] for entry in settings], latent, codes, settings)
        return result if return_dict else result.to_tuple()

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], name: str = "prompt") -> TextFeatures:
        """Text features of prompts, reusable as `prompt_embeds`."""
        texts = check_prompts(prompt, name)
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(f"this pipeline has no text encoder, so {name} cannot be read; pass prompt_embeds")
        return encode_prompts(texts, self.tokenizer, self.text_encoder, self.transformer.config["text_length"])

    @torch.no_grad()
    def encode_control(
        self,
        image: Any,
        kind: str,
        *,
        height: int | None = None,
        width: int | None = None,
        schedule: ScaleSchedule | None = None,
        resize: str = "crop",
    ) -> EncodedControl:
        """The control image (or a list, one per prompt) ready for any number of calls: `control={kind: encoded}`."""
        control = read_controls(Control(kind, image, resize=resize), self.controls)[0]
        return self._encode(control, self._plan(schedule, height, width, first_size([control])))

    def estimate(
        self,
        prompt: str | int | Sequence[str | int] | None = 32,
        *,
        control: Mapping[str, Any] | Control | str | Sequence[Control | str] | None = None,
        reused: bool = False,
        negative_prompt: str | int | Sequence[str | int] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: Numbers | None = None,
        control_guidance_scale: Numbers | None = None,
        guidance_layer: int | None = None,
        num_images_per_prompt: int = 1,
        schedule: ScaleSchedule | Mapping[str, Any] | None = None,
        cache: CachePolicy | None = None,
        router: Router | None = None,
        search: Search | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | TextFeatures | None = None,
        stop_after: int | None = None,
        output_type: str = "pil",
        previews: int = 0,
    ) -> Estimate:
        """What a call with these arguments will take; `print` it. Nothing is computed.

        A prompt may also be its number of tokens, a control its name, or None stand for a picture. reused: the controls
        are at hand, encoded. previews: pictures that are decoded after every scale, for each image.
        """
        return estimate(
            self, prompt, control=control, reused=reused, negative_prompt=negative_prompt, height=height, width=width,
            guidance_scale=guidance_scale, control_guidance_scale=control_guidance_scale, guidance_layer=guidance_layer,
            num_images_per_prompt=num_images_per_prompt, schedule=schedule, cache=cache, router=router, search=search,
            prompt_embeds=prompt_embeds, stop_after=stop_after, output_type=output_type, previews=previews,
        )  # fmt: skip

    @torch.no_grad()
    def preview(self, latent: Tensor) -> list[Image.Image]:
        """Pictures of a latent (B, d, Hl, Wl), finished or after any scale."""
        return to_pil(self._decode(latent))

    def enable_graphs(self, *, most: int = 64, text_multiple: int = 1) -> None:
        """Replay each scale from a CUDA graph; the first picture of each kind records them. See `GraphedBackbone`."""
        self.disable_graphs()
        self.graphs = GraphedBackbone(self.transformer, most=most, text_multiple=text_multiple)

    def disable_graphs(self) -> None:
        """Free the graphs and their memory."""
        if self.graphs is not None:
            self.graphs.clear()
        self.graphs = None

    def enable_vae_tiling(self, size: int = 512, *, overlap: int | None = None, exact: bool = True) -> None:
        """Decode pictures in tiles of `size` pixels, which takes less memory. See `Tiles`."""
        self._tiles = Tiles(size, overlap, exact)

    def disable_vae_tiling(self) -> None:
        """Decode pictures as a whole."""
        self._tiles = None

    def to(self, *args: Any, **kwargs: Any) -> VARControlPipeline:
        """Move to a device or dtype, controls included."""
        super().to(*args, **kwargs)
        for adapter in self.controls.values():
            adapter.to(self.transformer.code_embed.weight)
        return self

    def quantize(self, name: str = "int8") -> VARControlPipeline:
        """Keep the weights of the transformer's blocks in eight bits, through torchao: half the memory of bfloat16.

        Pictures change a little. In place: saving and training need a pipeline that was loaded afresh.
        """
        check_format(name)
        if self._quantized is None:
            quantize(self.transformer, name)
            self._quantized = name
        return self

    def _network(self) -> Any:
        """What draws: the transformer, or its graphs."""
        recorded = self.graphs is not None and self.graphs.backbone is self.transformer
        return self.graphs if recorded else self.transformer

    def _plan(
        self,
        schedule: ScaleSchedule | Mapping[str, Any] | None,
        height: int | None,
        width: int | None,
        control_size: tuple[int, int] | None,
    ) -> ScaleSchedule:
        """`read_schedule`, checked against what the networks can do."""
        plan = read_schedule(schedule, self.config["schedule"], height, width, control_size)
        stride = self.vae.config["stride"] * self.vae.config["patch"]
        if plan.stride != stride or len(plan) > self.transformer.config["max_scales"]:
            raise ValueError(
                f"the schedule has {len(plan)} scales and {plan.stride} pixels per token; this model reads up to"
                f" {self.transformer.config['max_scales']} scales of {stride} pixels per token"
            )
        return plan

    def _encode(self, control: Control, plan: ScaleSchedule) -> EncodedControl:
        if isinstance(control.image, EncodedControl):
            return control.image
        adapter = self.controls[control.kind].to(self._execution_device)
        _onload(self.vae)
        latent = encode_pictures(control, plan, self.vae)
        _onload(self.transformer)
        return EncodedControl.make(control.kind, latent, plan, self.transformer, self.vae.target, adapter)

    def _conditions(
        self,
        request: Request,
        text: TextFeatures,
        negative: TextFeatures | None,
        encoded: Sequence[tuple[Control, EncodedControl]],
        network: Any,
    ) -> Conditions:
        """Conditions of one network; controls act on the backbone they were trained on and on no other."""
        network = backbone_of(network)
        _onload(network)
        made = build(
            network,
            text,
            generators=request.generators,
            branches=request.guidance.branches,
            images_per_prompt=request.images_per_prompt,
            negative=negative,
        )
        if network is self.transformer:
            make = partial(
                make_injector,
                text=made.text,
                schedule=request.plan,
                images_per_prompt=request.images_per_prompt,
            )
            device, sees = made.text.pooled.device, request.guidance.sees_control
            made.injectors = tuple(
                make(
                    control, one, network, self.vae.target, self.controls[control.kind].to(device), sees_control=sees(i)
                )
                for i, (control, one) in enumerate(encoded)
            )
        return made

    def _decode(self, latent: Tensor) -> Tensor:
        """Latents (B, d, Hl, Wl) -> pictures (B, 3, H, W) in [0, 1]; one at a time, so a batch changes nothing."""
        _onload(self.vae)
        latent = latent.to(self.vae.device)
        decode = self.vae.decode if self._tiles is None else partial(self._tiles.decode, self.vae)
        return torch.cat([decode(row) for row in latent.split(1)]) / 2 + 0.5

    def _finish(self, latent: Tensor, output_type: str, settings: Sequence[dict[str, Any]]) -> Any:
        if output_type == "latent":
            return latent
        pictures = self._decode(latent)  # (B, 3, H, W)
        if output_type == "pt":
            return pictures
        if output_type == "np":
            return pictures.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        return [write_settings(image, entry) for image, entry in zip(to_pil(pictures), settings, strict=True)]


def _onload(module: Any) -> None:
    """Bring an offloaded component to its device: offloading hooks `forward` alone, and other methods run too."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
