import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from scaleweaver.toybox import looks, mesh, people, things
from scaleweaver.toybox.raster import EMPTY, rasterise, unpack
from scaleweaver.toybox.render import GROUNDS, SKIES, _draw, render
from scaleweaver.toybox.scene import Camera, Person, Scene, Thing

CAMERA = Camera(height=1.5, pitch=0.22, focal=2.4, distance=4.5)


def thing(kind: str, **changes) -> Thing:
    facts = {"color": "red", "size": "medium", "finish": "matte", "x": 0.0, "y": 0.0, "z": 0.0, "yaw": 0.0}
    return Thing(kind=kind, **{**facts, **changes})


def man(**changes) -> Person:
    facts = {"build": "man", "pose": "standing", "joint_noise": (0.0,) * people.JOINT_NOISE_SIZE, "skin": "tan"}
    clothes = {"hair": "short", "hair_color": "black", "shirt": "blue", "trousers": "green"}
    return Person(**{**facts, **clothes, "x": 0.0, "y": 0.0, "yaw": 0.0, **changes})


def scene(*items: Thing | Person, **changes) -> Scene:
    facts = {"ground": "grass", "sky": "noon", "sun_azimuth": 0.7, "sun_elevation": 0.8, "camera": CAMERA}
    return Scene(items=items, **{**facts, **changes})


def edges(image: torch.Tensor) -> np.ndarray:
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 100, 200)


@pytest.mark.parametrize("facing", [1, -1])
def test_rasteriser_agrees_with_a_test_of_every_pixel_against_every_triangle(facing):
    generator = torch.Generator().manual_seed(0)
    count, size = 120, 48
    corners = torch.rand(count, 1, 2, generator=generator) * size + torch.randn(count, 3, 2, generator=generator) * 9
    depth = torch.rand(count, 3, generator=generator)
    image = torch.arange(count) % 2
    buffer = rasterise(corners, depth, image, images=2, size=size, facing=facing)
    got_depth, got = unpack(buffer)
    got = torch.where(buffer == EMPTY, -1, got)

    at = torch.arange(size, dtype=torch.float64) + 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    best = torch.full((2, size, size), torch.inf, dtype=torch.float64)
    want = torch.full((2, size, size), -1)
    for number, ((x0, y0), (x1, y1), (x2, y2)) in enumerate(corners.double()):
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if -area * facing <= 0:  # y points down
            continue
        w0 = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) / area
        w1 = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) / area
        w2 = 1 - w0 - w1
        z = w0 * depth[number, 0] + w1 * depth[number, 1] + w2 * depth[number, 2]
        k = int(image[number])
        closer = (w0 >= 0) & (w1 >= 0) & (w2 >= 0) & (z < best[k])
        best[k][closer], want[k][closer] = z[closer], number
    assert (got != want).float().mean() < 1e-3
    same = (got == want) & (want >= 0)
    assert same.float().mean() > 0.2
    assert (got_depth.double() - best)[same].abs().max() < 1e-5


def test_neighbouring_triangles_leave_no_crack():
    # a fan around a point that is no pixel centre covers every pixel of its disc
    angle = torch.linspace(0, 2 * math.pi, 38)[:-1]
    rim = torch.stack([30.3 + 25 * torch.cos(angle), 31.7 - 25 * torch.sin(angle)], dim=1)
    corners = torch.stack([torch.tensor([[30.3, 31.7]]).expand_as(rim), rim, rim.roll(-1, 0)], dim=1)
    buffer = rasterise(corners, torch.full((37, 3), 0.5), torch.zeros(37, dtype=torch.long), images=1, size=64)
    at = torch.arange(64) + 0.5
    inside = (at[None] - 30.3) ** 2 + (at[:, None] - 31.7) ** 2 < 24.5**2
    assert (buffer[0] != EMPTY)[inside].all()


@pytest.mark.parametrize("kind", things.KINDS)
def test_every_kind_is_a_closed_looking_solid_on_the_ground(kind):
    shape = things.mesh_of(kind)
    radius, height = things.extent(kind)
    assert 0.3 < 2 * radius < 1.8 and 0.5 < height < 1.9
    assert shape.vertices[:, 2].min() == pytest.approx(0, abs=1e-5)
    assert np.allclose(np.linalg.norm(shape.normals, axis=1), 1, atol=1e-4)
    assert shape.faces.max() < len(shape.vertices) and len(shape.material) == len(shape.faces)
    assert shape.material.max() < len(things.MATERIALS)
    assert (shape.material == 0).any()  # something shows the thing's own colour
    # the corner order of the faces agrees with the normals
    a, b, c = (shape.vertices[shape.faces[:, k]] for k in range(3))
    flat = np.cross(b - a, c - a)
    large = np.linalg.norm(flat, axis=1) > 1e-7
    agree = (flat * shape.normals[shape.faces].sum(axis=1)).sum(axis=1)[large] > 0
    assert agree.mean() > 0.97


def test_solids_of_known_volume():
    def volume(shape: mesh.Mesh) -> float:
        a, b, c = (shape.vertices[shape.faces[:, k]].astype(np.float64) for k in range(3))
        return float((a * np.cross(b, c)).sum() / 6)

    assert volume(mesh.sphere(0.5, 64)) == pytest.approx(math.pi / 6, rel=0.01)
    assert volume(mesh.cylinder(0.4, 1.0, 64, bevel=0.001)) == pytest.approx(math.pi * 0.16, rel=0.01)
    assert volume(mesh.cone(0.3, 0.9, 64)) == pytest.approx(math.pi * 0.09 * 0.3, rel=0.01)
    assert volume(mesh.box(1, 2, 3, 0.001)) == pytest.approx(6, rel=0.01)
    assert volume(mesh.torus(0.5, 0.1, 64, 32)) == pytest.approx(2 * math.pi**2 * 0.5 * 0.01, rel=0.02)
    assert volume(mesh.extrude([(0, 0), (1, 0), (0, 1)], 2)) == pytest.approx(1, rel=1e-5)
    assert volume(mesh.sphere().scaled(-1, 1, 1)) > 0  # a mirror image keeps its outside outside


def test_frames_have_the_promised_shapes_and_ranges():
    frames = render([scene(thing("cube"), man(x=0.9)), scene()], size=64)
    assert frames.image.shape == (2, 3, 64, 64) and frames.image.dtype == torch.float32
    assert frames.image.min() >= 0 and frames.image.max() <= 1
    assert frames.depth.shape == frames.ids.shape == (2, 64, 64)
    assert frames.ids.dtype == torch.int16 and frames.ids[0].unique().tolist() == [0, 1, 2]
    assert not frames.ids[1].any()  # an empty scene is ground and sky
    assert torch.isinf(frames.depth[1, 0]).all() and torch.isfinite(frames.depth[1, -1]).all()
    assert [points.shape for points in frames.keypoints] == [(1, 18, 3), (0, 18, 3)]


def test_depth_is_metric():
    level = Camera(height=0.43, pitch=0.0, focal=2.0, distance=4.0)
    frames = render([scene(thing("cube", size="medium"), camera=level)], size=64)
    assert frames.ids[0, 32, 32] == 1
    assert frames.depth[0, 32, 32] == pytest.approx(4.0 - 0.43, abs=2e-3)  # its front face
    # the lowest row looks at the ground: height * focal / (tangent of the row)
    assert frames.depth[0, 63, 0] == pytest.approx(0.43 * 2.0 / (63.5 / 32 - 1), abs=1e-3)


def test_nearer_things_hide_farther_ones():
    frames = render([scene(thing("cube", y=1.5, size="large"), thing("ball", y=-0.5, color="blue"))], size=64)
    ids = frames.ids[0]
    assert (ids == 1).any() and (ids == 2).any()
    assert frames.depth[0][ids == 2].max() < frames.depth[0][ids == 1].min()
    alone = render([scene(thing("ball", y=-0.5, color="blue"))], size=64)
    assert torch.equal(ids == 2, alone.ids[0] == 1)


def test_a_picture_depends_on_its_scene_alone():
    scenes = [scene(thing("duck", yaw=0.2 * k), man(x=1.0), sky=sky) for k, sky in enumerate(SKIES)]
    together = render(scenes, size=48)
    again = render(scenes[3:4], size=48)
    assert torch.equal(together.image[3], again.image[0])
    assert torch.equal(together.depth[3], again.depth[0])
    # the batched path, as on a GPU, draws the same
    batched = _draw(scenes, 48, 2, torch.device("cpu"))
    assert torch.equal(batched.ids, together.ids)
    assert (batched.image - together.image).abs().max() < 1e-4
    assert np.allclose(batched.keypoints[2], together.keypoints[2])


def test_supersampling_smooths_edges():
    rough, fine = (render([scene(thing("cone"))], size=64, supersample=s).image[0] for s in (1, 2))
    assert (rough - fine).abs().mean() < 0.02
    assert (fine[:, :, 1:] - fine[:, :, :-1]).abs().max() < (rough[:, :, 1:] - rough[:, :, :-1]).abs().max()


def test_sun_side_is_bright_and_the_shadow_falls_away_from_it():
    ball = scene(thing("ball", color="white"), sun_elevation=0.6)
    right, left = (render([replace(ball, sun_azimuth=azimuth)], size=64) for azimuth in (1.2, -1.2))
    mask = right.ids[0] == 1
    half = mask & (torch.arange(64) >= 34)
    bright, dark = (frames.image[0].mean(0) for frames in (right, left))
    assert bright[half].mean() > dark[half].mean() + 0.05
    # lit from the left the ground right of the ball is darker
    foot = int(mask.any(1).nonzero().max())
    ground = slice(foot - 5, foot + 1), slice(42, 52)
    assert not mask[ground].all() and dark[ground].mean() < bright[ground].mean() - 0.03


def test_things_darken_the_ground_they_stand_on_but_not_from_above():
    dull = {"sky": "cloudy", "sun_azimuth": math.pi, "ground": "snow"}
    low, high, empty = render(
        [scene(thing("cube"), **dull), scene(thing("cube", z=1.2), **dull), scene(**dull)], size=96
    ).image.mean(1)
    ids = render([scene(thing("cube"), **dull)], size=96).ids[0]
    foot = int((ids == 1).any(1).nonzero().max())
    beneath = slice(foot + 1, foot + 3), slice(44, 52)
    assert not ids[beneath].any()
    assert low[beneath].mean() < empty[beneath].mean() - 0.1
    assert high[beneath].mean() > low[beneath].mean() + 0.05


def test_named_colours_come_out_as_themselves():
    for color, channel in (("red", 0), ("green", 1), ("blue", 2)):
        frames = render([scene(thing("ball", color=color))], size=48)
        shown = frames.image[0][:, frames.ids[0] == 1].mean(dim=1)
        assert shown.argmax() == channel and shown[channel] > 0.45
    glossy, matte = (
        render([scene(thing("ball", finish=finish))], size=64).image.amax() for finish in ("glossy", "matte")
    )
    assert glossy > matte - 1e-3


@pytest.mark.parametrize("sky", SKIES)
def test_outlines_survive_canny_under_every_sky_and_grounds_stay_quiet(sky):
    scenes = [scene(thing("cube", color="white", yaw=0.4), sky=sky, ground="dirt"), scene(sky=sky, ground="stone")]
    frames = render(scenes, size=128)
    mask = (frames.ids[0].numpy() > 0).astype(np.uint8)
    outline = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    found = cv2.dilate(edges(frames.image[0]), np.ones((3, 3), np.uint8)) > 0
    assert (found & outline).sum() / outline.sum() > 0.6
    assert (edges(frames.image[1]) > 0).mean() < 0.003


def test_every_ground_is_quiet():
    frames = render([scene(ground=ground) for ground in GROUNDS], size=128)
    for image in frames.image:
        assert (edges(image) > 0).mean() < 0.003
    means = frames.image[:, :, 100:].mean(dim=(2, 3))
    assert torch.pdist(means).min() > 0.04  # and unlike the others


def test_keypoints_know_what_is_hidden():
    front, back, behind, outside = render(
        [
            scene(man()),
            scene(man(yaw=math.pi)),
            scene(man(y=1.0), thing("cube", y=-0.4, size="large")),
            scene(man(x=4.0)),
        ],
        size=128,
    ).keypoints
    assert (front[0, :, 2] == 2).all()
    assert (back[0, [0, 14, 15], 2] == 1).all() and (back[0, [8, 11], 2] == 2).all()
    assert (behind[0, [10, 13], 2] == 1).all() and (behind[0, [0, 1], 2] == 2).all()
    assert (outside[0, :, 2] == 0).all()
    assert front[0, 5, 0] > 64 > front[0, 2, 0]  # the left shoulder is on the right of the picture
    assert front[0, 0, 1] < front[0, 1, 1] < front[0, 10, 1]


def test_keypoints_fall_on_the_person():
    frames = render([scene(man(pose=pose)) for pose in people.POSES], size=128)
    for ids, points in zip(frames.ids, frames.keypoints, strict=True):
        grown = cv2.dilate((ids.numpy() > 0).astype(np.uint8), np.ones((5, 5), np.uint8))
        column, row = points[0, :, 0].astype(int), points[0, :, 1].astype(int)
        assert grown[row.clip(0, 127), column.clip(0, 127)][points[0, :, 2] > 0].all()


def test_textures_tile_and_never_change():
    for name in looks._TEXTURES:
        pattern = looks.texture(name)
        assert pattern.shape == (looks.TEXELS, looks.TEXELS) and abs(pattern.mean()) < 0.1
    grain = looks.texture("grit")
    assert np.abs(grain[:, 0] - grain[:, -1]).mean() < 1.5 * np.abs(grain[:, 1] - grain[:, 0]).mean()
    assert grain[3, :3] == pytest.approx(looks._TEXTURES["grit"]()[3, :3] / looks._TEXTURES["grit"]().std(), abs=0.02)


def test_items_beside_or_behind_the_camera_do_no_harm():
    frames = render([scene(thing("cube", y=-5.0), thing("tree", x=30.0), thing("ball"))], size=48)
    assert frames.ids[0].unique().tolist() == [0, 3]
    assert torch.isfinite(frames.image).all()


def test_wrong_words_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"no kind 'spoon'.*teapot"):
        render([scene(thing("spoon"))])
    with pytest.raises(ValueError, match="ground 'lava'"):
        render([replace(scene(), ground="lava")])
    with pytest.raises(ValueError, match="at least one"):
        render([])
    with pytest.raises(ValueError, match="size 4"):
        render([scene()], size=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_the_same_picture():
    scenes = [scene(thing("teapot"), man(x=1.0, pose="dancing"), sky=sky) for sky in SKIES]
    here, there = render(scenes), render(scenes, device="cuda")
    assert (here.ids != there.ids.cpu()).float().mean() < 1e-3
    assert (here.image - there.image.cpu()).abs().mean() < 1e-3
