"""A whole evaluation of control on a tiny random model: rows, resuming, refusals, and the report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import tiny_pipeline

from scaleweaver.contracts import Control
from scaleweaver.evaluate.examples import FolderExamples, ToyboxExamples, meter_of
from scaleweaver.evaluate.fidelity import Drawing, chunks, evaluate_control, rows_of
from scaleweaver.evaluate.record import Record
from scaleweaver.evaluate.report import Card, Outcome, Panel, markdown, write

pytestmark = pytest.mark.filterwarnings("ignore:the prompt has")
ROWS = ["strength 1", "strength 0.5", "no control", "mismatched", "chance", "reconstruction", "true pictures"]


class Stopped(Exception):
    """Stands for a kill between two scenes."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("canny", "palette")


def evaluated(pipe: Any, out: Path, kind: str = "canny", **more: Any) -> Outcome:
    data = ToyboxExamples("test", (kind,), size=32)
    return evaluate_control(pipe, data, meter_of(kind, data), out, **{"count": 3, "batch": 2, "shown": 2} | more)


@pytest.fixture(scope="module")
def complete(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run with two pictures a prompt, and its report."""
    out = tmp_path_factory.mktemp("complete")
    outcome = evaluated(pipe, out, images_per_prompt=2)
    write(out, outcome, title="Control fidelity: canny", notes=["a note"], command="scaleweaver evaluate control <x>")
    return out, outcome


def test_rows_and_what_they_hold(pipe, complete):
    out, outcome = complete
    rows = outcome.results["rows"]
    assert list(rows) == ROWS and outcome.lead == "strength 1"
    assert [rows[name]["pictures"] for name in ROWS] == [6, 6, 6, 6, 6, 3, 3]
    assert rows["true pictures"]["f1"] == 1.0 and "f1_stacked" not in rows["true pictures"]
    assert len({rows[name]["f1_1px"] for name in ("strength 1", "strength 0.5", "no control", "mismatched")}) == 4
    # the pictures are those that the pipeline draws from scene, map and seed
    example = ToyboxExamples("test", ("canny",), size=32).read([1])[0]
    drawn = pipe(example.prompt, control={"canny": example.maps["canny"]}, seed=3, output_type="np").images[0]
    kept = np.asarray(Image.open(out / "rows/strength-1/000003.png"))
    assert np.array_equal(kept, (drawn * 255).round().astype(np.uint8))
    # and the wrong ones are drawn under the map of the neighbour
    wrong = ToyboxExamples("test", ("canny",), size=32).read([0])[0].maps["canny"]
    drawn = pipe(example.prompt, control={"canny": wrong}, seed=3, output_type="np").images[0]
    kept = np.asarray(Image.open(out / "rows/mismatched/000003.png"))
    assert np.array_equal(kept, (drawn * 255).round().astype(np.uint8))
    assert not (out / "rows/chance/000003.png").exists()  # the pictures of the first row


def test_a_stopped_run_goes_on_to_the_same_results(pipe, complete, tmp_path):
    def stop(done: int, count: int) -> None:
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        evaluated(pipe, tmp_path, images_per_prompt=2, on_progress=stop)
    lines = tmp_path / "rows/no-control/scores.jsonl"
    whole = lines.read_text()
    assert len(whole.splitlines()) == 4
    lines.write_text(whole[:-20])  # killed while a line was written
    first = tmp_path / "rows/strength-1/000000.png"
    before = first.stat().st_mtime_ns
    resumed = evaluated(pipe, tmp_path, images_per_prompt=2)
    out, outcome = complete
    assert json.dumps(resumed.results) == json.dumps(outcome.results)
    assert first.stat().st_mtime_ns == before  # not drawn again
    for path in write(tmp_path, resumed, title="Control fidelity: canny", notes=["a note"],
                      command="scaleweaver evaluate control <x>"):  # fmt: skip
        assert path.read_text() == (out / path.name).read_text(), path.name


def test_pictures_do_not_depend_on_the_batch(pipe, complete, tmp_path):
    results = evaluated(pipe, tmp_path, images_per_prompt=2, batch=64, baselines=()).results
    assert results["rows"]["strength 1"] == complete[1].results["rows"]["strength 1"]
    assert list(results["rows"]) == ["strength 1", "strength 0.5", "true pictures"]


def test_no_more_than_a_batch_is_drawn_at_once(pipe):
    sizes: list[int] = []
    call = {"callback_on_step_end": lambda pipe, index, step, seen: sizes.append(len(seen["latent"]))}
    examples = ToyboxExamples("test", ("canny",), size=32).read(range(3))
    control = Control("canny", [example.maps["canny"] for example in examples])
    prompts = [example.prompt for example in examples]
    parts = Drawing(pipe, 0, 1, 2, call).draw(prompts, [0, 1, 2], control)
    assert set(sizes) == {1, 2}
    assert np.array_equal(parts, Drawing(pipe, 0, 1, 3, {}).draw(prompts, [0, 1, 2], control))


def test_rows_and_scenes_can_be_added_later(pipe, tmp_path):
    few = evaluated(pipe, tmp_path, "palette", count=2, baselines=(), strengths=(1.0,)).results
    assert [row["pictures"] for row in few["rows"].values()] == [2, 2] and few["rows"]["true pictures"]["rmse"] == 0
    more = evaluated(pipe, tmp_path, "palette", count=4, baselines=("mismatched",), strengths=(1.0,)).results
    at_once = evaluated(pipe, tmp_path / "new", "palette", count=4, baselines=("mismatched",), strengths=(1.0,)).results
    assert more == at_once and more["rows"]["chance"]["pictures"] == 4


def test_other_weights_or_settings_are_refused(pipe, complete, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(complete[0], out)
    with pytest.raises(ValueError, match=r"made with other settings \(seed 0 -> 5\)"):
        evaluated(pipe, out, images_per_prompt=2, seed=5)
    with pytest.raises(ValueError, match=r"first strength 1\.0 -> 0\.5"):  # that of the rows mismatched and chance
        evaluated(pipe, out, images_per_prompt=2, strengths=(0.5, 1.0))
    with pytest.raises(ValueError, match="call"):
        evaluated(pipe, out, images_per_prompt=2, call={"guidance_scale": 2.0})
    other = tiny_pipeline("canny", "palette")
    other.controls["canny"].type_embed.data.add_(1.0)
    with pytest.raises(ValueError, match="weights"):
        evaluated(other, out, images_per_prompt=2)


def test_bad_arguments(pipe, tmp_path):
    with pytest.raises(ValueError, match='no control "depth"; there is canny, palette'):
        evaluated(pipe, tmp_path, name="depth")
    with pytest.raises(ValueError, match="must be at least 1"):
        evaluated(pipe, tmp_path, count=0)
    with pytest.raises(ValueError, match="unknown baselines magic"):
        rows_of([1.0], ["magic"])
    with pytest.raises(ValueError, match="each above 0"):
        rows_of([1.0, 0.0], [])
    with pytest.raises(ValueError, match="hold one twice"):
        rows_of([1.0, 0.5, 1.0], [])
    assert not list(tmp_path.iterdir())


def test_a_single_example_has_no_other_map(pipe, tmp_path):
    Image.fromarray(ToyboxExamples("test", size=32).read([0])[0].reference).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red cube")
    data = FolderExamples(tmp_path, ("canny",), height=32, width=32)
    with pytest.raises(ValueError, match="mismatched needs the map of another example"):
        evaluate_control(pipe, data, meter_of("canny", data), tmp_path / "out", count=1)
    assert not (tmp_path / "out").exists()


def test_names_that_look_alike_have_their_own_folders(tmp_path):
    record = Record(tmp_path, {})
    rows = [record.row(f"prompts and {name}") for name in ("my_canny", "my-canny", "My_canny")]
    rows[0].write(0, {"f1": 1.0})
    assert rows[1].scores == {} and len({row.folder for row in rows}) == 3


def test_chunks_keep_neighbours_together():
    assert [list(part) for part in chunks(5, 3)] == [[0, 1, 2, 3], [4]]
    assert [list(part) for part in chunks(2, 1)] == [[0, 1]]


def test_the_report_is_one_page_that_asks_for_nothing_else(complete):
    page = (complete[0] / "report.html").read_text(encoding="utf-8")
    assert all(f"<th>{name}</th>" in page for name in ROWS)
    assert page.count('src="data:image/webp;base64,') == page.count("<img") == 2 * 2 * 3  # panels, cards, pictures
    assert "http://" not in page and "https://" not in page and "<script" not in page and "<link" not in page
    assert "prefers-color-scheme" in page and "width=device-width" in page
    assert "scaleweaver evaluate control &lt;x&gt;" in page and "<p class=note>a note</p>" in page
    assert "The worst ones" in page and ToyboxExamples("test", size=32).read([0])[0].prompt in page


def test_no_text_becomes_a_part_of_the_page(complete, tmp_path):
    """Captions, names and notes come from elsewhere."""
    outcome, evil = complete[1], '"><script>alert(1)</script>'
    results = {**outcome.results, "model": evil, "rows": {evil: outcome.results["rows"]["chance"]}}
    results |= {"row_notes": {evil: evil}, "settings": {**results["settings"], "data": evil, "meter": evil}}
    card = Card([(evil, np.zeros((2, 2, 3), np.uint8))], evil, evil)
    hostile = replace(outcome, results=results, panels=[Panel(evil, evil, [card])], lead=evil)
    write(tmp_path, hostile, title=evil, notes=[evil], command=evil)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and '""' not in page.partition("</style>")[2] and page.count("&lt;script&gt;") > 12


def test_files_for_programs_and_documents(complete):
    out, outcome = complete
    results = json.loads((out / "results.json").read_text())
    assert results["rows"] == json.loads(json.dumps(outcome.results["rows"]))
    assert results["machine"]["versions"]["torch"] and results["command"].startswith("scaleweaver evaluate")
    assert results["settings"]["count"] == 3 and set(results["settings"]["weights"]) == {
        "transformer", "text_encoder", "vae", "canny",
    }  # fmt: skip
    text = (out / "results.md").read_text()
    value = results["rows"]["strength 1"]["f1"]
    assert f"| strength 1 | 6 | {value:.3f} ± " in text and "F1, stacked" in text
    assert " ± " not in markdown(results, errors=False)


def test_the_worst_pictures_are_the_worst(complete):
    panel = complete[1].panels[1]
    scores = [float(card.score.split()[3]) for card in panel.cards]
    every = [json.loads(line)["scores"]["f1_1px"]
             for line in (complete[0] / "rows/strength-1/scores.jsonl").read_text().splitlines()]  # fmt: skip
    assert scores == [round(value, 3) for value in sorted(every)[:2]]
