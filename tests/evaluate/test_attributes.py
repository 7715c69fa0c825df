"""The judge and its scores: perfect answers score one, every kind of mistake costs what it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scaleweaver.evaluate.attributes import AttributeJudge, FoundItem, Judgement, related, score
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.toybox.captions import vocabulary, words
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.scene import Person, Thing, attributes, sample_scene
from scaleweaver.train.judge import JudgeLoss, collate, heat_maps, labels_of, softened

SCENES = [sample_scene("test", index) for index in range(40)]


def tiny_judge() -> AttributeJudge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AttributeJudge(widths=(8, 8, 16, 16, 16)).eval()


def perfect_answers(judge: AttributeJudge, scene, cells: int = 16) -> dict[str, torch.Tensor]:
    """What `forward` would return for a scene if it made no mistake."""
    labels = labels_of(scene, judge)
    out = {name: torch.zeros(1, size, cells, cells) for name, size in judge.sizes.items()}
    out["heat"][0] = torch.logit(torch.from_numpy(heat_maps(labels, judge.sizes["heat"], (cells, cells))), eps=1e-4)
    for (_, *looks), (x, y, base) in zip(labels.items, labels.places, strict=True):
        row, column = int(y * cells), int(x * cells)
        for name, value in zip(("color", "trousers", "pose"), looks, strict=True):
            if value >= 0:
                out[name][0, value, row, column] = 9.0
        place = torch.tensor([x * cells - column, y * cells - row, base * cells - row]) - 0.5
        out["place"][0, :, row, column] = place
    for name in ("ground", "sky"):
        out[name] = torch.zeros(1, judge.whole_sizes[name])
        out[name][0, getattr(labels, name)] = 9.0
    return out


def found(kind: str = "cube", color: str = "red", x: float = 0.5, y: float = 0.5, **more) -> FoundItem:
    return FoundItem(**{"kind": kind, "color": color, "x": x, "y": y, "base": y + 0.1, "confidence": 0.9} | more)


def thing(**given) -> FoundItem:
    return found(**{"trousers": None, "pose": None} | given)


def asked(*items: dict, relations: list | None = None) -> dict:
    return {"count": len(items), "items": list(items), "relations": relations or [], "ground": "grass", "sky": "noon"}


def a_thing(kind: str, color: str) -> dict:
    return {"type": "thing", "kind": kind, "color": color}


def test_perfect_answers_score_one_on_every_fact():
    judge = tiny_judge()
    judgements = [judge.read(perfect_answers(judge, scene))[0] for scene in SCENES]
    scores = score(judgements, [attributes(scene) for scene in SCENES])
    assert set(scores) == {"kind", "color", "count", "relation", "pose", "clothes", "ground", "sky", "all"}
    assert min(scores.values()) == 1.0
    shuffled = score(judgements, [attributes(scene) for scene in [*SCENES[1:], SCENES[0]]])
    assert shuffled["kind"] < 0.4 and shuffled["all"] < 0.1 and shuffled["sky"] < 0.5


def test_places_read_are_those_of_the_scene():
    judge, scene = tiny_judge(), next(s for s in SCENES if len(s.items) == 2)
    labels = labels_of(scene, judge)
    items = judge.read(perfect_answers(judge, scene))[0].items
    read = sorted((item.x, item.y, item.base) for item in items)
    np.testing.assert_allclose(read, sorted(map(tuple, labels.places)), atol=1e-5)
    assert all(0 < value < 1 for place in read for value in place)


def test_labels_lie_on_the_things_of_the_picture():
    """A thing's centre, projected by the camera, is on that thing's own pixels in most scenes."""
    judge, batch = tiny_judge(), draw_batch("test", range(12), size=64)
    hits = []
    for scene, ids in zip(batch.scenes, batch.ids, strict=True):
        for number, (x, y, _) in enumerate(labels_of(scene, judge).places):
            hits.append(int(ids[int(y * 64), int(x * 64)]) == number + 1)
    assert np.mean(hits) > 0.8


def test_two_things_of_one_kind_are_told_apart_by_colour():
    wanted = asked(a_thing("cube", "red"), a_thing("cube", "green"), relations=[[0, "left of", 1]])
    green, red = thing(color="green", x=0.7), thing(color="red", x=0.3)
    scores = score([Judgement((green, red), "grass", "noon")], [wanted])
    assert min(scores.values()) == 1.0
    swapped = score([Judgement((replace(green, x=0.3), replace(red, x=0.7)), "grass", "noon")], [wanted])
    assert swapped["color"] == swapped["kind"] == 1.0 and swapped["relation"] == 0.0
    one = score([Judgement((red,), "grass", "noon")], [wanted])
    assert (one["kind"], one["color"], one["relation"], one["count"], one["all"]) == (0.5, 0.5, 0.0, 0.0, 0.0)


def test_every_mistake_costs_its_own_fact():
    wanted = asked({"type": "person", "pose": "waving", "shirt": "blue", "trousers": "black"}, a_thing("tree", "green"))
    person = found("person", "blue", trousers="black", pose="waving", x=0.3)
    tree = thing(kind="tree", color="green", x=0.7)
    assert min(score([Judgement((person, tree), "grass", "noon")], [wanted]).values()) == 1.0
    for mistake, name, value in (
        ((replace(person, pose="bowing"), tree), "pose", 0.0),
        ((replace(person, color="red"), tree), "clothes", 0.5),
        ((person, replace(tree, color="red")), "color", 0.0),
        ((person, tree, thing(kind="ball", x=0.5)), "count", 0.0),
        ((person, replace(tree, kind="ball")), "kind", 0.5),
    ):
        scores = score([Judgement(mistake, "grass", "noon")], [wanted])
        assert scores[name] == value and scores["all"] == 0.0, name
    assert "relation" not in scores  # nothing was asked
    place = score([Judgement((person, tree), "sand", "night")], [wanted])
    assert place["ground"] == place["sky"] == 0.0 and place["all"] == 1.0


def test_relations():
    left, right = thing(x=0.3), thing(x=0.6)
    assert related(left, "left of", right) and not related(right, "left of", left)
    assert related(right, "right of", left) and not related(left, "right of", right)
    far, near = thing(base=0.6), thing(base=0.8)
    assert related(far, "behind", near) and related(near, "in front of", far) and not related(far, "in front of", near)
    carrier, rider = thing(y=0.7, base=0.9), thing(y=0.4, base=0.5)
    assert related(rider, "on top of", carrier) and not related(carrier, "on top of", rider)
    assert not related(replace(rider, x=0.8), "on top of", carrier)
    assert not related(None, "left of", right)
    with pytest.raises(ValueError, match='"inside" is unknown'):
        related(left, "inside", right)


def test_peaks_need_confidence_and_suppress_their_neighbours():
    judge = tiny_judge()
    out = {name: torch.zeros(1, size, 8, 8) for name, size in judge.sizes.items()}
    out |= {name: torch.zeros(1, size) for name, size in judge.whole_sizes.items()}
    out["heat"] -= 9.0
    assert judge.read(out)[0].items == ()
    out["heat"][0, 3, 2, 2] = 3.0
    out["heat"][0, 5, 2, 3] = 2.0  # another kind beside it: the same thing, seen twice
    out["heat"][0, 5, 6, 6] = 1.0
    kinds = judge.config["kinds"]
    assert [item.kind for item in judge.read(out)[0].items] == [kinds[3], kinds[5]]
    assert [item.kind for item in AttributeJudge(threshold=0.9).read(out)[0].items] == [kinds[3]]


def test_round_trip_and_batches(tmp_path):
    judge = tiny_judge()
    pictures = draw_batch("test", range(3), size=64).images.mul(255).byte().permute(0, 2, 3, 1).numpy()
    judge.register_to_config(threshold=0.01)  # fresh weights are sure of nothing
    before = judge.judge(pictures)
    assert sum(len(judgement.items) for judgement in before)
    judge.save_pretrained(tmp_path)
    loaded = AttributeJudge.from_pretrained(tmp_path).eval()
    assert loaded.judge(pictures) == before
    assert [one.ground for one in loaded.judge(pictures, batch=1)] == [one.ground for one in before]
    assert sum(p.numel() for p in AttributeJudge().parameters()) < 1_500_000


def test_the_built_in_judge_is_a_folder_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("scaleweaver.evaluate.attributes.built_in_folder", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match="this installation has no judge"):
        AttributeJudge.built_in()
    judge = tiny_judge()
    judge.to(torch.bfloat16).save_pretrained(tmp_path / "judge")
    loaded = AttributeJudge.built_in()
    assert loaded.dtype == torch.float32 and not loaded.training
    pictures = draw_batch("test", range(2), size=64).pixels
    assert loaded.features(pictures).shape == (2, 32) and len(loaded.judge(pictures)) == 2


def test_wrong_pictures_and_lists_are_refused():
    judge = tiny_judge()
    with pytest.raises(ValueError, match="multiples of 32"):
        judge.judge(np.zeros((1, 40, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        judge.judge(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="pass one each"):
        score([], [asked()])


def test_explicit_captions_say_every_attribute_in_the_training_words():
    known = set(vocabulary())
    for scene in SCENES:
        text = explicit_caption(scene)
        assert set(words(text)) <= known, text
        for item in scene.items:
            if isinstance(item, Thing):
                assert f"{item.color} " in text, text
            else:
                assert f"{item.shirt} shirt and {item.trousers} trousers" in text, text
        for i, relation, j in attributes(scene)["relations"]:
            if len(scene.items) == 2:
                first, second = text.split(f" {relation} ", 1)
                looks = [
                    item.shirt if isinstance(item, Person) else item.color for item in (scene.items[i], scene.items[j])
                ]
                assert looks[0] in first and looks[1] in second, text
            elif relation in ("left of", "right of") and "on top of" not in text:
                assert "from left to right" in text
    assert sum(" on top of " in explicit_caption(scene) for scene in SCENES) > 1


def test_softened_pictures_stay_pictures():
    picture = draw_batch("test", [1], size=64).images[0].mul(255).byte().permute(1, 2, 0).numpy()
    for seed in range(12):
        soft = softened(picture, np.random.default_rng(seed))
        assert soft.shape == picture.shape and soft.dtype == np.uint8
        difference = np.abs(soft.astype(int) - picture).mean()
        assert 0 < difference < 25


def test_a_judge_learns_the_pictures_it_is_shown():
    judge, batch = tiny_judge().train(), draw_batch("test", range(4), size=64)
    pictures = batch.images.mul(255).byte().permute(0, 2, 3, 1).numpy()
    inputs = collate(pictures, [labels_of(scene, judge) for scene in batch.scenes], judge)
    model, truth = JudgeLoss(judge), [attributes(scene) for scene in batch.scenes]
    before = score(judge.judge(pictures), truth)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    for _ in range(120):
        loss, _ = model(inputs, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = score(judge.judge(pictures), truth)
    assert before["kind"] < 0.3 and after["kind"] > 0.9 and after["color"] > 0.9 and after["count"] == 1.0
