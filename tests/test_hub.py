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
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from tiny import tiny_backbone
from tiny_pipeline import tiny_pipeline

from scaleweaver.adapters import save_control
from scaleweaver.cards import Card
from scaleweaver.hub import built_in_folder, locate, locate_control, push_folder, upload
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
    push_folder(tmp_path / "canny", "me/canny-control", private=True)
    assert "me/canny-control" in hub.private
    other = tiny_pipeline()
    assert other.load_control("me/canny-control") == "canny"
    assert torch.equal(latent(other), latent(pipe))


def test_loras_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=r".*attn\.qkv", init_lora_weights=False)
    model: Any = get_peft_model(tiny_backbone(), config)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "style")
    upload(tmp_path / "style", "style")
    pipe, local = tiny_pipeline(), tiny_pipeline()
    plain = pipe("a red cube", seed=3)
    assert pipe.load_lora_weights("me/style") == local.load_lora_weights(tmp_path / "style") == "default_0"
    styled = pipe("a red cube", seed=3)
    assert torch.equal(styled.latent, local("a red cube", seed=3).latent)
    assert not torch.equal(styled.latent, plain.latent)
    assert styled.settings[0]["loras"][0]["source"] == "me/style"


def test_a_control_in_a_repository_of_its_own(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = tiny_pipeline("canny")
    pipe.push_to_hub("me/tiny")
    pipe = VARControlPipeline.from_pretrained("me/tiny")
    drawn = pipe("a red cube on grass", seed=1, control={"canny": torch.eye(32)}).images
    url = pipe.push_control("canny", "tiny-canny", card=Card(license="mit", pictures=drawn))
    commit = hub.repos["me/tiny-canny"][-1]
    assert url.endswith(commit.sha) and url.startswith(hub.endpoint)
    assert set(HfApi().list_repo_files("me/tiny-canny")) == set(commit.files)
    assert {"control.safetensors", "adapter_model.safetensors", "images/000.png"} < set(commit.files)
    card = ModelCard.load("me/tiny-canny")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == ("me/tiny", "adapter", "mit")
    assert card.data.widget == [{"text": "a red cube on grass", "output": {"url": "images/000.png"}}]
    # the snippet runs as it stands
    drawn[0].convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert names["pipe"].name_or_path == "me/tiny" and (tmp_path / "out.png").is_file()

    first, picture = commit.sha, latent(pipe)
    with torch.no_grad():
        for parameter in pipe.controls["canny"].parameters():
            parameter.mul_(-1)
    pipe.push_control("canny", "me/tiny-canny")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    other = tiny_pipeline()
    other.load_control("me/tiny-canny", revision=first)
    assert torch.equal(latent(other), picture)
    other.load_control("me/tiny-canny", replace=True)
    assert torch.equal(latent(other), latent(pipe)) and not torch.equal(latent(pipe), picture)

    # what was loaded once needs no connection, and what it says of itself goes along to a third place
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = tiny_pipeline()
    offline.load_control("me/tiny-canny", revision=first)
    assert torch.equal(latent(offline), picture) and not hub.requests
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    offline.push_control("canny", "you/again")
    again = hub.repos["you/again"][-1].files
    assert again["images/000.png"] == commit.files["images/000.png"]
    assert b'pipe.load_control("you/again", name="canny", replace=True)' in again["README.md"]
    assert b"license: mit" in again["README.md"]


def test_cards_travel_with_their_pictures(hub: Hub, tmp_path: Path) -> None:
    """From the built-in model to the Hub, from there to a folder: text, sheets and samples are still whole."""
    pipe = VARControlPipeline.from_pretrained("toybox", dtype="bfloat16")
    for name in ("depth", "palette", "pose"):
        pipe.unload_control(name)
    pipe.push_to_hub("me/toys")
    card = ModelCard.load("me/toys")
    assert card.data.license == "apache-2.0" and "# me/toys\n" in card.text
    assert 'from_pretrained("me/toys")' in card.text and 'from_pretrained("toybox")' not in card.text
    loaded = VARControlPipeline.from_pretrained("me/toys", dtype="bfloat16")
    loaded.save_pretrained(tmp_path / "copy")
    shipped = built_in_folder("toybox")
    for name in ("images/prompts.jpg", "images/prompts.txt", "images/strengths.jpg", "controls/canny/sheet.jpg"):
        assert (tmp_path / "copy" / name).read_bytes() == (shipped / name).read_bytes()
    assert (tmp_path / "copy/README.md").read_text() == hub.repos["me/toys"][-1].files["README.md"].decode()
    assert (tmp_path / "copy/controls/canny/README.md").read_text() == (
        shipped / "controls/canny/README.md"
    ).read_text()
    loaded.push_control("canny", "me/toys-canny")
    alone = ModelCard.load("me/toys-canny")
    assert alone.data.base_model == "me/toys" and "sheet.jpg" in hub.repos["me/toys-canny"][-1].files
    assert 'from_pretrained("me/toys")\npipe.load_control("me/toys-canny", name="canny", replace=True)\n' in alone.text
    assert "| strength 1.0 | 500 |" in alone.text


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
    with pytest.raises(ValueError, match='control "depth" is not loaded; there is canny'):
        tiny_pipeline("canny").push_control("depth", "me/depth")
    with pytest.raises(ValueError, match=r"holds neither model_index\.json nor control_config\.json"):
        push_folder(Path(__file__).parent, "me/tests")
    assert set(hub.repos) == {"me/empty"}


def test_nothing_is_made_for_what_cannot_be_sent(hub: Hub, tmp_path: Path) -> None:
    pipe = tiny_pipeline("canny")
    pipe.save_pretrained(tmp_path / "tiny")
    for card in (Card(measured=["nowhere"]), Card(pictures=["nowhere.png"]), Card(run="nowhere")):
        for push in (
            lambda card: pipe.push_to_hub("me/tiny", card=card),
            lambda card: pipe.push_control("canny", "canny", card=card),
            lambda card: push_folder(tmp_path / "tiny", "me/tiny", card=card),
        ):
            with pytest.raises(ValueError, match="nowhere"):
                push(card)
    with pytest.raises(ValueError, match="Repo id"):
        pipe.push_to_hub("me/tiny/canny")
    assert not hub.repos


def test_a_rounded_pipeline_is_not_sent(hub: Hub) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="rounded to int8"):
        tiny_pipeline().quantize("int8").push_to_hub("me/rounded")
    assert not hub.repos


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
