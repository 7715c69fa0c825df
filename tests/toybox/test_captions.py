import re

import numpy as np
import pytest

from scaleweaver.toybox import captions
from scaleweaver.toybox.captions import caption, vocabulary, words
from scaleweaver.toybox.finish import FINISHES, PATTERNS
from scaleweaver.toybox.looks import GROUNDS, SKIES
from scaleweaver.toybox.people import BUILDS, HAIR_STYLES, POSES
from scaleweaver.toybox.scene import COLORS, SIZES, Camera, Person, Scene, Thing, generator, relations, sample_scene
from scaleweaver.toybox.things import KINDS
from scaleweaver.toybox.weather import WEATHERS

SCENES = [sample_scene("train", i) for i in range(250)]
TEXTS = [
    (scene, caption(scene, generator("train", i, stream=s))) for i, scene in enumerate(SCENES) for s in (1, 2, 3, 4)
]


def test_the_tables_cover_the_world():
    assert set(captions.NOUNS) == set(KINDS)
    assert set(captions.BUILD_NOUNS) == set(BUILDS)
    assert set(captions.POSE_WORDS) == set(POSES)
    assert set(captions.HAIR_WORDS) == set(HAIR_STYLES)
    assert set(captions.SKY_WORDS) == set(captions.HOUR_WORDS) == set(SKIES)
    assert set(captions.WEATHER_WORDS) == set(WEATHERS)
    assert set(captions.FINISH_WORDS) == set(captions.FINISH_TOLD) == set(FINISHES)
    assert set(captions.PATTERN_WORDS) == set(PATTERNS)
    assert set(captions.GROUND_WORDS) == set(GROUNDS)
    assert set(captions.SIZE_WORDS) == set(SIZES)


def test_grounds_have_the_colour_their_phrases_name():
    named = 0
    for ground, phrases in captions.GROUND_WORDS.items():
        away = {name: np.linalg.norm(np.subtract(rgb, GROUNDS[ground].color)) for name, rgb in COLORS.items()}
        for color in {word for phrase in phrases for word in words(phrase)} & set(COLORS):
            named += 1
            assert color == min(away, key=lambda name: away[name]), (ground, color)
    assert named >= 2


def test_captions_are_deterministic_and_varied():
    scene = SCENES[3]
    assert caption(scene, generator("train", 3, stream=1)) == caption(scene, generator("train", 3, stream=1))
    assert len({caption(scene, generator("train", 3, stream=s)) for s in range(1, 21)}) > 12
    assert len({text for _, text in TEXTS}) > 0.9 * len(TEXTS)


def test_every_word_is_in_the_vocabulary():
    known = set(vocabulary())
    said = {word for _, text in TEXTS for word in words(text)}
    assert said <= known, said - known
    assert len(said) > 0.9 * len(known), known - said  # and the vocabulary is not padded
    assert all(color in known for color in COLORS)


def test_captions_are_clean_text():
    for _, text in TEXTS:
        assert re.fullmatch(r"[a-z]+(?:(?:-|, | |: )[a-z]+)*", text), text
        assert not re.search(r"\ba [aeiou]", text) and not re.search(r"\ban [^aeiou]", text), text
    lengths = [len(words(text)) for _, text in TEXTS]
    assert min(lengths) >= 2 and max(lengths) <= 40 and 8 < np.median(lengths) < 20


def test_captions_say_nothing_false():
    for scene, text in TEXTS:
        spoken = words(text)
        own = set()
        for item in scene.items:
            if isinstance(item, Thing):
                own |= {item.color} | {w for noun in captions.NOUNS[item.kind] for w in words(noun)}
            else:
                own |= {item.shirt, item.trousers, item.hair_color}
                own |= {w for phrase in captions.POSE_WORDS[item.pose] for w in words(phrase)}  # a star jump is no star
        # colours that belong to places, not to items
        place = {
            w
            for phrase in (*captions.GROUND_WORDS[scene.ground], *captions.SKY_WORDS[scene.sky])
            for w in words(phrase)
        }
        assert not {word for word in spoken if word in COLORS} - own - place, text
        nouns = {w for kind in captions.NOUNS.values() for noun in kind for w in words(noun)}
        assert not {word for word in spoken if word in nouns} - own - place - {"box", "tree", "space"}, text


def test_attributes_are_sometimes_left_out_and_colours_rarely():
    alone = [
        (scene.items[0], text) for scene, text in TEXTS if len(scene.items) == 1 and isinstance(scene.items[0], Thing)
    ]
    colored = np.mean([item.color in text for item, text in alone])
    assert 0.88 < colored < 0.99
    sized = [any(word in text for word in captions.SIZE_WORDS["large"]) for item, text in alone if item.size == "large"]
    assert 0.6 < np.mean(sized) < 0.95


def build(relation: str) -> Scene:
    one = Thing("cube", "red", "medium", "matte", 0.0, 0.0, 0.0, 0.0)
    at = {
        "left of": (1, 0, 0),
        "right of": (-1, 0, 0),
        "in front of": (0, 1, 0),
        "behind": (0, -1, 0),
        "under": (0, 0, 0.86),
    }
    x, y, z = at[relation]
    other = Thing("ball", "blue", "medium", "matte", x, y, z, 0.0)
    return Scene((one, other), "grass", "noon", 0.5, 0.8, Camera(1.0, 0.2, 3.0, 3.0))


@pytest.mark.parametrize("relation", ["left of", "right of", "in front of", "behind", "under"])
def test_relation_phrases_hold_in_both_directions(relation):
    scene = build(relation)
    seen = set()
    for stream in range(1, 150):
        text = caption(scene, generator("train", 0, stream=stream)).replace("sphere", "ball").replace("block", "cube")
        for name, phrases in captions.RELATION_WORDS.items():
            for phrase in phrases:
                if re.search(rf"cube {phrase} an? [a-z- ]*ball", text):
                    assert name == relation, text
                    seen.add("forward")
                if re.search(rf"ball {phrase} an? [a-z- ]*cube", text):
                    assert name == captions.OPPOSITE[relation], text
                    seen.add("backward")
    assert seen == {"forward", "backward"}


def test_rows_of_three_are_told_from_left_to_right():
    rows = 0
    for scene, text in TEXTS:
        if len(scene.items) == 3 and "on the left," in text and "in the middle" in text:
            rows += 1
            order = sorted(scene.items, key=lambda item: item.x)
            first, middle, last = re.search(
                r": (.*) on the left, (.*) in the middle and (.*) on the right", text
            ).groups()
            for item, phrase in zip(order, (first, middle, last), strict=True):
                assert any(phrase.endswith(noun) for noun in captions.NOUNS[item.kind]), text
    assert rows > 3


def test_people_are_described():
    people = [(scene, text) for scene, text in TEXTS if isinstance(scene.items[0], Person)]
    posed = [any(phrase in text for phrase in captions.POSE_WORDS[scene.items[0].pose]) for scene, text in people]
    assert np.mean(posed) > 0.85
    dressed = [scene.items[0].shirt in text for scene, text in people]
    assert np.mean(dressed) > 0.88
    assert all(len(relations(scene)) == len(scene.items) - 1 for scene, _ in people)
