"""The model that ships with the package: there, small, offline, steered by its controls, with numbers of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from scaleweaver import VARControlPipeline
from scaleweaver.adapters import CONFIG_FILE
from scaleweaver.contracts import Control
from scaleweaver.controls import canny
from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.evaluate.control import psnr
from scaleweaver.evaluate.examples import ToyboxExamples, meter_of
from scaleweaver.hub import built_in_folder
from scaleweaver.metadata import python_of
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.train.data import fingerprint
from scaleweaver.train.tokenizer import reconstruct

FOLDER = built_in_folder("toybox")
ROOT = Path(__file__).parents[1]
ASSETS = FOLDER.parent
KINDS = ("canny", "depth", "palette", "pose")
SCENES = 8


@pytest.fixture(scope="module")
def pipe() -> VARControlPipeline:
    pipe = VARControlPipeline.from_pretrained("toybox", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Renders of the test split (B, H, W, 3) uint8; no training saw them."""
    return draw_batch("test", range(SCENES), size=128).pixels


def test_weights_are_small_and_half_precision():
    files = sorted(ASSETS.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 40e6  # model, controls, judge and estimator together
    for file in files:
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert kinds == {"BF16"}, file


def test_it_draws_what_the_seed_says(pipe):
    assert pipe.available_controls == KINDS
    prompt = "a large red rocket on grass at noon"
    one, again, other = (pipe(prompt, seed=seed).images[0] for seed in (7, 7, 8))
    assert one.size == (128, 128)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    low, high = np.asarray(one).min(), np.asarray(one).max()
    assert high - low > 100  # a picture, not a grey field


def test_colours_follow_the_prompt(pipe):
    pictures = pipe(
        ["a big red ball on snow at noon", "a big blue ball on snow at noon"], seed=[1, 2], output_type="np"
    )
    red, blue = (picture[40:90, 40:90].mean((0, 1)) for picture in pictures.images)  # (3,) each
    assert red[0] - red[2] > 0.1 and blue[2] - blue[0] > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_steers_the_picture(pipe, kind):
    examples = ToyboxExamples("test", [kind])
    estimator = ToyboxEstimator.built_in() if kind in ("depth", "pose") else None
    meter = meter_of(kind, examples, estimator)
    scenes = examples.read(range(SCENES))
    targets = [scene.targets[kind] for scene in scenes]
    call = {"prompt": [scene.prompt for scene in scenes], "seed": list(range(SCENES)), "output_type": "np"}

    def fidelity(control: Control | None) -> float:
        drawn = (pipe(control=control, **call).images * 255).round().astype(np.uint8)
        value = meter.summarise([[one] for one in meter.measure(drawn, targets)])[meter.main]
        assert value is not None
        return value

    without, under = fidelity(None), fidelity(Control(kind, [scene.maps[kind] for scene in scenes]))
    higher = next(column.higher for column in meter.columns if column.name == meter.main)
    assert under > 1.5 * without if higher else under < without / 1.5


def test_a_photo_in_place_of_its_map_is_noticed(pipe, pictures, caplog):
    photo = pictures[0]
    for kind in ("canny", "pose"):
        pipe("a red ball", control={kind: photo}, seed=0, stop_after=1)
        assert "is a photo, make its map first" in caplog.text
        caplog.clear()
    small = canny(photo).resize((96, 96))  # in between: smoothed lines
    for edges in (canny(photo), small):
        pipe("a red ball", control={"canny": edges}, seed=0, stop_after=1)
    assert "is a photo" not in caplog.text


def test_the_tokenizer_keeps_pictures(pipe, pictures):
    drawn = reconstruct(pipe.vae, pictures, ScaleSchedule.from_dict(pipe.config["schedule"]))
    assert np.mean([psnr(a, b) for a, b in zip(drawn, pictures, strict=True)]) > 28


def test_the_adapters_say_how_their_maps_were_made():
    detectors = {"canny": "opencv-canny", "depth": "toybox-depth", "palette": "palette-8", "pose": "toybox-pose"}
    for kind, detector in detectors.items():
        settings = json.loads((FOLDER / "controls" / kind / CONFIG_FILE).read_text())["config"]
        assert settings["kind"] == kind and settings["detector"] == detector and settings["resolution"] == 128


def test_the_documents_show_what_was_measured_on_these_weights(pipe, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from proof.tables import documents

    results = ROOT / "benchmarks" / "results"
    report, earlier = (json.loads((results / f"{name}.json").read_text()) for name in ("toybox", "toybox-earlier"))
    assert set(report["parts"]) >= {"tokenizer", "bits", "control", "attributes", "heldout", "size", "speed"}
    for name, digest in report["settings"]["weights"].items():
        network = pipe.controls[name] if name in pipe.controls else getattr(pipe, name)
        assert fingerprint(network) == digest, name
    assert report["settings"]["controls"] == list(KINDS)
    for kind in KINDS:  # the cards of the controls show the same rows
        row = report["parts"]["control"][kind]["rows"]["strength 1.0"]
        column = next(c for c in report["parts"]["control"][kind]["columns"] if row.get(c["name"]) is not None)
        card = (FOLDER / "controls" / kind / "README.md").read_text(encoding="utf-8")
        assert f"{row[column['name']]:.{column['digits']}f} ± " in card
    texts = documents(report, earlier)
    assert (results / "toybox.md").read_text(encoding="utf-8") == texts["measured"]
    assert f"\n{texts['measured'].rstrip()}\n" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"\n{texts['targets'].rstrip()}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_pictures_of_the_cards_are_there():
    for card in (FOLDER / "README.md", *FOLDER.glob("controls/*/README.md")):
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.read_text(encoding="utf-8"))
        for link in shown:
            file = card.parent / link
            assert file.is_file() and FOLDER in file.resolve().parents, f"{card}: {link}"  # goes to the Hub with it
            assert file.stat().st_size < 400_000


def test_it_can_be_saved_in_any_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = VARControlPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert again.dtype == torch.bfloat16
    assert (tmp_path / "README.md").read_text() == (FOLDER / "README.md").read_text()
    picture = again("a red ball", seed=0).images[0]
    # the Python that a picture carries draws it again, in the number format it was drawn in
    names: dict[str, Any] = {}
    exec(python_of({**picture.settings, "model": str(tmp_path)}), names)
    assert picture.settings["dtype"] == "bfloat16"
    assert np.array_equal(picture, names["out"].images[0])
    assert "dtype" not in pipe("a red ball", seed=0, stop_after=1).settings[0]
