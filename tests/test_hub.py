"""The real Hub client against a Hub of our own on the loopback interface."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from hub_server import Hub, running_hub
from peft import LoraConfig, get_peft_model
from tiny import tiny_backbone
from tiny_pipeline import tiny_pipeline

from scaleweaver.adapters import save_control
from scaleweaver.hub import locate, locate_control, upload
from scaleweaver.pipeline import VARControlPipeline


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as running:
        settings: dict[str, Any] = {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(hub_constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield running


def latent(pipe: VARControlPipeline) -> torch.Tensor:
    return pipe("a red cube", seed=3, output_type="latent", control={"canny": torch.eye(32)}).latent


def test_push_and_load(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("canny")
    url = pipe.push_to_hub("me/tiny", commit_message="first")
    assert hub.repos["me/tiny"][-1].message == "first" and url.endswith(hub.repos["me/tiny"][-1].sha)
    files = hub.repos["me/tiny"][-1].files
    assert {"model_index.json", "README.md", "controls/canny/control.safetensors"} <= set(files)
    assert b'from_pretrained("me/tiny")' in files["README.md"]

    loaded = VARControlPipeline.from_pretrained("me/tiny")
    assert torch.equal(latent(loaded), latent(pipe))
    assert loaded.name_or_path == "me/tiny"  # the name by which another machine finds it

    # the cache is enough from now on
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(latent(VARControlPipeline.from_pretrained("me/tiny")), latent(pipe))
    assert not hub.requests


def test_revisions(hub: Hub) -> None:
    pipe = tiny_pipeline("canny")
    pipe.push_to_hub("me/tiny")
    first = hub.repos["me/tiny"][-1].sha
    with torch.no_grad():
        pipe.transformer.head.bias.add_(1)
    pipe.push_to_hub("me/tiny")
    old = VARControlPipeline.from_pretrained("me/tiny", revision=first)
    new = VARControlPipeline.from_pretrained("me/tiny")
    assert torch.equal(new.transformer.head.bias, pipe.transformer.head.bias)
    assert torch.equal(old.transformer.head.bias + 1, pipe.transformer.head.bias)


def test_controls_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    pipe = tiny_pipeline("canny")
    save_control(tmp_path / "canny", pipe.transformer, pipe.controls["canny"], "canny")
    upload(tmp_path / "canny", "me/canny-control", private=True)
    assert "me/canny-control" in hub.private
    other = tiny_pipeline()
    assert other.load_control("me/canny-control") == "canny"
    assert torch.equal(latent(other), latent(pipe))


def test_loras_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=r".*attn\.qkv", init_lora_weights=False)
    model: Any = get_peft_model(tiny_backbone(), config)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "style")
    upload(tmp_path / "style", "me/style")
    pipe, local = tiny_pipeline(), tiny_pipeline()
    plain = pipe("a red cube", seed=3)
    assert pipe.load_lora_weights("me/style") == local.load_lora_weights(tmp_path / "style") == "default_0"
    styled = pipe("a red cube", seed=3)
    assert torch.equal(styled.latent, local("a red cube", seed=3).latent)
    assert not torch.equal(styled.latent, plain.latent)
    assert styled.settings[0]["loras"][0]["source"] == "me/style"


def test_only_safe_files_are_downloaded(hub: Hub) -> None:
    hub.create("me/mixed")
    files: dict[str, bytes | None] = {"model_index.json": b"{}", "vae/weights.bin": b"pickle", "run.py": b"print()"}
    hub.commit("me/mixed", files, "files")
    folder = locate("me/mixed")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["model_index.json"]


def test_errors(hub: Hub) -> None:
    hub.create("me/empty")
    hub.commit("me/empty", {"notes.txt": b"hello"}, "notes")
    for arguments, words in (
        ({"model": "me/nothing"}, "neither built in"),
        ({"model": "me/empty"}, r"holds no model_index.json \(found: notes.txt\)"),
        ({"model": "me/empty", "revision": "v9"}, "no revision 'v9'"),
        ({"model": "no/such/folder"}, "check the path"),
    ):
        with pytest.raises(ValueError, match=words):
            locate(**arguments)
    with pytest.raises(ValueError, match=r"holds no control_config\.json"):
        tiny_pipeline().load_control("me/empty")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no readable JSON"),
        ("{}", "says format None"),
        ('{"format": 1, "method": "scaleweaver"}', "lacks the kind"),
        ('{"format": 1, "method": "scaleweaver", "config": {}, "backbone": {}}', "lacks the kind"),
    ],
)
def test_the_kind_of_a_damaged_control(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "control_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"control_config\.json .*{words}"):
        locate_control(tmp_path)


def test_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="could not be had from the Hub"):
        locate("me/elsewhere", local_files_only=True)
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="download it once while online"):
        locate("me/elsewhere")


def test_the_built_in_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("scaleweaver.hub.__file__", str(tmp_path / "hub.py"))
    with pytest.raises(ValueError, match="built-in model 'toybox' is not part of this installation"):
        locate("toybox")
    (tmp_path / "assets" / "toybox").mkdir(parents=True)
    (tmp_path / "assets" / "toybox" / "model_index.json").write_text("{}")
    assert locate("toybox") == tmp_path / "assets" / "toybox"


def test_the_endpoint_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    """Another process, set up by environment variables alone as a user would."""
    hub.create("me/model")
    hub.commit("me/model", {"model_index.json": b'{"a": 1}'}, "files")
    code = "from scaleweaver.hub import locate; print(open(locate('me/model') / 'model_index.json').read())"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    for offline in ("0", "1"):
        environment["HF_HUB_OFFLINE"] = offline
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == '{"a": 1}', done.stderr
