"""The evaluation script end to end on a tiny random model: what it measures, keeps and writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from scaleweaver.evaluate.attributes import AttributeJudge

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
    tiny_pipeline("canny").save_pretrained(folder / "model")
    AttributeJudge(widths=(8, 8, 16, 16, 16)).save_pretrained(folder / "judge")
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    fixed = ["--model", str(folder / "model"), "--out", str(folder / "results/toybox.json"), "--batch", "2"]
    return [*fixed, "--count", "3", *more]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_all_parts_are_measured_written_and_kept(script, folder, capsys):
    script.main(arguments(folder, "--judge", str(folder / "judge"), "--sheets", str(folder / "sheets")))
    report = json.loads((folder / "results/toybox.json").read_text())
    parts = report["parts"]
    assert list(parts) == ["tokenizer", "bits", "control", "attributes", "speed"]
    assert [len(values) for values in parts["bits"].values()] == [4, 4, 4]
    assert all(0 <= value <= 1 for values in parts["bits"].values() for value in values)
    assert parts["control"]["strength 0 equals no control"] is True
    without, under = parts["control"]["without control"], parts["control"]["strength 1.0"]
    assert without != under  # the random control does act
    assert parts["control"]["reconstructed reference"]["f1"] == pytest.approx(parts["tokenizer"]["f1"])
    assert {"true renders", "tokenizer reconstructions", "prompt alone", "prompt and edges", "other prompts"} <= set(
        parts["attributes"]
    )
    assert parts["speed"]["prompt"]["seconds"] >= parts["speed"]["prompt"]["fastest"] > 0
    text = (folder / "results/toybox.md").read_text()
    assert "| strength 0.5 |" in text and "| prompt and edges |" in text and text in capsys.readouterr().out
    sheets = {path.name for path in (folder / "sheets").iterdir()}
    assert sheets == {"reconstructions.png", "prompts.png", "prompts.txt", "control.png"}

    # a second call measures what is asked again and nothing else
    script.main(arguments(folder, "--parts", "tokenizer,speed", "--again"))
    later = json.loads((folder / "results/toybox.json").read_text())
    assert later["parts"]["tokenizer"] == parts["tokenizer"] and later["parts"]["bits"] == parts["bits"]
    assert later["parts"]["speed"] != parts["speed"]
    script.main(arguments(folder, "--parts", "speed"))
    kept = json.loads((folder / "results/toybox.json").read_text())
    assert kept["parts"] == later["parts"]
    assert kept["commands"]["bits"] == report["commands"]["bits"] != kept["commands"]["speed"]
    other = arguments(folder, "--parts", "tokenizer", "--seed", "5")
    with pytest.raises(ValueError, match="numbers of other weights or settings"):
        script.main(other)
    script.main([*other, "--again"])  # nothing is carried over
    assert list(json.loads((folder / "results/toybox.json").read_text())["parts"]) == ["tokenizer"]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_pictures_do_not_depend_on_the_batch(script, folder):
    def drawn(batch: str) -> torch.Tensor:
        options = script.read_arguments(arguments(folder, "--parts", "control", "--batch", batch))
        return torch.from_numpy(script.Evaluation(options).drawn(1.0))

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
    for more, message in (
        (["--parts", "magic"], "unknown parts magic"),
        (["--parts", "attributes"], "needs --judge"),
    ):
        with pytest.raises(SystemExit):
            script.main(arguments(folder, *more))
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match='has no control "depth"'):
        script.main(arguments(folder, "--parts", "tokenizer", "--control", "depth"))
