"""A drawing as a stream of pictures."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from tiny_pipeline import edges, tiny_pipeline

from scaleweaver.contracts import Control
from scaleweaver.demo.drawing import Drawn, Moment, Wish, draw
from scaleweaver.sampling import BitwiseSampler

WISH = Wish("a red cube on grass", seed=3, count=2)


class WaitingSampler(BitwiseSampler):
    """Draws the first scale at once and waits before every other one."""

    def __init__(self) -> None:
        super().__init__(1.0, 0, 0.0)
        self.go, self.scales = threading.Event(), 0

    def sample(self, logits: Any, step: Any, generators: Any) -> Any:
        self.scales += 1
        if step.index:
            assert self.go.wait(20)
        return super().sample(logits, step, generators)


def test_every_scale_comes_as_a_moment_and_the_end_is_what_the_pipeline_draws() -> None:
    pipe = tiny_pipeline("canny")
    wish = Wish(WISH.prompt, (Control("canny", edges(), scale=0.5),), 3, 2, {"guidance_scale": 2.0})
    *moments, end = draw(pipe, wish, threading.Lock())
    assert all(isinstance(moment, Moment) for moment in moments) and isinstance(end, Drawn)
    assert [moment.index for moment in moments] == list(range(moments[0].scales))
    assert end.moments == moments and end.tokens == sum(h * w for h, w in (moment.grid for moment in moments))
    assert end.seconds > 0 and end.memory > 2**20
    same = pipe(
        WISH.prompt, control=Control("canny", edges(), scale=0.5), seed=3, num_images_per_prompt=2, guidance_scale=2.0
    )
    for mine, last, theirs in zip(end.pictures, moments[-1].pictures, same.images, strict=True):
        assert np.array_equal(mine, theirs) and np.array_equal(last, theirs)
        assert mine.settings == theirs.settings


def test_a_drawing_that_nobody_reads_ends_after_its_scale() -> None:
    sampler, turn = WaitingSampler(), threading.Lock()
    stream = draw(tiny_pipeline(), Wish(WISH.prompt, options={"sampler": sampler}), turn)
    assert next(stream).index == 0
    stream.close()
    sampler.go.set()
    assert turn.acquire(timeout=20)  # free again
    assert sampler.scales == 2  # the one it was at; there are four


def test_one_after_the_other() -> None:
    sampler, turn = WaitingSampler(), threading.Lock()
    pipe = tiny_pipeline()
    first = draw(pipe, Wish(WISH.prompt, options={"sampler": sampler}), turn)
    next(first)
    assert turn.locked()
    second, got = draw(pipe, WISH, turn), []
    reader = threading.Thread(target=lambda: got.append(next(second)))
    reader.start()
    reader.join(0.3)
    assert not got
    sampler.go.set()
    assert isinstance(list(first)[-1], Drawn)
    reader.join(20)
    assert got[0].index == 0


def test_what_the_pipeline_refuses_reaches_the_reader() -> None:
    turn = threading.Lock()
    with pytest.raises(ValueError, match='control "depth" is not loaded'):
        list(draw(tiny_pipeline("canny"), Wish("a cube", (Control("depth", edges()),)), turn))
    assert not turn.locked()
