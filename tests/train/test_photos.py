"""A user's photos: layouts, bad files, aspect buckets, maps and caches, and a whole run on them."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_photos import CAPTIONS, picture, save_photo_model, write_photos
from tiny_runs import TINY, curve

from scaleweaver import VARControlPipeline
from scaleweaver.controls import Canny, canny
from scaleweaver.images import fit
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.schedule import ScaleSchedule, infinity_schedule, nearest_schedule
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.data import shuffled
from scaleweaver.train.photo_files import find_photos
from scaleweaver.train.photos import Photos
from scaleweaver.train.trainer import train

CANNY = ScaleWeaverConfig(kind="canny", thresholds=(100, 200))


def plan(height: int, width: int) -> ScaleSchedule:
    return nearest_schedule(height, width, "0.06M")


def read(folder: Path, tmp_path: Path, **more: Any) -> Photos:
    return Photos.read(folder, plan, index=tmp_path / "index.json", **more)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))


def test_pictures_with_texts_beside_them(tmp_path):
    folder = write_photos(tmp_path / "photos", [(64, 64), (40, 80)])
    picture(7).save(folder / "more.jpg")
    (folder / "deep").mkdir()
    picture(8).convert("L").save(folder / "deep" / "grey.webp", lossless=True)
    (folder / "deep" / "grey.txt").write_text("one\n\n two \n")
    (folder / "more.txt").write_text("")
    found = find_photos(folder, tmp_path / "index.json")
    assert [photo.place.name for photo in found] == ["000.png", "001.png", "deep/grey.webp"]
    assert found[0].captions == ("picture 0", CAPTIONS[0]) and found[2].captions == ("one", "two")
    assert [(photo.height, photo.width) for photo in found] == [(64, 64), (40, 80), (64, 64)]
    photos = read(folder, tmp_path)
    assert photos.image(2).shape == (256, 256, 3) and photos.captions(1) == ["picture 1", CAPTIONS[1]]
    assert np.array_equal(photos.image(1), np.asarray(fit(picture(1, 40, 80), 176, 352, two_level=False)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_an_imagefolder(tmp_path, kind):
    folder = tmp_path / "photos" / "train"
    (folder / "maps").mkdir(parents=True)
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    picture(9).save(folder / "maps" / "1.png")
    rows = [
        {"file_name": "0.png", "text": "first", "conditioning_image": ""},
        {"file_name": "1.png", "text": "second", "conditioning_image": "maps/1.png"},
        {"file_name": "2.png", "text": "gone", "conditioning_image": ""},
    ]
    if kind == "jsonl":
        many = [{**rows[0], "text": ["first", "in other words"]}, *rows[1:]]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in many))
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    photos = read(folder.parent, tmp_path)
    first = ["first", "in other words"] if kind == "jsonl" else ["first"]
    assert [photos.captions(row) for row in range(len(photos))] == [first, ["second"]]
    ready = photos.exact_map("canny", CANNY, 1)
    assert np.array_equal(ready, np.asarray(fit(picture(9), 256, 256)))
    assert np.array_equal(photos.varied_map("canny", CANNY, 1, np.random.default_rng(0)), ready)
    assert np.array_equal(photos.exact_map("canny", CANNY, 0), np.asarray(canny(photos.image(0))))


def test_webdataset_shards_are_the_same_pictures(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    edges = png(canny(picture(0)))
    write_shard(
        folder / "a.tar",
        {"x/000.png": png(picture(0)), "x/000.txt": b"one\ntwo", "x/000.conditioning_image.png": edges},
    )
    record = json.dumps({"caption": "third", "source": "somewhere"}).encode()
    write_shard(folder / "b.tar", {"000.JPG": png(picture(1)), "000.json": record, "README": b"-"})
    photos = read(folder, tmp_path)
    assert [photos.captions(row) for row in (0, 1)] == [["one", "two"], ["third"]]
    for row in (0, 1):
        assert np.array_equal(photos.image(row), np.asarray(fit(picture(row), 256, 256, two_level=False)))
    assert np.array_equal(photos.exact_map("canny", CANNY, 0), np.asarray(fit(canny(picture(0)), 256, 256)))
    # the tables of the shards are read once, until a shard changes
    opened: list[str] = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *rest: opened.append(Path(path).name) or original(path, *rest))
    assert len(read(folder, tmp_path)) == 2 and opened == []
    more = {"000.jpg": png(picture(1)), "000.txt": b"x", "001.png": png(picture(2)), "001.txt": b"y"}
    write_shard(folder / "b.tar", more)
    assert len(read(folder, tmp_path)) == 3 and opened.count("b.tar") >= 1 and "a.tar" not in opened


def test_bad_files_are_left_out_and_named(tmp_path, caplog):
    folder = write_photos(tmp_path / "photos", [(64, 64)] * 3)
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    (folder / "002.txt").unlink()
    (folder / "note.png").write_text("no picture")
    (folder / "note.txt").write_text("a note")
    with caplog.at_level(logging.WARNING):
        photos = read(folder, tmp_path)
    assert [photo.place.name for photo in photos.photos] == ["000.png"]
    assert "3 of 4 pictures" in caplog.text and "001.png is damaged or truncated" in caplog.text
    assert "002.png: it has no caption" in caplog.text and "note.png is not an image file" in caplog.text
    (folder / "001.png").write_bytes(whole)  # mended: the index notices
    assert len(read(folder, tmp_path)) == 2
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="holds no usable picture with a caption"):
        read(folder, tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        read(tmp_path / "none", tmp_path)
    write_shard(folder / "cut.tar", {"0.png": png(picture(0)), "0.txt": b"x"})
    (folder / "cut.tar").write_bytes((folder / "cut.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cut\.tar is no complete tar file"):
        read(folder, tmp_path)


def test_upright_before_the_shape_is_chosen(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    picture(0, 40, 80).save(folder / "0.jpg", exif=turned)
    (folder / "0.txt").write_text("upright")
    photos = read(folder, tmp_path)
    assert (photos.photos[0].height, photos.photos[0].width) == (80, 40)
    assert photos.image(0).shape == (352, 176, 3)


def test_buckets_have_their_share_and_batches_one_shape(tmp_path):
    sizes = [(64, 64)] * 6 + [(40, 80)] * 3 + [(80, 40)] * 3 + [(64, 63)]
    photos = read(write_photos(tmp_path / "photos", sizes), tmp_path)
    assert [(s.height, s.width) for s in photos.schedules] == [(256, 256), (176, 352), (352, 176)]
    assert [len(members) for members in photos.members] == [7, 3, 3]
    period, size = len(photos), 2
    batches = [photos.rows(5, index * size, size) for index in range(2 * period)]
    for batch in batches:
        assert len(batch) == size and len({photos.bucket[row] for row in batch}) == 1
    for part in (batches[:period], batches[period:]):
        assert Counter(int(photos.bucket[batch[0]]) for batch in part) == {0: 7, 1: 3, 2: 3}
        drawn = Counter(row for batch in part for row in batch)
        assert set(drawn.values()) == {size} and len(drawn) == period  # every photo as often as any other
    assert batches[:3] == [photos.rows(5, index * size, size) for index in range(3)]
    assert batches != [photos.rows(6, index * size, size) for index in range(2 * period)]
    alone = read(write_photos(tmp_path / "square", [(64, 64)] * 4), tmp_path)
    assert sorted(alone.rows(0, 0, 4)) == [0, 1, 2, 3] and alone.rows(0, 0, 4) == shuffled(4, 0, 0, 4)


def test_sizes_with_too_few_photos_are_given_up(tmp_path):
    folder = write_photos(tmp_path / "photos", [(64, 64)] * 4 + [(40, 80)] * 3 + [(40, 100), (30, 90)])
    assert len(read(folder, tmp_path).schedules) == 4
    photos = read(folder, tmp_path, least=3)
    assert [(s.height, s.width) for s in photos.schedules] == [(256, 256), (176, 352)]
    assert photos.bucket.tolist() == [0] * 4 + [1] * 5  # both long ones went to the nearest shape
    assert photos.image(8).shape == (176, 352, 3)
    train_part, held_out = photos.split(0.3)
    assert len(train_part) == 6 and len(held_out) == 3
    names = {photo.place.name for part in (train_part, held_out) for photo in part.photos}
    assert names == {photo.place.name for photo in photos.photos}
    again = read(folder, tmp_path, least=3).split(0.3)[1]
    assert [p.place.name for p in again.photos] == [p.place.name for p in held_out.photos]
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="cannot be split by held_out"):
            photos.split(share)


def test_maps_are_cut_like_their_pictures_varied_and_cached(tmp_path):
    folder = write_photos(tmp_path / "photos", [(40, 90), (64, 64)])
    (folder / "conditioning_image").mkdir()
    picture(0, 80, 180).save(folder / "conditioning_image" / "000.webp", lossless=True)  # twice the size, same shape
    photos = read(folder, tmp_path)
    assert len(photos) == 2
    whole = np.asarray(fit(picture(0, 80, 180), photos.schedule(0).height, photos.schedule(0).width))
    assert np.array_equal(photos.exact_map("any", ScaleWeaverConfig(kind="sketch"), 0), whole)
    with pytest.raises(ValueError, match="which no preprocessor makes, and 1 pictures have no ready map"):
        photos.check_maps({"any": ScaleWeaverConfig(kind="sketch")})
    with pytest.raises(ValueError, match="do not say for which of the controls canny, depth they are"):
        photos.check_maps({"canny": CANNY, "depth": ScaleWeaverConfig(kind="depth")})
    rng = np.random.default_rng(0)
    varied = [photos.varied_map("canny", CANNY, 1, rng) for _ in range(5)]
    assert len({each.tobytes() for each in varied}) > 1 and all(set(np.unique(each)) <= {0, 255} for each in varied)
    kept = read(folder, tmp_path, map_cache=tmp_path / "maps")
    first = kept.varied_map("canny", CANNY, 1, rng)
    assert np.array_equal(first, np.asarray(Canny(100, 200)(kept.image(1))))
    (file,) = (tmp_path / "maps" / "canny").iterdir()
    Image.new("RGB", (256, 256), "red").save(file)
    assert (kept.exact_map("canny", CANNY, 1) == [255, 0, 0]).all()  # read back, not made again
    other = ScaleWeaverConfig(kind="canny", thresholds=(10, 20))
    assert not (kept.exact_map("canny", other, 1) == [255, 0, 0]).all()
    picture(3, 64, 64).save(folder / "conditioning_image" / "000.webp", lossless=True)
    with pytest.raises(ValueError, match="both must have one shape"):
        photos.exact_map("any", CANNY, 0)


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory) -> dict[str, Any]:
    """Settings of a run on ten photos of two shapes."""
    folder = tmp_path_factory.mktemp("photo_run")
    torch.manual_seed(0)
    save_photo_model(folder / "model")
    write_photos(folder / "photos", [(64, 64)] * 6 + [(40, 80)] * 4)
    values = TINY | {"recipe": "control", "kind": "canny", "model": str(folder / "model"), "lr": 1e-2, "steps": 3}
    values |= {"data": {"photos": str(folder / "photos")}, "out": str(folder / "run"), "held_out": 0.2}
    return values | {"latents": str(folder / "features"), "adapter": {"lora_rank": 2}, "val_pictures": 2}


def recipe_of(values: dict[str, Any], **more: Any) -> tuple[ControlRecipe, TrainConfig]:
    config = TrainConfig.from_mapping(values | more)
    return ControlRecipe(config), config


def test_a_run_on_photos(photo_run):
    recipe, config = recipe_of(photo_run)
    assert recipe.pipe.text_encoder is None  # its features are on disk
    assert isinstance(recipe.pictures, Photos) and len(recipe.pictures) == 8 and len(recipe.held_out) == 2
    shapes = {tuple(recipe.batch(index, 2)["latent"].shape[2:]) for index in range(8)}
    assert shapes == {(16, 16), (11, 22)}
    result = train(recipe, config)
    pipe = VARControlPipeline.from_pretrained(photo_run["model"])
    assert pipe.load_control(result / "canny") == "canny"
    saved = pipe.controls["canny"].config
    assert (saved.detector, saved.thresholds, saved.resolution) == ("opencv-canny", (100, 200), 256)
    assert any(layer.weight.abs().sum() > 0 for layer in pipe.controls["canny"].z.values())
    names = {row[1] for row in curve(Path(photo_run["out"]))}
    assert {"val_loss_canny", "val_gain_canny", "val_loss_without", "val_f1"} <= names
    assert list((Path(photo_run["out"]) / "samples").glob("000003-canny*.png"))


def test_features_from_disk_are_those_of_the_networks(photo_run, tmp_path):
    kept, _ = recipe_of(photo_run, text_dropout=0.0)
    fresh, _ = recipe_of(photo_run, text_dropout=0.0, text_cache=False, latent_cache=False, latents=str(tmp_path))
    assert fresh.pipe.text_encoder is not None and fresh.text is None
    assert not (tmp_path / "train").exists()
    for index in range(3):
        one, other = kept.batch(index, 2), fresh.batch(index, 2)
        assert "features" in one and "ids" in other
        assert torch.allclose(one["latent"], other["latent"], atol=1e-3)
        with torch.no_grad():
            losses = [float(recipe.model(batch, 0)[0]) for recipe, batch in ((kept, one), (fresh, other))]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # nothing is computed again
    stamps = {path: path.stat().st_mtime_ns for path in Path(photo_run["latents"]).rglob("*.*")}
    recipe_of(photo_run)
    assert stamps == {path: path.stat().st_mtime_ns for path in Path(photo_run["latents"]).rglob("*.*")}


def test_a_stopped_run_on_photos_goes_on(photo_run, tmp_path):
    straight, config = recipe_of(photo_run, out=str(tmp_path / "straight"), checkpoint_every=1)
    train(straight, config)
    for minutes in (0, None):
        recipe, config = recipe_of(photo_run, out=str(tmp_path / "parts"), checkpoint_every=1, minutes=minutes)
        train(recipe, config)
    first, second = (
        [row for row in curve(tmp_path / name) if not row[1].startswith("val_") or row[0] == "3"]
        for name in ("straight", "parts")
    )
    assert first == second and len(first) > 20
    state = torch.load(tmp_path / "parts/checkpoints/0000003/state.pt", weights_only=True)
    # what is frozen stays out
    assert not any(name.startswith("vae") or "base_layer" in name for name in state["model"])
    other, config = recipe_of(photo_run, out=str(tmp_path / "parts"), adapter={"lora_targets": ["attn.qkv", "ffn.fc1"]})
    with pytest.raises(ValueError, match="holds other weights than this run trains"):
        train(other, config)
    (tmp_path / "parts/checkpoints/0000003/state.pt").unlink()
    with pytest.raises(ValueError, match=r"holds no state\.pt"):
        train(straight, TrainConfig.from_mapping(photo_run | {"out": str(tmp_path / "parts")}))


def test_checkpointing_and_number_formats_change_little(photo_run):
    plain, _ = recipe_of(photo_run, control_dropout=0.0)
    batch = plain.batch(0, 2)
    gradients = []
    for more in ({}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}):
        recipe, _ = recipe_of(photo_run, control_dropout=0.0, **more)
        trained = [p for group in recipe.parameter_groups() for p in group["params"]]
        assert all(p.dtype == torch.float32 for p in trained)
        loss, _ = recipe.model(batch, 0)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].abs().sum() > 0
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[2], dim=0) > 0.9


def test_optimizers(photo_run, tmp_path, monkeypatch):
    losses = {}
    for name in ("adamw", "adamw_fused"):
        recipe, config = recipe_of(photo_run, optimizer=name, out=str(tmp_path / name))
        train(recipe, config)
        losses[name] = [float(row[2]) for row in curve(tmp_path / name) if row[1] == "loss"]
    assert losses["adamw"] == pytest.approx(losses["adamw_fused"], abs=1e-5)
    with pytest.raises(ValueError, match="optimizer is 'sgd'; expected one of adamw, adamw_fused, adamw_8bit"):
        recipe_of(photo_run, optimizer="sgd")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    recipe, config = recipe_of(photo_run, optimizer="adamw_8bit", out=str(tmp_path / "8bit"))
    with pytest.raises(ValueError, match=r"scaleweaver\[train8bit\]"):
        train(recipe, config)


def test_eight_bit_optimizer_learns_and_resumes(photo_run, tmp_path):
    pytest.importorskip("bitsandbytes")
    for minutes in (0, None):
        recipe, config = recipe_of(photo_run, optimizer="adamw_8bit", out=str(tmp_path / "parts"), minutes=minutes)
        train(recipe, config)
    straight, config = recipe_of(photo_run, optimizer="adamw_8bit", out=str(tmp_path / "straight"))
    train(straight, config)
    first, second = (
        [float(row[2]) for row in curve(tmp_path / name) if row[1] == "loss"] for name in ("straight", "parts")
    )
    assert first == pytest.approx(second, abs=1e-6) and len(first) == 3


def test_shapes_follow_the_models_schedule(photo_run, tmp_path):
    recipe, _ = recipe_of(photo_run, ratios=["1.0", 1.5], latents=str(tmp_path / "a"), latent_cache=False)
    assert isinstance(recipe.pictures, Photos)
    assert {s.grids for s in recipe.pictures.schedules} == {infinity_schedule("1.0").grids}
    wide, _ = recipe_of(photo_run, ratios=["1.0", "0.666"], latents=str(tmp_path / "a"), latent_cache=False)
    assert isinstance(wide.pictures, Photos)
    assert {s.grids for s in wide.pictures.schedules} == {infinity_schedule(r).grids for r in ("1.0", "0.666")}
    for wrong, message in (
        ({"pixels": "2M"}, "pixels is '2M'; expected one of 0.06M"),
        ({"ratios": []}, "ratios is empty"),
        ({"ratios": ["7"]}, "ratio '7' is not a template"),
        ({"val_data": photo_run["data"]}, "and no held_out with it"),
        ({"data": {"photos": "x", "split": "y"}}, "photos take a folder alone"),
        ({"kind": "sketch"}, "which no preprocessor makes"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_of(photo_run, **wrong)
