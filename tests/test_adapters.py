"""Adding, switching, saving, loading and removing controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import BITS, PATCH, tiny_backbone, tiny_schedule, tiny_text
from torch import Tensor

from scaleweaver.adapters import (
    add_control,
    load_control,
    lora_detached,
    lora_enabled,
    remove_control,
    replace_control,
    save_control,
    trainable_parameters,
)
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.cache import KVCache
from scaleweaver.lora import lora_layers, lora_names, remove_lora
from scaleweaver.methods.scaleweaver import ControlAdapter, ScaleWeaverConfig, encode
from scaleweaver.reference import ReferenceInjector
from scaleweaver.tokenizers.target import ResidualTarget

SCHEDULE = tiny_schedule()
TARGET = ResidualTarget(BITS, PATCH)
CONFIG = ScaleWeaverConfig(
    kind="canny",
    lora_rank=4,
    lora_alpha=8,
    inject_blocks=(0, 2),
    detector="cv2.Canny",
    thresholds=(100, 200),
    resolution=32,
)


def trained(backbone: Any, name: str = "canny", config: ScaleWeaverConfig = CONFIG) -> ControlAdapter:
    adapter = add_control(backbone, config, name)
    with torch.no_grad():
        for index, parameter in enumerate(trainable_parameters(backbone, adapter, name).values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    return adapter


@torch.no_grad()
def logits(backbone: Any, adapter: ControlAdapter | None = None, name: str = "canny") -> Tensor:
    latent = torch.randn(2, BITS, *TARGET.final_grid(SCHEDULE), generator=torch.Generator().manual_seed(5))
    injectors = []
    if adapter is not None:
        bank = encode(backbone, adapter, name, latent[1:], SCHEDULE, TARGET)
        injectors.append(ReferenceInjector(bank, adapter, (1.0,) * len(SCHEDULE)))
    inputs, _, _ = TARGET.labels(latent[:1], SCHEDULE)
    return backbone(inputs, SCHEDULE.steps, backbone.encode_text(tiny_text([4])), KVCache(), injectors=injectors)


def grads(backbone: Any) -> list[bool]:
    return [parameter.requires_grad for parameter in backbone.parameters()]


def test_switch_changes_outputs_and_never_requires_grad() -> None:
    backbone = tiny_backbone()
    base = logits(backbone)
    trained(backbone)
    before = grads(backbone)
    assert torch.equal(logits(backbone), base)
    with lora_enabled(backbone, "canny"):
        assert (logits(backbone) - base).abs().max() > 1e-3
        assert grads(backbone) == before
        with lora_enabled(backbone, "nobody"):
            assert torch.equal(logits(backbone), base)
        assert (logits(backbone) - base).abs().max() > 1e-3
    assert torch.equal(logits(backbone), base) and grads(backbone) == before
    with pytest.raises(RuntimeError, match="stop"), lora_enabled(backbone, "canny"):
        raise RuntimeError("stop")
    assert torch.equal(logits(backbone), base)


def test_only_the_control_is_trainable_and_a_second_one_leaves_the_first_so() -> None:
    backbone = tiny_backbone()
    first = add_control(backbone, CONFIG, "canny")
    second = add_control(backbone, CONFIG, "depth")
    own = {
        id(p) for n, a in (("canny", first), ("depth", second)) for p in trainable_parameters(backbone, a, n).values()
    }
    assert all(parameter.requires_grad == (id(parameter) in own) for parameter in backbone.parameters())
    # nothing behind the keys and values of the last injected block is ever used
    paths = [path for path, _ in lora_layers(backbone, "canny")]
    assert paths == [
        f"blocks.{path}" for path in ("0.attn.qkv", "0.attn.proj", "1.attn.qkv", "1.attn.proj", "2.attn.qkv")
    ]
    with pytest.raises(ValueError, match="already holds an adapter 'depth'"):
        add_control(backbone, CONFIG, "depth")


def test_a_style_lora_acts_on_the_image_and_not_on_the_condition() -> None:
    backbone = tiny_backbone()
    adapter = trained(backbone)
    bank = encode(backbone, adapter, "canny", torch.ones(1, BITS, 8, 8), SCHEDULE, TARGET)
    base = logits(backbone)
    backbone.add_adapter(LoraConfig(r=2, target_modules=r".*attn\.qkv", init_lora_weights=False), "style")
    styled = logits(backbone)
    assert (styled - base).abs().max() > 1e-3
    again = encode(backbone, adapter, "canny", torch.ones(1, BITS, 8, 8), SCHEDULE, TARGET)
    assert all(torch.equal(again.values[layer], v) for layer, v in bank.values.items())
    add_control(backbone, CONFIG, "depth")
    assert torch.equal(logits(backbone), styled)
    remove_control(backbone, "canny")
    remove_control(backbone, "depth")
    assert torch.equal(logits(backbone), styled) and lora_names(backbone) == ("style",)


def test_removing_a_style_that_is_on_switches_no_control_on() -> None:
    backbone = tiny_backbone()
    base = logits(backbone)
    trained(backbone)
    backbone.add_adapter(LoraConfig(r=2, target_modules=r".*attn\.qkv", init_lora_weights=False), "style")
    assert not torch.equal(logits(backbone), base)
    remove_lora(backbone, "style")
    assert torch.equal(logits(backbone), base) and lora_names(backbone) == ("canny",)


def test_a_control_is_replaced_by_one_of_any_form(tmp_path: Path) -> None:
    other = tiny_backbone()
    forms = {"same": CONFIG, "alpha": {"lora_alpha": 3}, "rank": {"lora_rank": 2}, "blocks": {"inject_blocks": "all"}}
    for name, change in forms.items():
        config = CONFIG if change is CONFIG else ScaleWeaverConfig.from_dict({**CONFIG.to_dict(), **change})  # type: ignore[dict-item]
        save_control(tmp_path / name, other, trained(other, name, config), name)
    for name in forms:
        backbone, fresh = tiny_backbone(), tiny_backbone()
        held = add_control(backbone, CONFIG, "canny")
        edition = held.edition
        adapter = replace_control(tmp_path / name, backbone, held, "canny")
        assert (adapter is held) == (name in ("same", "alpha")) and adapter.edition != edition
        loaded = load_control(tmp_path / name, fresh, "canny")
        assert adapter.config == loaded.config
        assert torch.equal(logits(backbone, adapter), logits(fresh, loaded))
        assert all(p.requires_grad for p in trainable_parameters(backbone, adapter, "canny").values())


def test_removing_gives_the_plain_model_back() -> None:
    backbone, plain = tiny_backbone(), tiny_backbone()
    trained(backbone)
    remove_control(backbone, "canny")
    assert [type(m) for m in backbone.modules()] == [type(m) for m in plain.modules()]
    assert backbone.state_dict().keys() == plain.state_dict().keys() and lora_names(backbone) == ()
    assert torch.equal(logits(backbone), logits(plain))
    trained(backbone)  # and it can come again
    with pytest.raises(ValueError, match="no adapter 'depth'"):
        remove_control(backbone, "depth")


def test_the_backbone_saves_without_its_controls(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    adapter = trained(backbone)
    controlled = logits(backbone, adapter)
    with lora_detached(backbone):
        backbone.save_pretrained(tmp_path)
    assert torch.equal(logits(backbone, adapter), controlled)
    again, plain = InfinityTransformer.from_pretrained(tmp_path).state_dict(), tiny_backbone().state_dict()
    assert again.keys() == plain.keys() and all(torch.equal(again[key], x) for key, x in plain.items())


@pytest.mark.parametrize(
    "change",
    [{}, {"fusion": "joint", "scope": "causal"}, {"inject_blocks": "last_half", "z_init": "normal"}, {"lora_rank": 1}],
)
def test_round_trip_under_another_name(tmp_path: Path, change: dict[str, Any]) -> None:
    backbone = tiny_backbone()
    config = ScaleWeaverConfig.from_dict({**CONFIG.to_dict(), **change})
    adapter = trained(backbone, config=config)
    save_control(tmp_path / "canny", backbone, adapter, "canny")
    names = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "control.safetensors",
        "control_config.json",
    }
    assert {file.name for file in (tmp_path / "canny").iterdir()} == names
    fresh = tiny_backbone()
    loaded = load_control(tmp_path / "canny", fresh, "edges")
    assert loaded.config == adapter.config
    assert not any(parameter.requires_grad for parameter in trainable_parameters(fresh, loaded, "edges").values())
    assert torch.equal(logits(fresh, loaded, "edges"), logits(backbone, adapter))
    more = load_control(tmp_path / "canny", fresh, "more", trainable=True)
    assert all(parameter.requires_grad for parameter in trainable_parameters(fresh, more, "more").values())


def test_peft_reads_the_lora(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    save_control(tmp_path, backbone, trained(backbone), "canny")
    with lora_enabled(backbone, "canny"):
        expected = logits(backbone)
    peft_model = PeftModel.from_pretrained(tiny_backbone(), str(tmp_path))
    assert torch.equal(logits(peft_model.base_model.model), expected)


def test_control_of_another_model_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    save_control(tmp_path, backbone, trained(backbone), "canny")
    for sizes, said in (({"depth": 4}, "depth 3"), ({"width": 48}, "width 32"), ({"heads": 4}, "heads 2")):
        other = tiny_backbone(**sizes)
        keys = other.state_dict().keys()
        with pytest.raises(ValueError, match=rf"{said} \(this model: "):
            load_control(tmp_path, other, "canny")
        assert other.state_dict().keys() == keys and lora_names(other) == ()


def _truncate(folder: Path) -> None:
    file = folder / "control.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _edit_weights(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def _edit_json(folder: Path, name: str, **values: Any) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **values}))


DAMAGE = {
    "control.safetensors is damaged": _truncate,
    "adapter_model.safetensors is missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "control_config.json is missing": lambda folder: (folder / "control_config.json").unlink(),
    "no readable JSON": lambda folder: (folder / "control_config.json").write_text("{"),
    "expected an object": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "missing z.0.weight": lambda folder: _edit_weights(folder, "control.safetensors", lambda t: t.pop("z.0.weight")),
    r"type_embed is \(1, 1, 3\), expected \(1, 1, 32\)": lambda folder: _edit_weights(
        folder, "control.safetensors", lambda t: t.update(type_embed=torch.zeros(1, 1, 3))
    ),
    "unknown extra": lambda folder: _edit_weights(
        folder, "adapter_model.safetensors", lambda t: t.update(extra=torch.zeros(1))
    ),
    "rank 7": lambda folder: _edit_json(folder, "adapter_config.json", r=7),
    "format 2": lambda folder: _edit_json(folder, "control_config.json", format=2),
    "lacks the kind, the settings": lambda folder: _edit_json(folder, "control_config.json", config={}),
    "or the backbone": lambda folder: _edit_json(folder, "control_config.json", backbone=[]),
    "control_config.json is damaged": lambda folder: _edit_json(
        folder, "control_config.json", config={"kind": "canny", "thresholds": 3}
    ),
}


@pytest.mark.parametrize("said", list(DAMAGE))
def test_damaged_folders_say_what_is_wrong_and_change_nothing(tmp_path: Path, said: str) -> None:
    backbone = tiny_backbone()
    save_control(tmp_path, backbone, trained(backbone), "canny")
    DAMAGE[said](tmp_path)
    fresh = tiny_backbone()
    keys = fresh.state_dict().keys()
    with pytest.raises(ValueError, match=said):
        load_control(tmp_path, fresh, "canny")
    assert fresh.state_dict().keys() == keys and lora_names(fresh) == ()


@pytest.mark.parametrize("name", ["", "a.b", "../x", "lora", "keys", "weight", "-a"])
def test_names_that_break_files_or_peft_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="control name"):
        add_control(tiny_backbone(), CONFIG, name)


def test_targets_must_exist() -> None:
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match="check lora_targets"):
        add_control(backbone, ScaleWeaverConfig(kind="canny", lora_targets=("attention.q",)), "canny")
    with pytest.raises(ValueError, match="expected linear layers"):
        add_control(backbone, ScaleWeaverConfig(kind="canny", lora_targets=("ffn",), inject_blocks=(0, 1)), "canny")
    adapter = add_control(
        backbone, ScaleWeaverConfig(kind="canny", lora_targets=("attn.qkv", "ffn.fc1"), inject_blocks=(0, 1)), "canny"
    )
    paths = [path for path, _ in lora_layers(backbone, "canny")]
    assert paths == ["blocks.0.attn.qkv", "blocks.0.ffn.fc1", "blocks.1.attn.qkv"] and adapter.blocks == (0, 1)
