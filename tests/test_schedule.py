"""Schedules against the published templates, RoPE positions against the published integer tables."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scaleweaver.schedule import (
    BUDGETS,
    RATIOS,
    ScaleSchedule,
    infinity_schedule,
    nearest_schedule,
    rope_position,
)

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = json.loads((GOLDEN / "infinity_scale_schedules.json").read_text())


def test_table_covers_all_templates() -> None:
    assert list(RATIOS) == list(TEMPLATES["schedules"])
    assert list(BUDGETS) == TEMPLATES["pixel_budgets"]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_template(ratio: str, budget: str) -> None:
    expected = TEMPLATES["schedules"][ratio][budget]
    schedule = infinity_schedule(ratio, budget)
    assert [list(grid) for grid in schedule.grids] == expected["scales_hw"]
    assert [step.n for step in schedule.steps] == expected["tokens_per_scale"]
    assert [schedule.height, schedule.width] == expected["image_hw"]
    assert schedule.length == expected["seq_len"]
    assert list(schedule.position_grid) == TEMPLATES["schedules"][ratio]["1M"]["scales_hw"][-1]


def test_steps() -> None:
    steps = infinity_schedule("1.5").steps
    assert [step.index for step in steps] == list(range(7))
    assert steps[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(steps))
    assert [step.is_last for step in steps] == [False] * 6 + [True]
    assert all((step.h, step.w) == step.schedule.grids[step.index] for step in steps)


def test_truncate_keeps_the_final_grid() -> None:
    full = infinity_schedule("1.0")
    short = full.truncate(3)
    assert short.grids == full.grids[:3]
    assert short.length == 21
    assert (short.height, short.width) == (256, 256)
    assert not any(step.is_last for step in short.steps)
    assert full.truncate(7) == full
    assert short.truncate(2) == full.truncate(2)
    with pytest.raises(ValueError, match="cannot keep 8 scales of 7"):
        full.truncate(8)


@pytest.mark.parametrize("schedule", [infinity_schedule("0.571", "0.25M"), infinity_schedule().truncate(4)])
def test_json_round_trip(schedule: ScaleSchedule) -> None:
    again = ScaleSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.steps == schedule.steps


@pytest.mark.parametrize(
    ("height", "width", "ratio", "budget"),
    [
        (256, 256, "1.0", "0.06M"),
        (1024, 1024, "1.0", "1M"),
        (512, 512, "1.0", "0.25M"),
        (768, 768, "1.0", "0.60M"),
        (720, 1280, "0.571", "1M"),
        (640, 480, "1.333", "0.25M"),
        (4000, 100, "3.0", "0.25M"),
        (1, 1, "1.0", "0.06M"),
    ],
)
def test_nearest(height: int, width: int, ratio: str, budget: str) -> None:
    assert nearest_schedule(height, width) == infinity_schedule(ratio, budget)
    assert nearest_schedule(height, width, "0.06M") == infinity_schedule(ratio, "0.06M")


def test_every_template_is_nearest_to_itself() -> None:
    for ratio in RATIOS:
        for budget in BUDGETS:
            schedule = infinity_schedule(ratio, budget)
            assert nearest_schedule(schedule.height, schedule.width).grids == schedule.grids


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"ratio '0\.9' is not a template"):
        infinity_schedule("0.9")
    with pytest.raises(ValueError, match="budget '2M' is unknown"):
        infinity_schedule("1.0", "2M")
    with pytest.raises(ValueError, match="is empty"):
        nearest_schedule(0, 10)
    with pytest.raises(ValueError, match="at least one"):
        ScaleSchedule((), (1, 1))
    with pytest.raises(ValueError, match="no prefix"):
        ScaleSchedule(((1, 1), (3, 3)), (3, 3), full_grids=((1, 1), (2, 2), (3, 3)))


@pytest.mark.parametrize("ratio", ["1.0", "1.333", "1.5", "2.0", "3.0"])
def test_rope_positions(ratio: str) -> None:
    with safe_open(GOLDEN / "rope_positions.safetensors", "pt") as tables:
        expected = torch.stack([tables.get_tensor(f"h{ratio}.{axis}_index") for axis in ("row", "col")], dim=1).int()
    # every budget of a ratio shares the table of its 1M schedule
    for budget in BUDGETS:
        schedule = infinity_schedule(ratio, budget)
        ours = torch.tensor([p for step in schedule.steps for p in rope_position(step)], dtype=torch.int32)
        assert torch.equal(ours, expected[: schedule.length])


def test_rope_halves_go_to_even() -> None:
    schedule = ScaleSchedule(((2, 2),), position_grid=(5, 7))
    assert rope_position(schedule.steps[0]) == ((0, 0), (0, 4), (2, 0), (2, 4))
