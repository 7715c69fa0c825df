"""An evaluation of pictures as pictures on a tiny random model and judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import tiny_pipeline

from scaleweaver.evaluate.attributes import AttributeJudge, score
from scaleweaver.evaluate.examples import FolderExamples, ToyboxExamples
from scaleweaver.evaluate.frechet import ClipAgreement, JudgeFeatures
from scaleweaver.evaluate.quality import Metrics, evaluate_quality
from scaleweaver.evaluate.report import Outcome, write

pytestmark = pytest.mark.filterwarnings("ignore:the prompt has")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("canny")


@pytest.fixture(scope="module")
def judge() -> AttributeJudge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AttributeJudge(widths=(8, 8, 16, 16, 16), threshold=0.02).eval()


def evaluated(pipe: Any, judge: AttributeJudge, out: Path, **more: Any) -> Outcome:
    data = ToyboxExamples("test", ("canny",), size=32)
    metrics = Metrics(judge, [JudgeFeatures(judge)])
    return evaluate_quality(pipe, data, out, metrics, **{"controls": ["canny"], "count": 3, "batch": 2} | more)


@pytest.fixture(scope="module")
def complete(pipe: Any, judge: AttributeJudge, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("quality")
    return out, evaluated(pipe, judge, out, images_per_prompt=2)


def test_rows_and_columns(judge, complete):
    rows = complete[1].results["rows"]
    assert list(rows) == [
        "prompts", "other prompts", "prompts and canny", "reconstruction", "true pictures", "other true pictures",
    ]  # fmt: skip
    assert [row["pictures"] for row in rows.values()] == [6, 6, 6, 3, 3, 3]
    titles = [column["title"] for column in complete[1].results["columns"]]
    assert titles[0] == "kind" and "colour" in titles and titles[-2:] == ["FD-judge", "diversity"]
    assert "fd-judge" not in rows["true pictures"] and rows["reconstruction"]["fd-judge"] > 0
    assert rows["prompts"]["diversity"] > 0 and "diversity" not in rows["reconstruction"]
    assert "all" not in rows["other true pictures"]  # their prompts were not asked for
    # the shares are those of the judge on all pictures together
    examples = ToyboxExamples("test", size=32).read(range(3))
    truth = score(judge.judge(np.stack([e.reference for e in examples])), [e.asked for e in examples])
    assert {name: rows["true pictures"][name] for name in truth} == truth


def test_a_second_call_draws_nothing_and_finds_the_same(pipe, judge, complete):
    out, outcome = complete
    picture = out / "rows/prompts/000004.png"
    before = picture.stat().st_mtime_ns
    assert json.dumps(evaluated(pipe, judge, out, images_per_prompt=2).results) == json.dumps(outcome.results)
    assert picture.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"images_per_prompt 2 -> 1"):
        evaluated(pipe, judge, out)


def test_report(complete):
    out, outcome = complete
    write(out, outcome, title="Picture quality")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "FD-judge" in page and "of the facts found" in page and ">FID" not in page
    assert "| reconstruction | 3 |" in (out / "results.md").read_text()


def test_a_folder_has_no_facts(pipe, judge, tmp_path):
    for number, example in enumerate(ToyboxExamples("test", size=32).read(range(2))):
        Image.fromarray(example.reference).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a red cube")
    data = FolderExamples(tmp_path, height=32, width=32)
    metrics = Metrics(None, [JudgeFeatures(judge)])
    outcome = evaluate_quality(pipe, data, tmp_path / "out", metrics, count=2)
    rows = outcome.results["rows"]
    assert list(rows) == ["prompts", "reconstruction", "true pictures"]
    assert [column["title"] for column in outcome.results["columns"]] == ["FD-judge"]
    assert "FD-judge" in (write(tmp_path / "out", outcome, title="Picture quality")[2]).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="3 examples are asked for and there are 2"):
        evaluate_quality(pipe, data, tmp_path / "out", metrics, count=3)


def test_clip_score_of_every_row(pipe, judge, tiny_clip, tmp_path):
    pytest.importorskip("torchmetrics")
    data = ToyboxExamples("test", size=32)
    outcome = evaluate_quality(pipe, data, tmp_path, Metrics(clip=str(tiny_clip)), count=2, images_per_prompt=2)
    rows = outcome.results["rows"]
    assert list(rows) == ["prompts", "reconstruction", "true pictures", "other true pictures"]
    clip = ClipAgreement(str(tiny_clip))
    examples = data.read(range(2))
    clip.add(np.stack([e.reference for e in examples]), [e.prompt for e in examples])
    assert rows["true pictures"]["clip"] == pytest.approx(clip.value(), abs=1e-4)
    assert outcome.results["columns"][-1]["title"] == "CLIP score"


def test_what_cannot_be_had_is_said_before_anything_is_drawn(pipe, judge, tmp_path):
    pytest.importorskip("torchmetrics")
    data = ToyboxExamples("test", size=32)
    with pytest.raises(ValueError, match="CLIP score cannot be had"):
        evaluate_quality(pipe, data, tmp_path, Metrics(judge, clip="openai/clip-vit-base-patch16"))
    with pytest.raises(ValueError, match="no control magic"):
        evaluate_quality(pipe, data, tmp_path, Metrics(judge), controls=["magic"])
    assert not list(tmp_path.iterdir())
