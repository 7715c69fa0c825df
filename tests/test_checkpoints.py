"""Controls that are swapped and LoRAs of the image, in a pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_backbone
from tiny_pipeline import PROMPT, add_tiny_control, edges, latent, tiny_pipeline

from scaleweaver.adapters import lora_enabled, save_control
from scaleweaver.contracts import Control
from scaleweaver.lora import lora_names
from scaleweaver.metadata import python_of, read_settings
from scaleweaver.pipeline import VARControlPipeline

# of every kind: on tokens, on the prompt, and where the condition pass begins
TARGETS = r".*(attn\.qkv|attn\.proj|cross\.kv|ffn\.fc1|code_embed|shared_modulation)"


def write_control(folder: Path, seed: int, **config: Any) -> Path:
    pipe = tiny_pipeline()
    add_tiny_control(pipe, "canny", seed, **config)
    save_control(folder, pipe.transformer, pipe.controls["canny"], "canny")
    return folder


def write_lora(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A LoRA of random weights in PEFT's format, by PEFT."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, **config}
    model: Any = get_peft_model(tiny_backbone(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Controls "one", "two" of one form, "other" of another, LoRAs "style" and "subject"."""
    root = tmp_path_factory.mktemp("adapters")
    write_control(root / "one", 1)
    write_control(root / "two", 2, lora_alpha=5)
    write_control(root / "other", 3, lora_rank=3, fusion="joint", inject_blocks="all")
    write_lora(root / "style", 1)
    write_lora(root / "subject", 2, r=3, rank_pattern={r"0\.attn\.qkv": 1}, use_rslora=True)
    return root


def drawn_with(folder: Path, **arguments: Any) -> torch.Tensor:
    """What a fresh pipeline draws under the control of a folder."""
    pipe = tiny_pipeline()
    pipe.load_control(folder, "canny")
    return latent(pipe, control={"canny": edges()}, **arguments)


# controls


def test_loading_and_unloading(folders: Path) -> None:
    pipe = tiny_pipeline()
    plain = latent(pipe)
    assert pipe.available_controls == ()
    assert pipe.load_control(folders / "one") == "canny"
    assert pipe.load_control(folders / "one", "again") == "again"
    assert pipe.available_controls == ("canny", "again")
    assert torch.equal(latent(pipe, control={"again": edges()}), latent(pipe, control={"canny": edges()}))
    assert torch.equal(latent(pipe), plain)
    with pytest.raises(ValueError, match="already loaded; pass replace=True"):
        pipe.load_control(folders / "one")
    with pytest.raises(ValueError, match=r"no control_config\.json"):
        pipe.load_control(folders / "style")
    for name in ("canny", "again"):
        pipe.unload_control(name)
    with pytest.raises(ValueError, match='"canny" is not loaded; there is none'):
        pipe.unload_control("canny")
    assert torch.equal(latent(pipe), plain)
    assert set(pipe.transformer.state_dict()) == set(tiny_backbone().state_dict())


def test_a_control_of_the_same_form_is_swapped_in_place(folders: Path) -> None:
    pipe = tiny_pipeline()
    pipe.load_control(folders / "one", "canny")
    encoded = pipe.encode_control(edges(), "canny")
    before = [id(module) for module in pipe.transformer.modules()], id(pipe.controls["canny"])
    assert pipe.load_control(folders / "two", "canny", replace=True) == "canny"
    assert ([id(module) for module in pipe.transformer.modules()], id(pipe.controls["canny"])) == before
    two = latent(pipe, control={"canny": edges()})
    assert torch.equal(two, drawn_with(folders / "two")) and not torch.equal(two, drawn_with(folders / "one"))
    assert not any(parameter.requires_grad for parameter in pipe.transformer.parameters())
    with pytest.raises(ValueError, match="weights that were replaced since; encode it again"):
        pipe(PROMPT, control={"canny": encoded})
    assert torch.equal(latent(pipe, control={"canny": pipe.encode_control(edges(), "canny")}), two)


def test_compiled_layers_outlive_a_swap(folders: Path) -> None:
    write_control(folders / "three", 4)  # the alpha of "one": a compiled graph holds that number
    pipe = tiny_pipeline()
    pipe.load_control(folders / "one", "canny")
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    layer = torch.compile(pipe.transformer.blocks[0].attn.qkv, backend=backend)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), lora_enabled(pipe.transformer, "canny"):
        one = layer(x)
        assert graphs
        compiled = len(graphs)
        pipe.load_control(folders / "three", "canny", replace=True)
        assert not torch.equal(layer(x), one) and len(graphs) == compiled


def test_a_control_of_another_form_takes_the_place(folders: Path) -> None:
    pipe = tiny_pipeline()
    pipe.load_control(folders / "one", "canny")
    add_tiny_control(pipe, "depth")
    depth = latent(pipe, control={"depth": edges()})
    pipe.load_control(folders / "other", "canny", replace=True)
    assert pipe.available_controls == ("canny", "depth")
    assert torch.equal(latent(pipe, control={"canny": edges()}), drawn_with(folders / "other"))
    assert torch.equal(latent(pipe, control={"depth": edges()}), depth)
    assert pipe.load_control(folders / "one", "new", replace=True) == "new"  # nothing to replace


@pytest.mark.parametrize("form", ["two", "other"])
def test_a_bad_folder_leaves_the_old_control(folders: Path, tmp_path: Path, form: str) -> None:
    bad = write_control(tmp_path / "bad", 5, **({"lora_rank": 3} if form == "other" else {}))
    file = bad / "control.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    pipe = tiny_pipeline()
    pipe.load_control(folders / "one", "canny")
    encoded = pipe.encode_control(edges(), "canny")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        pipe.load_control(bad, "canny", replace=True)
    assert torch.equal(latent(pipe, control={"canny": encoded}), drawn_with(folders / "one"))


# LoRAs of the image


def test_a_style_acts_on_the_picture_and_not_on_the_control(folders: Path) -> None:
    pipe = tiny_pipeline("canny")
    control = {"canny": edges()}
    plain, controlled, before = latent(pipe), latent(pipe, control=control), pipe.encode_control(edges(), "canny")
    assert pipe.load_lora_weights(folders / "style", "style", scale=0.8) == "style"
    assert pipe.available_loras == ("style",) and pipe.available_controls == ("canny",)
    after = pipe.encode_control(edges(), "canny")
    assert before.bank is not None and after.bank is not None
    for name in ("keys", "values"):
        old, new = getattr(before.bank, name), getattr(after.bank, name)
        assert old.keys() == new.keys() and all(torch.equal(old[layer], new[layer]) for layer in old)
    styled, both = latent(pipe), latent(pipe, control=control)
    pictures = [plain, controlled, styled, both]
    assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert torch.equal(latent(pipe, control={"canny": before}), both)
    # a control that comes or goes leaves the style on
    pipe.load_control(folders / "one", "new")
    assert torch.equal(latent(pipe), styled)
    pipe.load_control(folders / "other", "new", replace=True)
    pipe.unload_control("new")
    assert torch.equal(latent(pipe), styled)
    pipe.unload_lora_weights()
    assert torch.equal(latent(pipe), plain) and torch.equal(latent(pipe, control=control), controlled)
    pipe.unload_control("canny")
    assert set(pipe.transformer.state_dict()) == set(tiny_backbone().state_dict())


def merged(*parts: tuple[Path, float]) -> VARControlPipeline:
    """A pipeline whose weights PEFT has changed by LoRAs, each times a number."""
    pipe = tiny_pipeline()
    deltas: dict[str, torch.Tensor] = {}
    for folder, weight in parts:
        model: Any = PeftModel.from_pretrained(tiny_backbone(), str(folder))
        for path, layer in model.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                deltas[path] = deltas.get(path, 0) + weight * layer.get_delta_weight("default")
    with torch.no_grad():
        for path, delta in deltas.items():
            pipe.transformer.get_submodule(path).weight.add_(delta)
    return pipe


def test_two_loras_with_weights(folders: Path) -> None:
    pipe = tiny_pipeline()
    style, subject = folders / "style", folders / "subject"
    plain = latent(pipe)
    assert pipe.load_lora_weights(style) == "default_0" and pipe.load_lora_weights(subject) == "default_1"
    newest = latent(pipe)
    torch.testing.assert_close(newest, latent(merged((subject, 1.0))))
    pipe.set_adapters(["default_0", "default_1"], [0.5, 1.5])
    both = latent(pipe)
    torch.testing.assert_close(both, latent(merged((style, 0.5), (subject, 1.5))))
    pipe.set_adapters(["default_0", "default_1"], 2)
    torch.testing.assert_close(latent(pipe), latent(merged((style, 2.0), (subject, 2.0))))
    pipe.set_adapters([])
    assert torch.equal(latent(pipe), plain)
    pipe.set_adapters("default_0")
    one = latent(pipe)
    torch.testing.assert_close(one, latent(merged((style, 1.0))))
    pipe.unload_lora_weights("default_1")  # which was off
    assert torch.equal(latent(pipe), one) and pipe.available_loras == ("default_0",)
    assert len({tuple(x.flatten().tolist()) for x in (plain, newest, both, one)}) == 4


def test_a_picture_remembers_its_loras(folders: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    pipe = VARControlPipeline.from_pretrained(tmp_path / "model")
    pipe.load_lora_weights(folders / "style", "style")
    pipe.load_lora_weights(folders / "subject", "subject")
    pipe.set_adapters(["subject", "style"], [0.5, 1])
    pipe(PROMPT, seed=1).images[0].save(tmp_path / "x.png")
    settings = read_settings(tmp_path / "x.png")
    assert [(entry["name"], entry["weight"]) for entry in settings["loras"]] == [("subject", 0.5), ("style", 1.0)]
    names: dict[str, Any] = {}
    exec(python_of(settings), names)
    assert np.array_equal(np.asarray(names["out"].images[0]), np.asarray(pipe(PROMPT, seed=1).images[0]))
    pipe.unload_lora_weights()
    assert "loras" not in pipe(PROMPT, seed=1).settings[0]


def test_saving_leaves_loras_out_and_says_so(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipeline("canny")
    plain = latent(pipe)
    pipe.load_lora_weights(folders / "style", "style")
    styled = latent(pipe)
    pipe.save_pretrained(tmp_path)
    assert "saved without its LoRAs: load style again" in caplog.text
    assert torch.equal(latent(pipe), styled)
    loaded = VARControlPipeline.from_pretrained(tmp_path)
    assert torch.equal(latent(loaded), plain) and loaded.available_loras == ()


def test_loras_that_do_not_fit_change_nothing(folders: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline("canny")
    plain = latent(pipe)
    narrow = get_peft_model(tiny_backbone(width=16), LoraConfig(r=2, target_modules=r".*attn\.qkv"))  # type: ignore[arg-type]
    narrow.save_pretrained(tmp_path / "narrow")
    deep = get_peft_model(tiny_backbone(depth=5), LoraConfig(r=2, target_modules=r".*attn\.qkv"))  # type: ignore[arg-type]
    deep.save_pretrained(tmp_path / "deep")
    write_lora(tmp_path / "dora", use_dora=True)
    half = write_lora(tmp_path / "half")
    (half / "adapter_model.safetensors").unlink()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "narrow", {}, r"lora_A.weight is \(2, 16\), expected \(2, 32\)"),
        (tmp_path / "deep", {}, "blocks.3.attn.qkv.lora_A.weight belongs to no linear layer"),
        (tmp_path / "dora", {}, "use_dora=True; a plain LoRA is what fits"),
        (half, {}, "adapter_model.safetensors is missing"),
        (folders / "one", {}, "holds a control.*load it with pipe.load_control"),
        (tmp_path, {}, r"no adapter_config\.json"),
        (folders / "style", {"adapter_name": "canny"}, "already holds an adapter 'canny'"),
        (folders / "style", {"adapter_name": "a.b"}, "expected letters"),
        (folders / "style", {"scale": math.nan}, "finite number"),
        (folders / "style", {"scale": "strong"}, "pass a number"),
    ]
    for source, arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            pipe.load_lora_weights(source, **arguments)
    assert lora_names(pipe.transformer) == ("canny",) and pipe.available_loras == ()
    assert torch.equal(latent(pipe), plain)


def test_names_and_weights_of_loras_are_checked(folders: Path) -> None:
    pipe = tiny_pipeline("canny")
    pipe.load_lora_weights(folders / "style", "style")
    styled = latent(pipe)
    for names, weights, words in (
        ("nobody", None, "'nobody' is not loaded; there is style"),
        ("canny", None, "'canny' is a control, which control= of a call switches"),
        (["style"], [1, 2], "2 weights"),
        (["style", "style"], 1, "name each once"),
        ("style", math.inf, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.set_adapters(names, weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'nobody' is not loaded"):
        pipe.unload_lora_weights("nobody")
    assert torch.equal(latent(pipe), styled)
    assert torch.equal(latent(pipe, control=Control("canny", edges(), scale=0)), styled)
