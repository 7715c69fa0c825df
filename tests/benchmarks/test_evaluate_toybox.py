"""The evaluation script end to end on a tiny random model: what it measures, keeps and writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.evaluate.attributes import AttributeJudge

POSES = "pose (3 scenes with people)"  # of the five
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate_toybox.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_toybox", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    return [*fixed, "--count", "5", "--judge", str(folder / "judge"), "--estimator", str(folder / "estimator"), *more]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_all_parts_are_measured_written_and_kept(script, folder, capsys):
    script.main(arguments(folder, "--sheets", str(folder / "sheets")))
    report = json.loads((folder / "results/toybox.json").read_text())
    parts = report["parts"]
    assert list(parts) == ["tokenizer", "bits", "control", "attributes", "speed"]
    assert list(parts["bits"]) == ["caption", "empty prompt", "caption and canny", f"caption and {POSES}"]
    assert {len(values) for values in parts["bits"].values()} == {4}
    assert all(0 <= value <= 1 for values in parts["bits"].values() for value in values)
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
    assert {row["pictures"] for row in canny.values()} == {5} and {row["pictures"] for row in pose.values()} == {3}
    assert list(parts["attributes"]) == [
        "true renders", "tokenizer reconstructions", "prompt alone", "prompt and canny", f"prompt and {POSES}",
        "other prompts", "judge",
    ]  # fmt: skip
    assert parts["speed"]["prompt"]["seconds"] >= parts["speed"]["prompt"]["fastest"] > 0
    text = (folder / "results/toybox.md").read_text()
    assert "| strength 0.5 | 5 |" in text and "| prompt and canny |" in text and "PCK@0.1" in text
    assert text in capsys.readouterr().out
    sheets = {path.name for path in (folder / "sheets").iterdir()}
    assert sheets == {"reconstructions.png", "prompts.png", "prompts.txt", "canny.png", "pose.png"}

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
def test_pictures_do_not_depend_on_the_batch(script, folder):
    def drawn(batch: str) -> torch.Tensor:
        options = script.read_arguments(arguments(folder, "--parts", "control", "--batch", batch))
        return torch.from_numpy(script.Evaluation(options).drawn("canny", 1.0))

    assert torch.equal(drawn("1"), drawn("3"))


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_tables_go_into_documents(script, folder, tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n")
    more = ["--parts", "tokenizer", "--into", str(document), "--out", str(tmp_path / "report.json")]
    for _ in range(2):
        script.main(arguments(folder, *more))
        table = (tmp_path / "report.md").read_text()
        assert document.read_text() == f"before\n<!-- measured -->\n{table}\n<!-- /measured -->\nafter\n"
    document.write_text("no place")
    with pytest.raises(SystemExit):
        script.main(arguments(folder, *more))
    assert "no place for the tables" in capsys.readouterr().err and document.read_text() == "no place"


def test_bad_arguments(script, folder, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments(folder, "--parts", "magic"))
    assert "unknown parts magic" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no control depth, it has canny, pose"):
        script.main(arguments(folder, "--parts", "tokenizer", "--controls", "canny,depth"))


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_model_without_controls(script, folder, tmp_path):
    more = ["--parts", "bits,control,attributes,speed", "--controls", "", "--out", str(tmp_path / "report.json")]
    script.main(arguments(folder, *more))
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert parts["control"] == {} and list(parts["bits"]) == ["caption", "empty prompt"]
    assert "prompt" in parts["speed"] and "prompt and canny" not in parts["speed"]
