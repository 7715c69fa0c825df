from dataclasses import replace

import numpy as np
import pytest
import torch

from scaleweaver.toybox import people
from scaleweaver.toybox.looks import SKIES
from scaleweaver.toybox.render import _draw, render
from scaleweaver.toybox.scene import Camera, Person, Scene, Thing
from scaleweaver.toybox.weather import WEATHERS

ROCKET = Thing("rocket", "red", "large", "matte", -0.6, 0.0, 0.0, 0.0)
GIRL = Person(
    "girl", "waving", (0.0,) * people.JOINT_NOISE_SIZE, "tan", "bob", "red", "blue", "green", x=0.7, y=0.0, yaw=0.0
)
SCENE = Scene((ROCKET, GIRL), "grass", "noon", 0.7, 0.8, Camera(1.3, 0.18, 2.8, 4.2))
BAD = [name for name in WEATHERS if name != "clear"]


@pytest.fixture(scope="module")
def frames():
    return {name: render([replace(SCENE, weather=name)], size=96) for name in WEATHERS}


@pytest.mark.parametrize("name", BAD)
def test_weather_is_seen_and_changes_no_ground_truth(frames, name):
    clear, bad = frames["clear"], frames[name]
    assert torch.equal(clear.depth, bad.depth) and torch.equal(clear.ids, bad.ids)
    assert np.array_equal(clear.keypoints[0], bad.keypoints[0])
    assert (clear.image - bad.image).abs().mean() > 0.05
    assert torch.isfinite(bad.image).all() and bad.image.min() >= 0 and bad.image.max() <= 1


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("sky", SKIES)
def test_weather_hides_no_thing(name, sky):
    cube = replace(ROCKET, kind="cube", size="medium")
    picture = render([replace(SCENE, items=(cube, GIRL), weather=name, sky=sky)], size=96)
    for item in (1, 2):
        own = picture.ids[0] == item
        grown = torch.nn.functional.max_pool2d(own[None].float(), 9, 1, 4)[0] > 0
        around = picture.image[0][:, grown & (picture.ids[0] == 0)].mean(1)
        assert (picture.image[0][:, own] - around[:, None]).norm(dim=0).mean() > 0.12
    red = picture.image[0][:, picture.ids[0] == 1].mean(1)
    assert red[0] > red[1:].max() + 0.1  # and the colour is told as well


def test_weathers_look_different(frames):
    pictures = torch.stack([frames[name].image[0] for name in WEATHERS]).flatten(1)
    assert torch.pdist(pictures, p=1).min() / pictures.shape[1] > 0.03


def test_fog_takes_the_far_first(frames):
    clear, fog = (frames[name].image[0] for name in ("clear", "fog"))
    change = (clear - fog).abs().mean(0)
    depth = frames["clear"].depth[0]
    near, far = change[frames["clear"].ids[0] > 0].mean(), change[torch.isfinite(depth) & (depth > 9)].mean()
    assert far > 1.3 * near
    spread = [picture[:, torch.isfinite(depth) & (depth > 9)].std() for picture in (clear, fog)]
    assert spread[1] < 0.7 * spread[0]


def test_what_falls_depends_on_the_scene_alone():
    scenes = [replace(SCENE, weather=name, sun_azimuth=azimuth) for name in WEATHERS for azimuth in (0.7, 0.71)]
    alone, together = render(scenes, size=48), _draw(scenes, 48, 2, torch.device("cpu"))
    assert (alone.image - together.image).abs().max() < 1e-4
    for k, name in enumerate(WEATHERS):  # other scenes, other drops
        apart = (alone.image[2 * k] - alone.image[2 * k + 1]).abs().mean()
        assert apart > 0.01 if WEATHERS[name].falls else apart < 0.01


def test_drops_and_flakes_are_the_same_at_any_size():
    small, large = (render([replace(SCENE, weather="snowfall")], size=size).image for size in (48, 96))
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - halved).abs().mean() < 0.03


def test_an_unknown_weather_is_refused():
    with pytest.raises(ValueError, match=r"no weather 'hail'.*snowfall"):
        render([replace(SCENE, weather="hail")])
