"""Recipe "control": ScaleWeaver adapters from pictures and the control maps made of them.

ScaleWeaver (arXiv 2510.14882): teacher forcing, only the condition stream's LoRA, the zero-initialised projections and
the type embedding learn. Inferred: text and control are dropped independently of each other for one sample in ten,
maps vary as detectors do, and the projections have a learning rate of their own.
Several controls may learn in one run: every sample sees one of them, or two (`pairs`), each with an adapter of its own.
The backbone is frozen, as in the paper, unless `backbone_lr_scale` is set: backbone and text encoder then learn along,
on samples with and without a control. The built-in model needs that, see docs/architecture.md.
Pictures are renders of the built-in world or a user's photos in aspect buckets, see docs/train.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn

from scaleweaver.adapters import add_control, save_control, trainable_parameters
from scaleweaver.backbones.layers import CrossAttention, FeedForward, SelfAttention
from scaleweaver.contracts import Control, TextFeatures
from scaleweaver.evaluate.control import canny_f1
from scaleweaver.lora import lora_layers
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.pipeline import VARControlPipeline, VARPipelineOutput
from scaleweaver.precision import read_dtype
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.train.backbone import decay_groups
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control_loss import ControlLoss
from scaleweaver.train.data import (
    CachedText,
    Pixels,
    Renders,
    as_images,
    as_latents,
    as_pixels,
    cached_text,
    latent_reader,
    save_grid,
    stores_of,
    to_images,
)
from scaleweaver.train.maps import exact_map, varied_map
from scaleweaver.train.photo_setup import PHOTO_OPTIONS, encoded_texts, open_photos, photo_folder, with_records
from scaleweaver.train.photos import Photos, photo_latents
from scaleweaver.train.processes import Share

Maps = Mapping[str, Mapping[int, Pixels]]  # control -> position in the batch -> map (H, W, 3)
_UNSEEN: Pixels = np.empty((0, 0, 3), np.uint8)  # stands for the map of a row that another process works on
_NOBODY = -1  # position of a map that only keeps processes with sharded weights in step: all encode the same controls


class ControlRecipe:
    """Options: data, val_data, model (pipeline folder), latents (cache folder), strength, by_magnitude (`bit_loss`
    weighs bits by the rest that they stand for; in one process), explicit_captions (share of renders whose caption
    says everything, 0 by default; with text_cache=false), text_dropout, control_dropout, z_lr_scale, text_cache (keep
    the features of all captions beside the latents, on by default where the pictures are in stores: it pays where a run
    reads the captions several times), backbone_lr_scale (0, the default: the backbone is frozen and the result is the
    controls; above 0 backbone and text encoder learn at this multiple of the learning rate and the result is a whole
    pipeline), dtype (number format of what is frozen; what learns is float32), gradient_checkpointing (both streams are
    run again in the backward pass instead of kept), val_rows and val_pictures (held-out pictures for the losses and
    the sheet).

    Which controls: kind, name and adapter (ScaleWeaverConfig fields) for one, or controls, a mapping from names to
    such fields (kind is the name unless given) for several. Among the fields, start_from names a control of the model
    whose weights and form the new one begins with. pairs: share of samples that see two controls.

    data may also be a folder of photos, as a path or {photos: FOLDER}; their own options are in `photo_setup`. Their
    texts are encoded first, unless text_cache is false, and the text encoder is then out of memory.
    """

    option_names = PHOTO_OPTIONS | frozenset((
        "data", "val_data", "model", "latents", "kind", "name", "adapter", "controls", "pairs", "strength",
        "by_magnitude", "explicit_captions", "text_dropout", "control_dropout", "z_lr_scale", "text_cache",
        "backbone_lr_scale", "dtype", "gradient_checkpointing", "val_rows", "val_pictures",
    ))  # fmt: skip

    def __init__(self, config: TrainConfig):
        options = config.options.among(self.option_names)
        self.backbone_lr_scale: float = options.get("backbone_lr_scale", 0.0)
        whole = self.backbone_lr_scale > 0
        if self.backbone_lr_scale < 0:
            raise ValueError(f"backbone_lr_scale={self.backbone_lr_scale}: expected 0 (frozen) or more")
        if whole and options.get("text_cache"):
            raise ValueError("text_cache keeps features that a trained text encoder outgrows; set it to false")
        wanted = wanted_controls(options)
        photos = photo_folder(options["data"])
        torch.manual_seed(config.seed)
        self.config, self.seed = config, config.seed
        self.share = Share.own()
        self.share.rows(config.batch)  # complains before anything is read
        if options.get("by_magnitude") and self.share.count > 1:
            raise ValueError(
                "by_magnitude weighs bits by the mean over a whole batch, which several processes do not have; leave "
                "it out, or train in one process"
            )
        self.caches_text = _caches_text(options, photos is not None, whole)
        if options.get("explicit_captions") and (photos is not None or self.caches_text):
            raise ValueError(
                "explicit_captions needs renders and text_cache=false: what photos show is not known, and features "
                "are kept of the wordings alone"
            )
        self.sharded = False
        # the captions of renders are encoded by the pipeline's encoder, those of photos before it is loaded
        keeps_text = photos is None or not self.caches_text
        precision = read_dtype(options.get("dtype"))
        if whole and precision not in (None, torch.float32):
            raise ValueError("a backbone that learns needs float32; leave dtype out and set precision to bf16")
        parts: dict[str, Any] = {} if keeps_text else {"text_encoder": None}
        self.pipe = VARControlPipeline.from_pretrained(options["model"], dtype=precision, **parts)
        self.pipe.set_progress_bar_config(disable=True)
        self.latent_folder = Path(options.get("latents", Path(config.out) / "latents"))
        self.pictures: Renders | Photos
        self.held_out: Renders | Photos
        self.text: CachedText | None = None
        self.held_out_text: CachedText | None = None
        if photos is None:
            schedules = self._read_renders(options, wanted)
        else:
            with PartialState().main_process_first():  # the others read what the first has computed
                self.pictures, self.held_out = open_photos(self.pipe, photos, options, config, self.latent_folder)
            wanted = with_records(wanted, self.pipe, options)
            schedules = self.pictures.schedules + self.held_out.schedules
        replace_controls(self.pipe, wanted)
        self._freeze(whole)
        with PartialState().main_process_first():
            self._read_features(options, keeps_text)
        if options.get("gradient_checkpointing", False):
            self.pipe.transformer.enable_gradient_checkpointing()
        self.model: nn.Module = ControlLoss(
            self.pipe, schedules, options.get("strength", 0.3), whole, options.get("by_magnitude", False)
        )

    def _read_renders(self, options: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[ScaleSchedule]:
        if given := sorted(set(options) & PHOTO_OPTIONS):
            raise ValueError(f"{', '.join(given)} is for photos; leave it out, or set data to a folder of photos")
        self.pictures, self.held_out = Renders(options["data"]), Renders(options["val_data"])
        height, width = self.pictures.image(0).shape[:2]
        schedule = self.pipe._plan(None, height, width, None)
        if (schedule.height, schedule.width) != (height, width):
            raise ValueError(
                f"the pictures are {width}x{height}, the model draws {schedule.width}x{schedule.height}; "
                "render them in that size"
            )
        return [schedule]

    def _freeze(self, whole: bool) -> None:
        """Only the controls learn, in float32; with `whole` the networks do too."""
        own = {id(p): p for name in self.pipe.controls for p in self._trained(name).values()}
        for network in (self.pipe.transformer, self.pipe.text_encoder, self.pipe.vae):
            if network is None:
                continue
            network.eval().to(PartialState().device)
            for parameter in network.parameters():
                parameter.requires_grad_(id(parameter) in own)
        for adapter in self.pipe.controls.values():
            adapter.to(PartialState().device)
        for parameter in own.values():
            parameter.data = parameter.data.float()
        if whole:
            self.pipe.transformer.requires_grad_(True)
            self.pipe.text_encoder.requires_grad_(True)
            self.pipe._card = None  # it describes the weights that this run starts from

    def _read_features(self, options: Mapping[str, Any], keeps_text: bool) -> None:
        """Latents of the pictures and, where they are kept, features of their captions."""
        vae, folder = self.pipe.vae, self.latent_folder
        if isinstance(self.pictures, Photos) and isinstance(self.held_out, Photos):
            for photos in (self.pictures, self.held_out):
                photos.check_maps({name: adapter.config for name, adapter in self.pipe.controls.items()})
            cached = options.get("latent_cache", True)
            self.latents = photo_latents(folder / "train", vae, self.pictures, cached=cached)
            self.held_out_latents = photo_latents(folder / "val", vae, self.held_out, cached=cached)
            if not keeps_text:
                both = (self.pictures, self.held_out)
                self.text, self.held_out_text = encoded_texts(self.pipe, options, folder, both)
            return
        assert isinstance(self.pictures, Renders) and isinstance(self.held_out, Renders)
        self.latents = latent_reader(folder / "train", vae, self.pictures)
        self.held_out_latents = latent_reader(folder / "val", vae, self.held_out)
        if self.caches_text:
            limit = self.pipe.transformer.config["text_length"]
            encoder, tokenizer = self.pipe.text_encoder, self.pipe.tokenizer
            self.text = cached_text(folder / "text", encoder, tokenizer, self.pictures, max_length=limit)

    def networks(self) -> Iterable[nn.Module]:
        """See `compiled.Compilable`. Not the blocks: who sees which control changes with every batch."""
        parts = [part for block in self.pipe.transformer.blocks for part in (block.cross, block.ffn)]
        return [self.pipe.vae.encoder, *parts]

    def sharding(self) -> tuple[list[nn.Module], dict[type[nn.Module], tuple[str, ...]]]:
        """See `processes.Shardable`; pictures are not drawn in such a run, since no process has the weights."""
        self.sharded = True
        adapters = [
            module
            for _, layer in lora_layers(self.pipe.transformer)
            for part in (layer.lora_A, layer.lora_B)
            for module in part.values()
        ]
        whole = [*self.pipe.controls.values(), *adapters, self.pipe.vae, self.pipe.text_encoder]
        units: dict[type[nn.Module], tuple[str, ...]] = {
            SelfAttention: ("project", "output"), CrossAttention: ("keys_values",), FeedForward: (),
        }  # fmt: skip
        return [module for module in whole if module is not None], units

    def _trained(self, name: str) -> dict[str, nn.Parameter]:
        return trainable_parameters(self.pipe.transformer, self.pipe.controls[name], name)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        named = [(key, p) for name in self.pipe.controls for key, p in self._trained(name).items()]
        z = [p for key, p in named if ".z." in key]
        other = [p for key, p in named if ".z." not in key]
        groups: list[dict[str, Any]] = [{"params": z, "lr_scale": self.config.options.get("z_lr_scale", 1.0)}]
        groups.append({"params": other})
        if self.backbone_lr_scale:
            own = {id(p) for _, p in named}
            networks = (self.pipe.transformer, self.pipe.text_encoder)
            weights = [(n, p) for network in networks for n, p in network.named_parameters() if id(p) not in own]
            groups += [{**group, "lr_scale": self.backbone_lr_scale} for group in decay_groups(weights)]
        return groups

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        options = self.config.options
        rng = np.random.default_rng((self.seed, index))
        rows = self.pictures.rows(self.seed, index * size, size)
        captions = [self.pictures.captions(r) for r in rows]
        wordings = [int(rng.integers(len(each))) for each in captions]
        drop = rng.random(size) < options.get("text_dropout", 0.1)
        mine = self.share.rows(size)
        maps = self._maps(rows, rng, mine)
        own = [rows[position] for position in mine]
        if self.text is None:
            texts = [captions[position][wordings[position]] for position in mine]
            if isinstance(self.pictures, Renders):
                # drawn for all rows, as everything else that is random
                full = np.random.default_rng((self.seed, index, 1)).random(size) < options.get("explicit_captions", 0.0)
                texts = self.pictures.told_in_full(own, texts, full[mine.start : mine.stop].tolist())
            text = self._tokens(texts)
        else:
            features, lengths = self.text.read(own, [wordings[position] for position in mine])
            text = {"features": features, "lengths": lengths}
        # pictures that are rendered when read are encoded where the step runs
        if isinstance(self.pictures, Renders) and self.pictures.online:
            pictures = as_images(self.pictures, own)
        else:
            pictures = as_latents(self.latents(own))
        batch = self._batch(pictures, text, maps, drop[mine.start : mine.stop])
        if self.share.count > 1:
            batch["share"] = torch.tensor([self.share.index, self.share.count])
        return batch

    def _maps(self, rows: Sequence[int], rng: np.random.Generator, mine: range) -> Maps:
        """What each sample sees: nothing, one control or two. Drawn for all rows, kept for one's own, by position."""
        options = self.config.options
        maps: dict[str, dict[int, Pixels]] = {name: {} for name in self.pipe.controls}
        for position, row in enumerate(rows):
            if rng.random() < options.get("control_dropout", 0.1):
                continue
            left = 2 if rng.random() < options.get("pairs", 0.0) else 1
            for name in rng.permutation(list(maps)):
                found = self._varied_map(name, row, rng, position in mine) if left else None
                if found is not None:
                    maps[name][position], left = found, left - 1
        if not any(maps.values()):  # a frozen backbone alone has no gradient; an empty map is a valid one
            height, width = self._size(self.pictures, rows[0])
            maps[next(iter(maps))][0] = np.zeros((height, width, 3), np.uint8)
        own: dict[str, dict[int, Pixels]] = {}
        for name, drawn in maps.items():
            own[name] = {position - mine.start: pixels for position, pixels in drawn.items() if position in mine}
            if drawn and not own[name] and self.sharded:
                own[name][_NOBODY] = np.zeros((*self._size(self.pictures, rows[0]), 3), np.uint8)
        return own

    def _varied_map(self, name: str, row: int, rng: np.random.Generator, wanted: bool) -> Pixels | None:
        config = self.pipe.controls[name].config
        if isinstance(self.pictures, Renders):
            return varied_map(config, self.pictures, row, rng)
        seed = int(rng.integers(2**63))  # one draw, so that the rows of other processes need not be looked at
        return self.pictures.varied_map(name, config, row, np.random.default_rng(seed)) if wanted else _UNSEEN

    def _exact_map(self, name: str, row: int) -> Pixels | None:
        config = self.pipe.controls[name].config
        if isinstance(self.held_out, Renders):
            return exact_map(config, self.held_out, row)
        return self.held_out.exact_map(name, config, row)

    def _size(self, pictures: Renders | Photos, row: int) -> tuple[int, int]:
        if isinstance(pictures, Photos):
            return pictures.schedule(row).height, pictures.schedule(row).width
        height, width = pictures.image(row).shape[:2]
        return height, width

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        limit = self.pipe.transformer.config["text_length"]
        tokens = self.pipe.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}

    def _batch(self, pictures: dict[str, Tensor], text: dict[str, Tensor], maps: Maps, drop: Any) -> dict[str, Tensor]:
        batch = {**pictures, "drop": torch.from_numpy(drop), **text}
        for name in self.pipe.controls:
            here = maps.get(name, {})
            batch[f"seen.{name}"] = torch.tensor([position in here for position in range(len(drop))])
            if here:
                batch[f"maps.{name}"] = to_images(np.stack([here[position] for position in sorted(here)]))
        return batch

    @torch.no_grad()
    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Teacher-forced loss with each control, and what it gains on the same pictures (the early signal)."""
        options = self.config.options
        count = min(options.get("val_rows", 96), len(self.held_out))
        values = {"loss_without": self._held_out_loss(range(count), {})}
        for name, adapter in self.pipe.controls.items():
            found = {row: self._exact_map(name, row) for row in range(count)}
            maps = {row: pixels for row, pixels in found.items() if pixels is not None}
            if not maps:
                continue
            with_control = self._held_out_loss(list(maps), {name: maps})
            values[f"loss_{name}"] = with_control
            values[f"gain_{name}"] = self._held_out_loss(list(maps), {}) - with_control
            shown = dict(list(maps.items())[: options.get("val_pictures", 24)])
            if self.sharded or not shown:
                continue
            pictures = self._drawn(name, shown)
            if adapter.config.kind == "canny":
                low, high = adapter.config.thresholds or (100, 200)
                scores = [canny_f1(pictures[row], shown[row], low=low, high=high) for row in shown]
                values |= {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
            sizes = sorted({each.shape[:2] for each in shown.values()})
            for height, width in sizes:
                pairs = [
                    np.concatenate([shown[r], pictures[r]]) for r in shown if shown[r].shape[:2] == (height, width)
                ]
                size = f"-{height}x{width}" if len(sizes) > 1 else ""
                save_grid(folder / f"{step:06d}-{name}{size}.png", np.stack(pairs), columns=8)
        return values

    def _parts(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows that go through the networks together: all renders, a batch of photos of one size."""
        if isinstance(self.held_out, Renders):
            return [list(rows)]
        sizes: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            sizes.setdefault(self._size(self.held_out, row), []).append(row)
        step = self.config.batch
        return [each[start : start + step] for each in sizes.values() for start in range(0, len(each), step)]

    def _held_out_loss(self, rows: Sequence[int], maps: Maps) -> float:
        """Mean over rows; maps of a control by row."""
        total = 0.0
        for part in self._parts(rows):
            if self.held_out_text is None:
                text = self._tokens([self.held_out.captions(row)[0] for row in part])
            else:
                features, lengths = self.held_out_text.read(part, [0] * len(part))
                text = {"features": features, "lengths": lengths}
            seen = {name: {part.index(row): found[row] for row in part} for name, found in maps.items()}
            batch = self._batch(as_latents(self.held_out_latents(part)), text, seen, np.zeros(len(part), bool))
            batch = send_to_device(batch, self.pipe.transformer.device)
            total += float(self.model(batch, 0)[0]) * len(part)
        return total / len(rows)

    def _drawn(self, name: str, maps: Mapping[int, Pixels]) -> dict[int, Pixels]:
        """The held-out prompts of some rows drawn under their maps, (H, W, 3) by row."""
        drawn: dict[int, Pixels] = {}
        for part in self._parts(list(maps)):
            height, width = maps[part[0]].shape[:2]
            prompt: dict[str, Any] = {"prompt": [self.held_out.captions(row)[0] for row in part]}
            if self.held_out_text is not None:
                features, lengths = self.held_out_text.read(part, [0] * len(part))
                device = self.pipe.transformer.device
                prompt = {"prompt_embeds": TextFeatures(features.to(device), tuple(lengths.tolist()))}
            control = Control(name, [maps[row] for row in part])
            out = self.pipe(**prompt, control=control, seed=part, output_type="pt", height=height, width=width)
            assert isinstance(out, VARPipelineOutput)
            drawn |= dict(zip(part, as_pixels(out.images * 2 - 1), strict=True))
        return drawn

    def save(self, folder: Path) -> None:
        if self.backbone_lr_scale:
            self.pipe.save_pretrained(folder)
            return
        for name, adapter in self.pipe.controls.items():
            save_control(folder / name, self.pipe.transformer, adapter, name, base=self.pipe.name_or_path or None)


def _caches_text(options: Mapping[str, Any], photos: bool, whole: bool) -> bool:
    """Whether features of captions are kept: unless told otherwise, where the encoder and the pictures stay."""
    if photos:
        return not whole and bool(options.get("text_cache", True))
    online = any(isinstance(source, Mapping) and source.get("online") for source in stores_of(options["data"]))
    return bool(options.get("text_cache", not online and not whole))


def wanted_controls(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of every control to train, by name."""
    if "controls" in options:
        if clash := sorted({"kind", "name", "adapter"} & set(options)):
            raise ValueError(f"controls and {', '.join(clash)} were both set; controls holds the settings of each")
        if not isinstance(options["controls"], Mapping) or not options["controls"]:
            raise ValueError(f"controls is {options['controls']!r}; expected a mapping from names to settings")
        return {name: {"kind": name, **(settings or {})} for name, settings in options["controls"].items()}
    kind: str = options["kind"]
    return {options.get("name", kind): {"kind": kind, **options.get("adapter", {})}}


def replace_controls(pipe: VARControlPipeline, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a pipeline new controls in place of its own: fresh ones, or with `start_from` copies of its own."""
    kept = {}
    for name, adapter in list(pipe.controls.items()):
        values = trainable_parameters(pipe.transformer, adapter, name)
        kept[name] = adapter.config, {key: value.detach().clone() for key, value in values.items()}
        pipe.unload_control(name)
    for name, settings in wanted.items():
        fields = dict(settings)
        source = fields.pop("start_from", None)
        if source is not None:
            if source not in kept:
                raise ValueError(f"start_from is {source!r}; the model has the controls {', '.join(kept) or 'none'}")
            form = kept[source][0].to_dict()
            of_its_maps = ("kind", "detector", "thresholds", "resolution")
            fields = {key: value for key, value in form.items() if key not in of_its_maps} | fields
        adapter = add_control(pipe.transformer, ScaleWeaverConfig.from_dict(fields), name)
        if source is not None:
            with torch.no_grad():
                for key, parameter in trainable_parameters(pipe.transformer, adapter, name).items():
                    parameter.copy_(kept[source][1][key])
        pipe.controls[name] = adapter
