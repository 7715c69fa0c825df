"""What a pipeline reads from and writes to disk and the Hub: itself, its controls, LoRAs of the image."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from scaleweaver.adapters import (
    CONFIG_FILE,
    LORA_CONFIG_FILE,
    load_control,
    lora_detached,
    remove_control,
    replace_control,
    save_control,
)
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.card_files import Document
from scaleweaver.cards import Card, write_card
from scaleweaver.hub import full_id, locate, locate_control, upload
from scaleweaver.lora import remove_lora
from scaleweaver.methods.scaleweaver import ControlAdapter
from scaleweaver.precision import read_dtype
from scaleweaver.styles import load_style, set_styles

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


class StoredPipeline(DiffusionPipeline):
    """Loading and saving; `VARControlPipeline` adds the networks and draws."""

    transformer: InfinityTransformer

    def __init__(self) -> None:
        super().__init__()
        self.controls: dict[str, ControlAdapter] = {}
        self._loras: dict[str, str] = {}  # name -> where it came from
        self._lora_weights: dict[str, float] = {}  # of those that are on
        self._quantized: str | None = None
        self._card: Document | None = None
        self._control_cards: dict[str, Document] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load "toybox", a folder or a Hub repository, with the controls it holds.

        dtype: float32 unless given; "auto" is `auto_dtype()`, which thinks of the GPU where there is one: for another
        device pass dtype=auto_dtype(device). The other keywords are diffusers' own: ready components (`vae=...`), call
        defaults (`guidance_scale=...`), `device_map`, `variant`, ...
        """
        if dtype is not None and torch_dtype is not None:
            raise ValueError("dtype and torch_dtype were both given; pass dtype alone, torch_dtype is its old name")
        precision = read_dtype(dtype if torch_dtype is None else torch_dtype)
        folder = locate(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        pipe: Self = super().from_pretrained(str(folder), dtype=precision, **kwargs)
        pipe.register_to_config(_name_or_path=os.fspath(pretrained_model_name_or_path))
        for config in sorted((folder / "controls").glob(f"*/{CONFIG_FILE}")):
            pipe.controls[config.parent.name] = load_control(config.parent, pipe.transformer, config.parent.name)
            pipe._keep_card(config.parent.name, config.parent)
        pipe._card = Document.read(folder)
        return pipe

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        card: Card | None = None,
    ) -> None:
        """Write model_index.json, a folder per component, controls/<name>/ and a model card; weights as safetensors.

        The card that the model came with goes along with its pictures; with `card` a new one is written. LoRAs of the
        image are neither written nor merged into the weights, and a warning names them.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{os.fspath(save_directory)!r} is a file; pass a folder")
        self._save(folder, folder.name, card, self._card, max_shard_size=max_shard_size, variant=variant)

    def _save(
        self,
        folder: Path,
        name: str,
        card: Card | None,
        document: Document | None,
        *,
        max_shard_size: int | str | None,
        variant: str | None,
    ) -> None:
        """`save_pretrained` under a name that may not be the folder's; `document` is the card that goes along."""
        if self._quantized is not None:
            raise ValueError(
                f"the transformer's weights were rounded to {self._quantized}; save a pipeline that was loaded afresh"
            )
        with lora_detached(self.transformer):  # the controls' LoRA goes into their own folders
            super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
        if self._loras:
            logger.warning("%s is saved without its LoRAs: load %s again", folder, ", ".join(self._loras))
        stale = {file.parent.name for file in folder.glob(f"controls/*/{CONFIG_FILE}")} - set(self.controls)
        if stale:
            logger.warning("%s also holds controls that this pipeline has not: %s", folder, ", ".join(sorted(stale)))
        for kind, adapter in self.controls.items():
            if kind in self._control_cards:
                self._control_cards[kind].write(folder / "controls" / kind)
            save_control(folder / "controls" / kind, self.transformer, adapter, kind, base=name)
        if document is not None and card is None:
            document.write(folder)
        if card is not None or not (folder / "README.md").exists():
            write_card(folder, card or Card(), name=name)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload VARControlPipeline",
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        card: Card | None = None,
    ) -> str:
        """Save to a Hub repository, made if it is not there; returns the address of the commit.

        The card that the model came with goes along; with `card`, or where there was none, one is written.
        """
        name = full_id(repo_id, token=token)
        with tempfile.TemporaryDirectory() as temporary:
            document = None if self._card is None else self._card.renamed(name)
            self._save(Path(temporary), name, card, document, max_shard_size=max_shard_size, variant=variant)
            return upload(
                temporary, name, private=private, token=token, commit_message=commit_message, create_pr=create_pr
            )

    def push_control(
        self,
        name: str,
        repo_id: str,
        *,
        card: Card | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload control",
        create_pr: bool = False,
    ) -> str:
        """Save one control to a Hub repository of its own, for `load_control`; returns the address of the commit.

        Cards as in `push_to_hub`.
        """
        self._require_control(name)
        repo_id = full_id(repo_id, token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder, base = Path(temporary), self.name_or_path or None
            if name in self._control_cards and card is None:
                self._control_cards[name].of_control(repo_id, name, base).write(folder)
            save_control(folder, self.transformer, self.controls[name], name, base=base)
            if card is not None or name not in self._control_cards:
                write_card(folder, card or Card(), name=repo_id, base=base)
            return upload(
                folder, repo_id, private=private, token=token, commit_message=commit_message, create_pr=create_pr
            )

    def _keep_card(self, name: str, folder: Path) -> None:
        """Remember what a control's folder says of it."""
        document = Document.read(folder)
        if document is None:
            self._control_cards.pop(name, None)
        else:
            self._control_cards[name] = document

    def _require_control(self, name: str) -> None:
        if name not in self.controls:
            raise ValueError(f'control "{name}" is not loaded; there is {", ".join(self.controls) or "none"}')

    @property
    def available_controls(self) -> tuple[str, ...]:
        """Names that `control=` takes."""
        return tuple(self.controls)

    def load_control(
        self,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
        replace: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        """Add a control from a folder or Hub repository under `name`, by default its kind; returns the name.

        With `replace` it takes the place of one of that name: in the same modules if it has their form, so compiled
        graphs stay valid. A control that does not fit leaves everything as it was.
        """
        folder, kind = locate_control(
            source, name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        name = name or kind
        held = self.controls.get(name)
        if held is not None and not replace:
            raise ValueError(f'control "{name}" is already loaded; pass replace=True, or another name=')
        if held is None:
            self.controls[name] = load_control(folder, self.transformer, name)
        else:
            self.controls[name] = replace_control(folder, self.transformer, held, name)
        self._keep_card(name, folder)
        return name

    def unload_control(self, name: str) -> None:
        """Remove a control and its LoRA from the backbone."""
        self._require_control(name)
        remove_control(self.transformer, name)
        del self.controls[name]
        self._control_cards.pop(name, None)

    @property
    def available_loras(self) -> tuple[str, ...]:
        """Names that `set_adapters` takes."""
        return tuple(self._loras)

    def load_lora_weights(
        self,
        source: str | os.PathLike[str],
        adapter_name: str | None = None,
        scale: float = 1.0,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        """Add a LoRA of the image (a style, a subject) from a folder or Hub repository in PEFT's format.

        The newest alone is on, as in diffusers; `set_adapters` chooses and combines. Controls do not see it. Returns
        its name, by default default_0, default_1, ...
        """
        folder = locate(
            source,
            marker=LORA_CONFIG_FILE,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        free = (name for number in count() if (name := f"default_{number}") not in self._loras)
        name = adapter_name or next(free)
        weight = _weight(scale)
        load_style(folder, self.transformer, name)
        self._loras[name] = os.fspath(source)
        self.set_adapters(name, weight)
        return name

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Switch these LoRAs on, with one weight for all or one for each (1 unless given), and all others off."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self._loras:
                kind = "is a control, which control= of a call switches" if name in self.controls else "is not loaded"
                raise ValueError(f"LoRA {name!r} {kind}; there is {', '.join(self._loras) or 'none'}")
        given = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(given) != len(names) or len(set(names)) != len(names):
            raise ValueError(
                f"{len(given)} weights for the LoRAs {names}; name each once and pass one weight or one each"
            )
        self._lora_weights = {name: 1.0 if x is None else _weight(x) for name, x in zip(names, given, strict=True)}
        set_styles(self.transformer, self._lora_weights)

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Remove one LoRA, or all of them; the rest stay as they are."""
        if adapter_name is not None and adapter_name not in self._loras:
            raise ValueError(f"LoRA {adapter_name!r} is not loaded; there is {', '.join(self._loras) or 'none'}")
        for name in list(self._loras) if adapter_name is None else [adapter_name]:
            remove_lora(self.transformer, name)
            del self._loras[name]
            self._lora_weights.pop(name, None)

    def _active_loras(self) -> list[dict[str, Any]]:
        """What settings keep of the LoRAs that are on."""
        return [
            {"name": name, "source": self._loras[name], "weight": weight} for name, weight in self._lora_weights.items()
        ]


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"the weight of a LoRA is {value!r}; pass a number") from None
    if not math.isfinite(weight):
        raise ValueError(f"the weight of a LoRA is {value}; pass a finite number")
    return weight
