"""The evaluation script end to end on a tiny random model: what it measures, keeps and writes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import evaluate_toybox as script
import pytest
import torch
from PIL import Image
from proof.evaluation import Evaluation
from proof.sheets import LARGEST, save
from tiny_pipeline import tiny_pipeline

from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.evaluate.attributes import AttributeJudge

ROOT = Path(__file__).parents[2]
POSES = "pose (3 scenes with people)"  # of the five
FEW_POSES = "pose (2 scenes with people)"  # of the first four
MEASURED = "tokenizer,bits,control,attributes,heldout,size,speed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_pipeline("canny", "pose").save_pretrained(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AttributeJudge(widths=(8, 8, 16, 16, 16)).save_pretrained(folder / "judge")
        ToyboxEstimator(widths=(8, 8, 8, 8, 8), size=32).save_pretrained(folder / "estimator")
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    fixed = ["--model", str(folder / "model"), "--out", str(folder / "results/toybox.json"), "--batch", "2"]
    fixed += ["--count", "5", "--side-count", "4", "--parts", MEASURED, "--earlier", str(folder / "none.json")]
    return [*fixed, "--judge", str(folder / "judge"), "--estimator", str(folder / "estimator"), *more]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_all_parts_are_measured_written_and_kept(folder, capsys):
    script.main(arguments(folder))
    report = json.loads((folder / "results/toybox.json").read_text())
    parts = report["parts"]
    assert ",".join(parts) == MEASURED
    assert list(parts["bits"]) == [
        "caption",
        "empty prompt",
        "caption and canny",
        f"caption and {FEW_POSES}",
        "pictures",
    ]
    shares = [values for values in parts["bits"].values() if isinstance(values, list)]
    assert all(len(values) == 4 and 0 <= min(values) <= max(values) <= 1 for values in shares)
    assert list(parts["control"]) == ["canny", "pose"]
    for part in parts["control"].values():
        assert part["strength 0 equals no control"] is True
        assert list(part["rows"]) == [
            "strength 1.0", "strength 0.5", "without control", "map of another scene",
            "chance: strength 1.0 against another map", "reconstructed reference", "meter on true renders",
        ]  # fmt: skip
    canny, pose = (parts["control"][kind]["rows"] for kind in ("canny", "pose"))
    assert canny["without control"] != canny["strength 1.0"] != canny["strength 0.5"]  # the random control does act
    assert canny["reconstructed reference"]["f1"] == pytest.approx(parts["tokenizer"]["f1"])
    assert canny["meter on true renders"]["f1"] == 1.0
    fewer = {"strength 0.5", "map of another scene"}
    assert {name for name, row in canny.items() if row["pictures"] == 4} == fewer
    assert {row["pictures"] for name, row in pose.items() if name not in fewer} == {3}
    half = parts["control"]["canny"]["half way"]
    assert half["pictures"] == 4
    whole = half["from 0"][0] + half["to 1"][0]
    assert half["from 0"][0] == pytest.approx(half["share"] * whole)
    assert list(parts["attributes"]) == [
        "true renders", "tokenizer reconstructions", "prompt alone", "prompt and canny", f"prompt and {POSES}",
        "other prompts", "judge",
    ]  # fmt: skip
    assert parts["attributes"]["true renders"].keys() >= {"pictures", "kind", "kind_error", "all five"}
    facts = parts["heldout"]["attributes"]
    assert {row["pictures"] for row in facts.values()} == {5} and facts["true renders, held out"]["kind"] <= 1
    assert parts["heldout"]["control"]["kind"] == "canny"
    assert 0 <= parts["heldout"]["control"]["held out"][0] <= 1
    assert parts["size"]["together"] == pytest.approx(sum(list(parts["size"].values())[:3]))
    assert parts["speed"]["prompt"]["seconds"] >= parts["speed"]["prompt"]["fastest"] > 0
    text = (folder / "results/toybox.md").read_text()
    assert "| strength 0.5 | 4 |" in text and "| prompt and canny |" in text and "PCK@0.1" in text
    assert "| true renders: difference | |" in text and "| weights of all that ships, MB | under 40 |" in text
    assert text in capsys.readouterr().out

    # a second call measures what is asked again and nothing else
    script.main(arguments(folder, "--parts", "tokenizer,speed", "--again"))
    later = json.loads((folder / "results/toybox.json").read_text())
    assert later["parts"]["tokenizer"] == parts["tokenizer"] and later["parts"]["bits"] == parts["bits"]
    assert later["parts"]["speed"] != parts["speed"]
    script.main(arguments(folder, "--parts", "speed"))
    kept = json.loads((folder / "results/toybox.json").read_text())
    assert kept["parts"] == later["parts"]
    assert kept["commands"]["bits"] == report["commands"]["bits"] != kept["commands"]["speed"]
    # a part by another meter no longer holds
    old = {**kept["parts"]["control"], "pose": {**kept["parts"]["control"]["pose"], "meter": "another estimator"}}
    stale = {**kept, "parts": {**kept["parts"], "control": old}}
    (folder / "results/toybox.json").write_text(json.dumps(stale))
    script.main(arguments(folder, "--parts", "bits"))
    text = (folder / "results/toybox.md").read_text()
    assert "| strength 0.5 |" not in text and "| prompt and canny |" in text
    other = arguments(folder, "--parts", "tokenizer", "--seed", "5")
    with pytest.raises(ValueError, match="numbers of other weights or settings"):
        script.main(other)
    script.main([*other, "--again"])  # nothing is carried over
    assert list(json.loads((folder / "results/toybox.json").read_text())["parts"]) == ["tokenizer"]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_pictures_depend_neither_on_the_batch_nor_on_workers(folder):
    def drawn(*more: str) -> torch.Tensor:
        run = Evaluation(script.read_arguments(arguments(folder, *more)))
        try:
            return torch.from_numpy(run.drawn("canny", 1.0))
        finally:
            run.painter.close()

    one = drawn("--batch", "1")
    assert torch.equal(one, drawn("--batch", "3"))
    assert torch.equal(one, drawn("--batch", "5", "--workers", "2"))  # one batch: a second worker would not start


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_sheets_and_cards(folder, tmp_path, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "report.json"
    shutil.copytree(folder / "model", model)
    card, readme = model / "README.md", tmp_path / "README.md"
    places = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("targets", "pictures"))
    card.write_text(f"before\n{places}<!-- measured -->\nold\n<!-- /measured -->\nafter\n")
    readme.write_text(places)
    more = ["--model", str(model), "--out", str(out), "--parts", "control", "--sheets", str(model)]
    for _ in range(2):
        script.main(arguments(folder, *more, "--into", str(card), "--into", str(readme)))
    text = card.read_text()
    table = out.with_suffix(".md").read_text()
    assert table.rstrip() in text and text.startswith("before\n") and text.endswith("<!-- /measured -->\nafter\n")
    assert "old" not in text and text.count("| wanted | measured | reached |") == 2
    names = {"prompts.jpg", "prompts.txt", "strengths.jpg", "failures.jpg", "reconstructions.jpg"}
    assert {path.name for path in (model / "images").iterdir()} == names
    assert "](images/prompts.jpg)" in text and "[canny](controls/canny/sheet.jpg)" in text
    assert "](model/images/failures.jpg)" in readme.read_text() and "old" not in readme.read_text()
    # two scenes with people among the first four: two strips of four tiles of pose, four of canny
    assert Image.open(model / "images/prompts.jpg").width == 5 * 132 - 4
    assert Image.open(model / "controls/pose/sheet.jpg").size == (3 * 132 - 4, 256)

    cards = load(ROOT / "recipes/toybox/control_cards.py")
    monkeypatch.setattr(cards, "CARD", ROOT / "recipes/toybox/control_card.md")
    cards.main(["--model", str(model), "--results", str(out)])
    row = json.loads(out.read_text())["parts"]["control"]["canny"]["rows"]["strength 1.0"]
    written = (model / "controls/canny/README.md").read_text()
    assert f"{row['f1_1px']:.3f} ± {row['f1_1px_error']:.3f}" in written and "](sheet.jpg)" in written
    (model / "controls/pose/sheet.jpg").unlink()
    with pytest.raises(ValueError, match=r"has no sheet\.jpg; run evaluate_toybox\.py with --sheets"):
        cards.main(["--model", str(model), "--results", str(out)])


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sheet_stays_small(tmp_path):
    noise = torch.randint(0, 256, (640, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = save(tmp_path / "sheet.jpg", Image.fromarray(noise.numpy()))
    assert path.stat().st_size <= LARGEST


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_blazepose_without_its_weights_is_not_measured(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    script.main(arguments(folder, "--parts", "tokenizer,blazepose", "--out", str(tmp_path / "report.json")))
    assert list(json.loads((tmp_path / "report.json").read_text())["parts"]) == ["tokenizer"]
    shown = capsys.readouterr()
    assert "blazepose: not measured: BlazePose" in shown.err
    assert "| pose: PCK@0.1 by BlazePose | as a check | not measured | - | not measured |" in shown.out


def test_bad_arguments(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments(folder, "--parts", "magic"))
    assert "unknown parts magic" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no control depth, it has canny, pose"):
        script.main(arguments(folder, "--parts", "tokenizer", "--controls", "canny,depth"))
    document = tmp_path / "README.md"
    document.write_text("no place")
    with pytest.raises(SystemExit):
        script.main(arguments(folder, "--into", str(document)))
    assert "no place for the tables" in capsys.readouterr().err and document.read_text() == "no place"


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_model_without_controls(folder, tmp_path):
    script.main(arguments(folder, "--controls", "", "--out", str(tmp_path / "report.json")))
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert parts["control"] == {} and list(parts["bits"]) == ["caption", "empty prompt", "pictures"]
    assert "prompt" in parts["speed"] and "prompt and canny" not in parts["speed"]
    assert "control" not in parts["heldout"]
