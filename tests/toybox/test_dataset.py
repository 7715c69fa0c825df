import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import scaleweaver.toybox as toybox
from scaleweaver.toybox.dataset import ToyboxBatches, ToyboxDataset, caption_of, draw_batch
from scaleweaver.toybox.drawing import HUES, LIMBS, depth_map, depth_range, draw_skeleton, ids_map
from scaleweaver.toybox.folder import PLACES, write_folder
from scaleweaver.toybox.progress import rendering_progress
from scaleweaver.toybox.scene import Person, attributes, sample_scene
from scaleweaver.toybox.store import RenderStore, cache_renders

SIZE = 32
FAST = {"size": SIZE, "supersample": 1}


def test_a_sample_is_pure_in_its_index():
    pictures = ToyboxDataset("val", 8, start=3, **FAST)
    together = pictures.batch(range(4))
    for i in range(4):
        alone = pictures[i]
        assert alone.index == 3 + i and alone.text == together.texts[i] and alone.scene == sample_scene("val", 3 + i)
        torch.testing.assert_close(alone.image, together.images[i], rtol=0, atol=1e-5)
        assert torch.equal(alone.ids, together.ids[i])
    assert together.images.shape == (4, 3, SIZE, SIZE) and together.depth.shape == (4, SIZE, SIZE)
    assert together.images.min() >= 0 and together.images.max() <= 1


def test_pictures_show_their_items_and_can_be_trained_on():
    batch = draw_batch("train", range(12), **FAST)
    for scene, ids, depth, people in zip(batch.scenes, batch.ids, batch.depth, batch.keypoints, strict=True):
        assert set(ids.unique().tolist()) - {0} == set(range(1, len(scene.items) + 1))
        assert torch.isfinite(depth[ids > 0]).all()
        assert len(people) == sum(isinstance(item, Person) for item in scene.items)
    weight = torch.ones(1, requires_grad=True)
    (batch.images * weight).square().mean().backward()  # autograd refuses tensors made in inference mode
    assert weight.grad is not None and weight.grad.item() > 0


def test_relations_show_in_the_pictures():
    rows = torch.arange(SIZE, dtype=torch.float32)
    checked = 0
    batch = draw_batch("train", range(60), **FAST)
    for scene, ids in zip(batch.scenes, batch.ids, strict=True):
        for i, relation, j in toybox.relations(scene):
            if relation in ("left of", "right of"):
                x = [((ids == item + 1).sum(0) * rows).sum() / (ids == item + 1).sum() for item in (i, j)]
                assert (x[0] < x[1]) == (relation == "left of")
            elif relation == "on top of":
                y = [((ids == item + 1).sum(1) * rows).sum() / (ids == item + 1).sum() for item in (i, j)]
                assert y[0] < y[1]
            checked += 1
    assert checked > 20


def test_bad_positions_and_counts_are_refused():
    with pytest.raises(IndexError, match="position 8"):
        ToyboxDataset("val", 8, **FAST)[8]
    with pytest.raises(ValueError, match="at least one"):
        ToyboxDataset("val", 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        ToyboxBatches("val", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_resume_at_the_same_picture(workers):
    whole = [index for batch in ToyboxBatches("train", 3, count=8, workers=0, **FAST) for index in batch.indices]
    assert whole == list(range(8))
    first = ToyboxBatches("train", 3, count=8, workers=workers, **FAST)
    seen = next(iter(first)).indices
    state = first.state_dict()
    assert state == {"next_index": 3}
    second = ToyboxBatches("train", 3, count=8, workers=workers, **FAST)
    second.load_state_dict(state)
    rest = list(second)
    assert seen + [index for batch in rest for index in batch.indices] == whole
    torch.testing.assert_close(rest[0].images, draw_batch("train", [3, 4, 5], **FAST).images, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="outside"):
        second.load_state_dict({"next_index": 9})


@pytest.mark.parametrize("workers", [0, 1])
def test_finite_batches_can_be_read_again(workers):
    batches = ToyboxBatches("train", 2, start=4, count=3, workers=workers, **FAST)
    passes = [[index for batch in batches for index in batch.indices] for _ in range(2)]
    assert passes == [[4, 5, 6]] * 2
    assert batches.state_dict() == {"next_index": 4}


def test_a_device_that_cannot_be_used_is_refused(tmp_path):
    makers = (
        lambda **more: ToyboxDataset("val", 1, **more),
        lambda **more: ToyboxBatches("val", 1, count=1, **more),
        lambda **more: write_folder(tmp_path / "folder", "val", 1, **more),
        lambda **more: cache_renders(tmp_path / "store", "val", count=1, **more),
    )
    for make in makers:
        with pytest.raises(ValueError, match="device is 'graphics'"):
            make(device="graphics")
    for make in makers[1:]:
        with pytest.raises(ValueError, match="pass workers=0"):
            make(device="meta", workers=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_rendered_on_a_gpu_comes_back(tmp_path):
    there, here = draw_batch("train", range(3), device="cuda", **FAST), draw_batch("train", range(3), **FAST)
    assert there.images.device.type == there.depth.device.type == there.ids.device.type == "cpu"
    assert (there.images - here.images).abs().mean() < 0.01
    assert write_folder(tmp_path, "train", 1, device="cuda", **FAST) == 1


def test_progress_is_told(tmp_path):
    told = []

    def hear(done, count):
        told.append((done, count))

    write_folder(tmp_path / "folder", "val", 1, on_progress=hear, **FAST)
    write_folder(tmp_path / "folder", "val", 3, on_progress=hear, **FAST)
    assert told == [(0, 1), (1, 1), (1, 3), (2, 3), (3, 3)]
    told.clear()
    shards = {"shards": True, "pictures_per_shard": 2, "on_progress": hear, **FAST}
    write_folder(tmp_path / "shards", "val", 3, **shards)
    write_folder(tmp_path / "shards", "val", 3, **shards)
    assert told == [(0, 3), (1, 3), (2, 3), (2, 3), (3, 3), (2, 3), (3, 3)]
    told.clear()
    for _ in range(2):  # the second time there is nothing to do
        cache_renders(tmp_path / "store", "val", count=3, batch_size=2, workers=0, on_progress=hear, **FAST)
    assert told == [(0, 3), (2, 3), (3, 3)]


def test_the_progress_bar_shows_once_there_is_something_to_do():
    for told, shown in ((False, False), (True, True)):
        screen = io.StringIO()
        with rendering_progress("rendering cats", Console(file=screen, force_terminal=True, width=80)) as on_progress:
            if told:
                on_progress(2, 5)
        assert ("rendering cats" in screen.getvalue() and "2/5" in screen.getvalue()) == shown


def test_a_stream_without_count_goes_on():
    stream = iter(ToyboxBatches("train", 2, start=10**6, workers=0, **FAST))
    assert [next(stream).indices for _ in range(2)] == [[10**6, 10**6 + 1], [10**6 + 2, 10**6 + 3]]


def test_folder_is_complete_resumable_and_right(tmp_path):
    assert write_folder(tmp_path, "test", 3, batch_size=2, **FAST) == 3
    records = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    before = (tmp_path / records[1]["file_name"]).read_bytes()
    # a lost file and a half-written line are made again, the rest is kept
    (tmp_path / records[1]["file_name"]).unlink()
    with open(tmp_path / "metadata.jsonl", "a") as lines:
        lines.write('{"file_name": "images/0')
    assert write_folder(tmp_path, "test", 5, batch_size=2, **FAST) == 3
    assert (tmp_path / records[1]["file_name"]).read_bytes() == before
    assert write_folder(tmp_path, "test", 5, **FAST) == 0
    with pytest.raises(ValueError, match="size 32 -> 48"):
        write_folder(tmp_path, "test", 5, size=48, supersample=1)

    records = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(5))
    batch = draw_batch("test", range(5), **FAST)
    for i, record in enumerate(records):
        assert record["text"] == caption_of("test", i)
        assert {name: record[name] for name in attributes(batch.scenes[i])} == attributes(batch.scenes[i])
        image = np.asarray(Image.open(tmp_path / record["file_name"])).astype(float) / 255
        assert np.abs(image - batch.images[i].permute(1, 2, 0).numpy()).max() < 0.01
        assert np.array_equal(np.asarray(Image.open(tmp_path / record["ids_file_name"])), batch.ids[i].numpy())
        depth, grey = batch.depth[i].numpy(), np.asarray(Image.open(tmp_path / record["depth_file_name"])).astype(float)
        near, far = record["depth_near"], record["depth_far"]
        metres = 1 / (1 / far + (1 / near - 1 / far) * (grey - 1) / 65534)
        solid = np.isfinite(depth)
        np.testing.assert_allclose(1 / metres[solid], 1 / depth[solid], atol=1e-4)
        assert (grey[~solid] == 0).all() and (grey[solid] > 0).all()
        people = json.loads((tmp_path / record["keypoints"]).read_text())["people"]
        assert [len(person["pose_keypoints_2d"]) for person in people] == [54] * len(batch.keypoints[i])
        assert Image.open(tmp_path / record["pose_drawing_file_name"]).size == (SIZE, SIZE)
    assert not list(tmp_path.rglob("*.part"))


def test_shards_hold_whole_samples_and_are_not_made_twice(tmp_path):
    arguments = {"shards": True, "pictures_per_shard": 2, **FAST}
    assert write_folder(tmp_path, "val", 3, **arguments) == 3
    assert write_folder(tmp_path, "val", 4, **arguments) == 2  # the last shard was not full
    assert write_folder(tmp_path, "val", 4, **arguments) == 0
    names = []
    for path in sorted(tmp_path.glob("val-*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
            text = tar.extractfile(tar.getnames()[0].split(".")[0] + ".txt").read().decode()
            assert text == caption_of("val", int(tar.getnames()[0].split(".")[0]))
    assert [names.count(f"{i:08d}.png") for i in range(4)] == [1] * 4
    assert len(names) == 4 * (len(PLACES) + 2)


def test_store_streams_what_was_rendered(tmp_path):
    arguments = {"start": 5, "count": 6, "captions": 2, "maps": ("depth", "ids", "keypoints"), "batch_size": 2, **FAST}
    whole = cache_renders(tmp_path / "whole", "train", workers=0, **arguments)
    batch = draw_batch("train", range(5, 11), **FAST)
    assert len(whole) == 6 and whole.images.shape == (6, SIZE, SIZE, 3) and isinstance(whole.images, np.memmap)
    assert np.abs(whole.images / 255 - batch.images.permute(0, 2, 3, 1).numpy()).max() < 0.01
    assert np.array_equal(whole.maps["ids"], batch.ids.numpy())
    assert np.array_equal(whole.maps["depth"][2], depth_map(batch.depth[2].numpy()))
    for row, people in enumerate(batch.keypoints):
        assert np.array_equal(whole.maps["keypoints"][row], people[0] if len(people) else np.zeros((18, 3)))
    assert whole.texts(1) == [caption_of("train", 6), caption_of("train", 6, variant=1)]
    assert whole.attributes(1) == attributes(sample_scene("train", 6))

    # as if interrupted after three pictures, in the middle of a line
    lines = (tmp_path / "whole" / "captions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "whole" / "captions.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert len(RenderStore(tmp_path / "whole")) == 3
    np.load(tmp_path / "whole" / "images.npy", mmap_mode="r+")[3:] = 0
    again = cache_renders(tmp_path / "whole", "train", workers=1, **arguments)
    assert len(again) == 6 and (tmp_path / "whole" / "captions.jsonl").read_text() == "".join(lines)
    assert np.abs(again.images / 255 - batch.images.permute(0, 2, 3, 1).numpy()).max() < 0.01
    with pytest.raises(ValueError, match="other settings"):
        cache_renders(tmp_path / "whole", "val", workers=0, **arguments)
    with pytest.raises(ValueError, match="unknown maps"):
        cache_renders(tmp_path / "new", "train", count=1, maps=("depths",))
    with pytest.raises(ValueError, match="cache_renders first"):
        RenderStore(tmp_path / "nothing")


def test_skeleton_has_the_colours_of_openpose():
    assert HUES[0] == (255, 0, 0) and HUES[6] == (0, 255, 0) and HUES[12] == (0, 0, 255) and len(LIMBS) == 17
    keypoints = np.zeros((1, 18, 3))
    keypoints[0, 1], keypoints[0, 2] = (84, 40, 2), (20, 40, 1)  # neck, and a hidden right shoulder
    picture = draw_skeleton(keypoints, (84, 126))
    assert picture.shape == (84, 126, 3) and picture.dtype == np.uint8
    assert tuple(picture[40, 84]) == HUES[1] and tuple(picture[40, 20]) == HUES[2]
    np.testing.assert_allclose(picture[40, 52], 0.6 * np.array(HUES[0]), atol=1)
    assert picture[44:].sum() == 0 and picture[:36].sum() == 0
    keypoints[0, 2, 2] = 0  # a joint outside the picture takes its limb along
    assert draw_skeleton(keypoints, (84, 126))[40, 52].sum() == 0
    assert draw_skeleton(np.zeros((0, 18, 3)), 16).sum() == 0
    with pytest.raises(ValueError, match="COCO-18"):
        draw_skeleton(np.zeros((1, 17, 3)), 16)


def test_depth_map_is_bright_near_and_zero_in_the_sky():
    depth = np.array([[np.inf, 8.0], [4.0, 2.0]])
    grey = depth_map(depth)
    assert grey.dtype == np.uint8 and grey[0, 0] == 0 and grey[0, 1] == 1 and grey[1, 1] == 255
    assert depth_map(depth, levels=65535).dtype == np.uint16 and depth_map(depth, levels=65535).max() == 65535
    assert depth_range(depth) == (2.0, 8.0)
    assert depth_map(np.full((2, 2), np.inf)).sum() == 0
    assert set(np.unique(depth_map(np.full((2, 2), 3.0)))) == {1}


def test_ids_map_keeps_numbers_and_shows_colours():
    ids = np.array([[0, 1], [2, 3]], np.int16)
    image = ids_map(ids)
    assert image.mode == "P" and np.array_equal(np.asarray(image), ids)
    assert len(set(image.convert("RGB").get_flattened_data())) == 4 and image.convert("RGB").getpixel((0, 0)) == (
        0,
        0,
        0,
    )


def test_public_names_load():
    for name in toybox.__all__:
        assert getattr(toybox, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        toybox.nothing  # noqa: B018
