"""Stages are named, complete and in order; nothing here asserts how long they take."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import PROMPT, edges, tiny_pipeline

from scaleweaver.evaluate.speed import (
    StageTimes,
    Stopwatch,
    draw,
    in_fresh_process,
    machine,
    measure,
    peak_rss,
    ratio,
)

SCALES = ["scale 1, 1x1", "scale 2, 2x2", "scale 3, 3x3", "scale 4, 4x4"]


def test_laps_of_one_name_add_up() -> None:
    watch = Stopwatch()
    for stage in ("a", "b", "a"):
        time.sleep(0.002)
        watch.lap(stage)
    found = watch.read()
    assert list(found) == ["a", "b", "total"]
    assert found["a"] >= 0.004 and found["b"] >= 0.002
    assert found["total"] == pytest.approx(found["a"] + found["b"])
    watch.start()
    assert watch.read() == {"total": 0}


def test_stages_of_a_picture() -> None:
    pipe = tiny_pipeline("canny")
    for control, extra in ((None, []), ({"canny": edges()}, ["control encoding"])):
        watch = Stopwatch()
        latent = draw(pipe, PROMPT, watch, control=control, seed=1)
        stages = list(watch.read())
        assert stages == ["text encoding", *extra, "conditions", *SCALES, "rest", "decoding", "total"]
        plain = pipe(PROMPT, control=control, seed=1, output_type="latent").latent
        assert torch.equal(latent, plain)  # being watched changes nothing


def test_known_text_and_no_decoding() -> None:
    pipe = tiny_pipeline()
    watch = Stopwatch()
    draw(pipe, None, watch, decode=False, prompt_embeds=pipe.encode_prompt(PROMPT), seed=1)
    assert list(watch.read()) == ["conditions", *SCALES, "rest", "total"]


def test_ways_run_in_turn_and_warm_up_is_kept_apart() -> None:
    order: list[str] = []

    def way(name: str) -> Any:
        def run(watch: Stopwatch) -> None:
            order.append(name)
            watch.lap("work")

        return run

    times = measure({"a": way("a"), "b": way("b")}, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert [(len(one.warmup), len(one.runs)) for one in times.values()] == [(2, 3)] * 2
    assert times["a"].stages == ["work", "rest", "total"]
    order.clear()
    times = measure({"a": way("a")}, repeats=3, warmup=1, seconds=0.0)
    assert order == ["a", "a"] and len(times["a"].runs) == 1  # the warm-up and one round
    with pytest.raises(ValueError, match="repeats is 0"):
        measure({"a": way("a")}, repeats=0)


def test_summary() -> None:
    slow = StageTimes([{"x": 4.0, "total": 4.0}, {"x": 3.0, "total": 3.0}, {"x": 9.0, "total": 9.0}], [{"x": 20.0}])
    fast = StageTimes([{"x": 1.5, "total": 1.5}, {"x": 2.0, "total": 2.0}])
    assert (slow.minimum(), slow.median("x"), ratio(slow, fast)) == (3.0, 4.0, 2.0)
    data = json.loads(json.dumps(slow.to_dict()))
    assert (
        data["repeats"] == 3 and data["stages"]["x"] == {"min": 3.0, "median": 4.0} and data["first_run"] == {"x": 20}
    )


def test_machine_says_what_a_result_needs() -> None:
    found = json.loads(json.dumps(machine("cpu", torch.bfloat16)))
    assert found["threads"] == torch.get_num_threads() and found["dtype"] == "bfloat16" and found["processor"]
    assert found["versions"]["torch"] == torch.__version__ and "gpu" not in found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much is resident now")
def test_peak_memory_rises_with_what_is_allocated_and_never_falls() -> None:
    page, more = 4096, 64 << 20
    before = peak_rss()
    now = int(Path("/proc/self/statm").read_text().split()[1]) * page
    assert before is not None and before >= 0.9 * now
    held = b"x" * (before - now + more)
    peak = peak_rss()
    del held
    after = peak_rss()
    assert peak is not None and after is not None
    assert more / 2 < peak - before < 2 * more
    assert after >= peak - (1 << 20)  # the system counts in pages that it has not settled yet


def test_a_child_answers_on_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("import json, sys\nprint('anything')\nprint(json.dumps({'got': sys.argv[1:]}))\n")
    assert in_fresh_process([str(script), "a", "b"]) == {"got": ["a", "b"]}


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("import os, sys\nsys.exit('no such model, with ' + os.environ['OMP_NUM_THREADS'])\n")
    with pytest.raises(RuntimeError, match="no such model, with 3"):
        in_fresh_process([str(script)], threads=3)
