"""Pictures from weights of eight bits."""

from __future__ import annotations

import pytest
import torch
from tiny_pipeline import PROMPT, edges, latent, tiny_pipeline

from scaleweaver.metadata import python_of, read_settings
from scaleweaver.pipeline import VARControlPipeline

pytest.importorskip("torchao")


def test_a_quantised_pipeline_draws_nearly_the_same_logits_and_says_so():
    plain, rounded = tiny_pipeline("canny"), tiny_pipeline("canny").quantize("int8")
    assert type(rounded.transformer.blocks[0].ffn.fc2.weight) is not torch.nn.Parameter
    assert type(rounded.transformer.head.weight) is torch.nn.Parameter
    text = plain.encode_prompt(PROMPT)
    a, b = (pipe.transformer.encode_text(text).keys[0] for pipe in (plain, rounded))
    assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()
    out = rounded(PROMPT, seed=1, control={"canny": edges()})
    settings = read_settings(out.images[0])
    assert settings["quantize"] == "int8" and "pipe.quantize('int8')" in python_of(settings)
    assert "quantize" not in plain(PROMPT, seed=1).settings[0]


def test_controls_act_on_quantised_weights_and_not_at_strength_zero():
    pipe = tiny_pipeline("canny").quantize("int8")
    bare = latent(pipe)
    assert torch.equal(latent(pipe, control={"canny": edges()}), latent(pipe, control={"canny": edges()}))
    assert not torch.equal(latent(pipe, control={"canny": edges()}), bare)
    from scaleweaver.contracts import Control

    assert torch.equal(latent(pipe, control=Control("canny", edges(), scale=0.0)), bare)


def test_a_control_may_be_loaded_after_quantising(tmp_path):
    tiny_pipeline("canny").save_pretrained(tmp_path)
    before, after = (VARControlPipeline.from_pretrained(tmp_path) for _ in range(2))
    after.unload_control("canny")
    for pipe in (before, after):
        pipe.quantize("int8").set_progress_bar_config(disable=True)
    after.load_control(tmp_path / "controls" / "canny")
    drawn = [latent(pipe, control={"canny": edges()}) for pipe in (before, after)]
    assert torch.equal(*drawn)


def test_rounded_weights_are_not_saved(tmp_path):
    pipe = tiny_pipeline().quantize()
    with pytest.raises(ValueError, match="loaded afresh"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_unknown_format_changes_nothing():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="'int4' is unknown; pass 'int8'"):
        pipe.quantize("int4")
    assert type(pipe.transformer.blocks[0].ffn.fc2.weight) is torch.nn.Parameter


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("scaleweaver.quantize.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scaleweaver\[int8\]"):
        tiny_pipeline().quantize("int8")
