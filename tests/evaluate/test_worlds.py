"""Judge and estimator know one version of the world and refuse scenes of another."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import tiny_pipeline

from scaleweaver.evaluate.attributes import PERSON, AttributeJudge, Judgement, facts, score
from scaleweaver.evaluate.examples import FolderExamples, ToyboxExamples
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.evaluate.quality import Metrics, evaluate_quality
from scaleweaver.toybox import captions
from scaleweaver.toybox.captions import vocabulary, words
from scaleweaver.toybox.folder import write_folder
from scaleweaver.toybox.scene import Person, Thing, attributes, relations, sample_scene
from scaleweaver.toybox.worlds import world_of
from scaleweaver.train.judge import labels_of

SECOND = [sample_scene("test", index, version=2) for index in range(80)]
NARROW = {"widths": [8, 8, 8, 8, 8]}


def test_explicit_captions_of_version_2_say_every_attribute():
    known = set(vocabulary(2))
    for scene in SECOND:
        text = explicit_caption(scene)
        assert set(words(text)) <= known, text
        for item in scene.items:
            if isinstance(item, Person):
                assert f"{item.shirt} shirt and {item.trousers} trousers" in text, text
                continue
            pattern = "" if item.pattern == "plain" else f"{item.pattern} "
            assert f"{item.color} {pattern}{captions.NOUNS[item.kind][0]}" in text, text
            assert item.finish == "matte" or f"{item.finish} {item.color}" in text, text
        assert scene.weather == "clear" or text.endswith(captions.WEATHER_WORDS[scene.weather][0]), text
    assert {len(scene.items) for scene in SECOND} == {1, 2, 3, 4}


def test_explicit_captions_of_four_things_say_their_relations():
    fours = [scene for scene in SECOND if len(scene.items) == 4]
    assert len(fours) > 3
    for scene in fours:
        text = explicit_caption(scene)
        at = {i: text.index(_phrase(scene.items[i])) for i in range(4)}
        for i, relation, j in relations(scene):
            if relation == "on top of":
                assert f"{_phrase(scene.items[i])} on top of " in text and at[i] < at[j]
            elif relation in ("left of", "right of"):
                assert (at[i] < at[j]) == (relation == "left of"), text


def _phrase(thing: Thing) -> str:
    pattern = "" if thing.pattern == "plain" else f"{thing.pattern} "
    return f"{thing.color} {pattern}{captions.NOUNS[thing.kind][0]}"


def test_a_judge_of_version_1_refuses_scenes_of_version_2():
    judge, scene = AttributeJudge(**NARROW), SECOND[0]
    with pytest.raises(ValueError, match=r"this judge knows version 1 .* of version 2"):
        labels_of(scene, judge)
    found = judge.judge(np.zeros((1, 64, 64, 3), np.uint8))[0]
    with pytest.raises(ValueError, match="the judge knows version 1"):
        score([found], [attributes(scene)])
    assert AttributeJudge.built_in().config["world"] == 1


def test_a_judge_of_version_2_reads_version_2(tmp_path):
    world = world_of(2)
    judge = AttributeJudge(kinds=(*world.kinds, PERSON), poses=world.poses, world=2, **NARROW)
    judge.save_pretrained(tmp_path)
    judge = AttributeJudge.from_pretrained(tmp_path)
    assert all(len(labels_of(scene, judge).items) == len(scene.items) for scene in SECOND)
    asked = attributes(SECOND[0])
    nothing = Judgement((), SECOND[0].ground, SECOND[0].sky, world=2)
    assert facts(nothing, asked)["ground"] == [True] and facts(nothing, asked)["count"] == [False]
    with pytest.raises(ValueError, match=r"the judge knows version 2 .* of version 1"):
        facts(nothing, attributes(sample_scene("test", 0)))
    assert facts(replace(nothing, world=1), attributes(sample_scene("test", 0)))["count"] == [False]


def test_folders_of_version_2_are_refused_by_networks_of_version_1(tmp_path):
    for version in (1, 2):
        write_folder(tmp_path / str(version), "test", 4, size=32, supersample=1, version=version)
    toybox = {"depth": {"model": "toybox"}}
    first, second = (FolderExamples(tmp_path / str(version), ["canny"], height=32, width=32) for version in (1, 2))
    assert (first.world, second.world, ToyboxExamples().world) == (1, 2, 1)
    assert FolderExamples(tmp_path / "1", ["depth"], height=32, width=32, detectors=toybox).world == 1
    with pytest.raises(ValueError, match='network of "depth" knows version 1'):
        FolderExamples(tmp_path / "2", ["depth"], height=32, width=32, detectors=toybox)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (32, 32)).save(photos / "a.png")
    (photos / "a.txt").write_text("black")
    assert FolderExamples(photos, height=32, width=32).world is None


def test_quality_of_version_2_is_not_judged_by_a_judge_of_version_1(tmp_path):
    write_folder(tmp_path / "world", "test", 4, size=32, supersample=1, version=2)
    examples = FolderExamples(tmp_path / "world", height=32, width=32)
    with pytest.raises(ValueError, match="the judge knows version 1"):
        evaluate_quality(tiny_pipeline(), examples, tmp_path / "out", Metrics(AttributeJudge(**NARROW)), count=2)
    assert not (tmp_path / "out").exists()
