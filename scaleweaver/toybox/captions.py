"""Captions of scenes: a small grammar, rich in synonyms and word orders, that says only what the picture shows.

Every attribute is sometimes left out, so that short prompts work as well as long ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scaleweaver.toybox.scene import Person, Scene, Thing, base, relations
from scaleweaver.toybox.worlds import VERSION, world_of

# rows and their lengths decide which word a random number picks: what a version says already stays as it is
NOUNS: dict[str, tuple[str, ...]] = {
    "apple": ("apple",),
    "ball": ("ball", "ball", "sphere"),
    "bed": ("bed",),
    "boat": ("boat", "boat", "sailing boat"),
    "bottle": ("bottle",),
    "cactus": ("cactus",),
    "cake": ("cake", "cake", "birthday cake"),
    "car": ("car", "car", "automobile"),
    "cat": ("cat", "cat", "kitten"),
    "chair": ("chair",),
    "cone": ("cone",),
    "cube": ("cube", "cube", "block"),
    "cup": ("cup", "mug"),
    "cylinder": ("cylinder",),
    "duck": ("duck", "duck", "rubber duck"),
    "elephant": ("elephant",),
    "flower": ("flower", "flower", "blossom"),
    "gift": ("gift", "present", "gift box"),
    "hammer": ("hammer",),
    "heart": ("heart",),
    "house": ("house", "house", "hut"),
    "ice cream": ("ice cream", "ice cream cone"),
    "lamp": ("lamp",),
    "mushroom": ("mushroom", "toadstool"),
    "palm": ("palm tree", "palm"),
    "pine": ("pine tree", "pine", "fir tree"),
    "plane": ("plane", "aeroplane", "aircraft"),
    "pyramid": ("pyramid",),
    "rabbit": ("rabbit", "bunny"),
    "ring": ("ring", "ring", "hoop"),
    "robot": ("robot",),
    "rocket": ("rocket", "rocket", "space rocket"),
    "snail": ("snail",),
    "snowman": ("snowman",),
    "sofa": ("sofa", "sofa", "couch"),
    "star": ("star",),
    "table": ("table",),
    "teapot": ("teapot",),
    "tower": ("tower",),
    "train": ("train", "locomotive", "steam engine"),
    "tree": ("tree",),
    "truck": ("truck", "truck", "lorry"),
    "umbrella": ("umbrella", "umbrella", "parasol"),
    "windmill": ("windmill",),
}
BUILD_NOUNS: dict[str, tuple[str, ...]] = {
    "man": ("man", "man", "man", "guy", "gentleman", "person"),
    "woman": ("woman", "woman", "woman", "lady", "person"),
    "boy": ("boy", "boy", "boy", "young boy", "kid", "child"),
    "girl": ("girl", "girl", "girl", "young girl", "kid", "child"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "big", "huge"),
}
FINISH_WORDS: dict[str, tuple[str, ...]] = {
    "matte": ("matte", "dull"),
    "glossy": ("glossy", "shiny", "polished"),
    "metal": ("metal", "metal", "metallic"),
}
FINISH_TOLD = {"matte": 0.15, "glossy": 0.35, "metal": 0.6}  # how often a finish is named
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "spotted", "polka-dot"),
}
HAIR_WORDS: dict[str, tuple[str, ...]] = {
    "short": ("{color} hair", "short {color} hair"),
    "bob": ("{color} hair", "bobbed {color} hair", "a {color} bob"),
    "long": ("{color} hair", "long {color} hair", "long {color} hair"),
    "ponytail": ("{color} hair", "a {color} ponytail", "a {color} ponytail"),
    "bun": ("{color} hair", "{color} hair in a bun", "a {color} bun"),
    "curly": ("{color} hair", "curly {color} hair", "{color} curls"),
    "afro": ("{color} hair", "a {color} afro"),
    "spiky": ("{color} hair", "spiky {color} hair"),
    "braids": ("{color} hair", "{color} braids", "{color} hair in braids"),
    "mohawk": ("a {color} mohawk",),
    "bald": ("a bald head",),
}
POSE_WORDS: dict[str, tuple[str, ...]] = {
    "standing": ("standing", "standing still", "standing upright"),
    "waving": ("waving", "waving", "waving a hand", "waving hello"),
    "arms up": ("with arms raised", "with both arms up", "with raised arms", "cheering"),
    "t pose": ("with arms stretched out", "with arms out to the sides", "in a t-pose"),
    "walking": ("walking", "walking", "taking a walk", "strolling"),
    "running": ("running", "running", "jogging"),
    "sitting": ("sitting", "sitting down", "seated"),
    "kicking": ("kicking", "kicking with one leg"),
    "jumping": ("jumping", "jumping", "leaping", "jumping in the air"),
    "star jump": ("doing a star jump", "with arms and legs spread", "doing a jumping jack"),
    "pointing": ("pointing", "pointing to the side", "pointing with one arm"),
    "hands on hips": ("with hands on hips", "with both hands on the hips"),
    "dancing": ("dancing", "dancing", "doing a dance"),
    "kneeling": ("kneeling", "kneeling down", "on one knee"),
    "bowing": ("bowing", "bending forward", "taking a bow"),
    "flexing": ("flexing", "flexing both arms", "showing muscles"),
    "balancing": ("balancing on one leg", "balancing", "standing on one leg"),
    "crawling": ("crawling", "crawling", "on all fours"),
    "handstand": ("doing a handstand", "doing a handstand", "standing upside down"),
    "lying": ("lying down", "lying", "lying on the ground"),
}
SKY_WORDS: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "at dawn", "at daybreak", "at sunrise", "under a pale pink sky"),
    "morning": ("in the morning", "in the morning", "in morning light", "on a fresh morning"),
    "noon": ("at noon", "at noon", "at midday", "under a blue sky", "under a clear blue sky", "on a sunny day"),
    "sunset": ("at sunset", "at sunset", "at sundown", "under an orange sky", "in the evening sun"),
    "dusk": ("at dusk", "at dusk", "in the twilight", "at twilight"),
    "night": ("at night", "at night", "under a night sky", "under a dark sky", "under the stars"),
    "cloudy": ("on a cloudy day", "under a cloudy sky", "under a grey sky", "on a grey day"),
}
# the hour without a word about the sky, for weather that hides it
HOUR_WORDS: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "at dawn", "at daybreak"),
    "morning": ("in the morning",),
    "noon": ("at noon", "at noon", "at midday"),
    "sunset": ("at sunset", "at sunset", "at sundown"),
    "dusk": ("at dusk", "at dusk", "in the twilight", "at twilight"),
    "night": ("at night",),
    "cloudy": ("on a cloudy day", "on a grey day"),
}
WEATHER_WORDS: dict[str, tuple[str, ...]] = {
    "clear": (),
    "rain": ("in the rain", "in the rain", "in rainy weather", "in pouring rain"),
    "snowfall": ("in falling snow", "in falling snow", "during snowfall", "in a snow shower"),
    "fog": ("in the fog", "in fog", "in the mist", "in foggy weather"),
}
GROUND_WORDS: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "on grass", "on green grass", "on a meadow", "on a lawn"),
    "sand": ("on sand", "on sand", "on a sandy beach", "on the beach", "in the desert"),
    "snow": ("on snow", "on snow", "in the snow", "on snowy ground"),
    "dirt": ("on dirt", "on brown earth", "on bare soil"),
    "stone": ("on stone", "on stone slabs", "on a stone floor", "on grey paving stones"),
    "wood": ("on a wooden floor", "on a wooden floor", "on wood", "on wooden boards"),
    "asphalt": ("on asphalt", "on asphalt", "on a road", "on the street"),
    "carpet": ("on a carpet", "on a carpet", "on a rug"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
    "on top of": ("on top of", "on top of", "on", "standing on"),
    "under": ("under", "below", "underneath"),
}
# "{first} with {second} ..." names the second thing's place seen from the first
WITH_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("to its right", "on its right", "on the right"),
    "right of": ("to its left", "on its left", "on the left"),
    "in front of": ("behind it", "in the back"),
    "behind": ("in front of it", "in the front"),
    "under": ("on top", "on top of it"),
}
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
    "on top of": "under",
    "under": "on top of",
}
NEAR = ("next to", "next to", "beside", "near")
OPENINGS = ("", "", "", "", "", "", "", "there is ", "a picture of ", "a scene with ", "an image of ", "we see ")
COUNTS = {
    2: ("two things", "two objects"),
    3: ("three things", "three objects"),
    4: ("four things", "four objects"),
}
LINKING = ("a", "an", "and", "in", "with", "wearing", "hair", "shirt", "top", "trousers", "pants", "dressed", "both")
LISTING = ("on the left", "in the middle", "on the right", "from left to right")
BETWEEN = ("between", "between", "in between")  # of a person with a thing on either side
TOPS, LEGS = ("shirt", "shirt", "shirt", "top"), ("trousers", "trousers", "pants")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence for a scene; other random numbers give other words for the same facts."""
    if isinstance(scene.items[0], Person):
        body = _person_scene(scene, rng)
    elif len(scene.items) == 1:
        body = _opened(_name(scene.items[0], rng), rng)
    elif len(scene.items) == 2:
        body = _pair(scene, rng)
    elif len(scene.items) == 3:
        body = _three(scene, rng)
    else:
        body = _four(scene, rng)
    ground = _pick(rng, GROUND_WORDS[scene.ground]) if rng.random() < 0.85 else ""
    clear = not WEATHER_WORDS[scene.weather]
    sky = _pick(rng, (SKY_WORDS if clear else HOUR_WORDS)[scene.sky]) if rng.random() < 0.85 else ""
    if not clear and rng.random() < 0.85:
        sky = f"{sky} {_pick(rng, WEATHER_WORDS[scene.weather])}".strip()
    return _placed(body, ground, sky, rng)


def vocabulary(version: int = VERSION) -> list[str]:
    """All words the grammar can say of a version's scenes, sorted; punctuation apart."""
    world = world_of(version)
    told: tuple[tuple[Mapping[Any, tuple[str, ...]], Iterable[Any]], ...] = (
        (NOUNS, world.kinds), (BUILD_NOUNS, world.builds), (FINISH_WORDS, world.finishes),
        (PATTERN_WORDS, world.patterns), (HAIR_WORDS, world.hair), (POSE_WORDS, world.poses),
        (SKY_WORDS, world.skies), (GROUND_WORDS, world.grounds), (WEATHER_WORDS, world.weathers),
        (SIZE_WORDS, SIZE_WORDS), (RELATION_WORDS, RELATION_WORDS), (WITH_WORDS, WITH_WORDS),
        (COUNTS, range(2, len(world.things) + 1)),
    )  # fmt: skip
    phrases = [phrase for table, names in told for name in names for phrase in table[name]]
    phrases += [*world.colors, *world.hair_colors, *NEAR, *OPENINGS, *LINKING, *LISTING, *TOPS, *LEGS]
    phrases += BETWEEN if max(world.company) > 1 else ()
    return sorted({word for phrase in phrases for word in words(phrase.replace("{color}", ""))})


def words(text: str) -> list[str]:
    """The words of a caption, without its punctuation."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())


def _person_scene(scene: Scene, rng: np.random.Generator) -> str:
    person = scene.items[0]
    assert isinstance(person, Person)
    first = _person(person, rng)
    if len(scene.items) == 1:
        return _opened(first, rng)
    if len(scene.items) == 3:
        return _opened(_between_two(scene, first, rng), rng)
    second = _name(scene.items[1], rng)
    relation = _relation(scene, 0, 1)
    draw = rng.random()
    if relation is None or draw < 0.35:
        return _opened(f"{first}, {_pick(rng, NEAR)} {second}", rng)
    if draw < 0.75:
        return _opened(f"{first}, {_pick(rng, RELATION_WORDS[relation])} {second}", rng)
    return _opened(f"{second} {_pick(rng, RELATION_WORDS[OPPOSITE[relation]])} {first}", rng)


def _between_two(scene: Scene, person: str, rng: np.random.Generator) -> str:
    """A person with a thing on either side."""
    left, right = (_name(item, rng) for item in sorted(scene.items[1:], key=lambda item: item.x))
    draw = rng.random()
    if draw < 0.5:
        return f"{person}, {_pick(rng, BETWEEN)} {left} and {right}"
    if draw < 0.8:
        return f"{person}, with {left} on the left and {right} on the right"
    return f"{person}, {_pick(rng, NEAR)} {left} and {right}"


def _pair(scene: Scene, rng: np.random.Generator) -> str:
    i, j = (0, 1) if rng.random() < 0.5 else (1, 0)
    first, second = _name(scene.items[i], rng), _name(scene.items[j], rng)
    relation = _relation(scene, i, j)
    if relation is None:
        return _opened(f"{first} and {second}", rng)
    draw = rng.random()
    if draw < 0.60:
        return _opened(f"{first} {_pick(rng, RELATION_WORDS[relation])} {second}", rng)
    if draw < 0.75 and relation in WITH_WORDS:
        return _opened(f"{first} with {second} {_pick(rng, WITH_WORDS[relation])}", rng)
    if draw < 0.82 and relation in ("left of", "right of"):
        return _opened(f"{first} {_pick(rng, NEAR)} {second}", rng)
    if draw < 0.90:
        return f"{_pick(rng, COUNTS[2])}: {first} and {second}"
    if draw < 0.95:
        return f"{_pick(rng, COUNTS[2])}: {first} {_pick(rng, RELATION_WORDS[relation])} {second}"
    return _opened(f"{first} and {second}", rng)


def _three(scene: Scene, rng: np.random.Generator) -> str:
    """Three things: a row told along its order, or a stack with a neighbour."""
    stacked = [(i, j) for i, relation, j in relations(scene) if relation == "on top of"]
    if stacked:
        top, below = stacked[0]
        other = 3 - top - below
        carried, carrier = _name(scene.items[top], rng), _name(scene.items[below], rng)
        pair = f"{carried} {_pick(rng, RELATION_WORDS['on top of'])} {carrier}"
        relation = _relation(scene, other, below)
        third = _name(scene.items[other], rng)
        if relation is None or rng.random() < 0.4:
            return _opened(f"{pair}, {_pick(rng, NEAR)} {third}", rng)
        return _opened(f"{pair}, {_pick(rng, RELATION_WORDS[OPPOSITE[relation]])} {third}", rng)
    order = sorted(range(3), key=lambda i: scene.items[i].x)
    left, middle, right = (_name(scene.items[i], rng) for i in order)
    draw = rng.random()
    if draw < 0.3:
        return f"{_pick(rng, COUNTS[3])} from left to right: {left}, {middle} and {right}"
    if draw < 0.5:
        return f"{_pick(rng, COUNTS[3])}: {left} on the left, {middle} in the middle and {right} on the right"
    if draw < 0.75:
        return _opened(f"{left}, {middle} and {right}", rng)
    return _opened(f"{left} {_pick(rng, RELATION_WORDS['left of'])} {middle} and {right}", rng)


def _four(scene: Scene, rng: np.random.Generator) -> str:
    """Four things told along their row; what stands on another is told with it."""
    stacked = {below: top for top, relation, below in relations(scene) if relation == "on top of"}
    row = sorted((i for i in range(len(scene.items)) if not base(scene.items[i])), key=lambda i: scene.items[i].x)
    names = []
    for i in row:
        name = _name(scene.items[i], rng)
        if i in stacked:
            top = _name(scene.items[stacked[i]], rng)
            over = _pick(rng, RELATION_WORDS["on top of"])
            name = f"{top} {over} {name}" if rng.random() < 0.6 else f"{name} with {top} on top"
        names.append(name)
    told = f"{', '.join(names[:-1])} and {names[-1]}"
    draw = rng.random()
    if draw < 0.5:
        return f"{_pick(rng, COUNTS[4])} from left to right: {told}"
    return f"{_pick(rng, COUNTS[4])}: {told}" if draw < 0.75 else _opened(told, rng)


def _name(item: Thing | Person, rng: np.random.Generator) -> str:
    """ "a small shiny red ball": the attributes of a thing, some of them left out."""
    if isinstance(item, Person):
        return _person(item, rng)
    parts = []
    if rng.random() < (0.05 if item.size == "medium" else 0.8):
        parts.append(_pick(rng, SIZE_WORDS[item.size]))
    if rng.random() < FINISH_TOLD[item.finish]:
        parts.append(_pick(rng, FINISH_WORDS[item.finish]))
    if rng.random() < 0.94:
        parts.append(item.color)
    if PATTERN_WORDS[item.pattern] and rng.random() < 0.85:
        # "a striped red ball" or "a red striped ball"
        parts.insert(len(parts) - rng.integers(2), _pick(rng, PATTERN_WORDS[item.pattern]))
    return _article(" ".join([*parts, _pick(rng, NOUNS[item.kind])]))


def _person(person: Person, rng: np.random.Generator) -> str:
    """ "a woman with brown hair in an orange shirt and blue trousers, waving"."""
    noun = _article(_pick(rng, BUILD_NOUNS[person.build]))
    hair = clothes = ""
    if rng.random() < 0.45:
        style = _pick(rng, HAIR_WORDS[person.hair])
        hair = f" with {style.format(color=person.hair_color)}"
    if rng.random() < 0.94:
        wears = _pick(rng, ("in", "in", "wearing", "dressed in"))
        clothes = f" {wears} {_article(person.shirt)} {_pick(rng, TOPS)}"
        if rng.random() < 0.8:
            clothes += f" and {person.trousers} {_pick(rng, LEGS)}"
    if rng.random() < 0.06:
        return f"{noun}{hair}{clothes}"
    pose = _pick(rng, POSE_WORDS[person.pose])
    if rng.random() < 0.3:
        # the pose first: "a man waving, in a red shirt"
        return f"{noun} {pose},{hair}{clothes}" if hair or clothes else f"{noun} {pose}"
    return f"{noun}{hair}{clothes}{',' if rng.random() < 0.4 or pose.startswith(('with', 'in ')) else ''} {pose}"


def _opened(body: str, rng: np.random.Generator) -> str:
    return _pick(rng, OPENINGS) + body


def _placed(body: str, ground: str, sky: str, rng: np.random.Generator) -> str:
    """The body with where and when around it."""
    draw = rng.random()
    if draw < 0.12 and sky:
        return " ".join(part for part in (f"{sky},", body, ground) if part)
    if draw < 0.20 and (ground or sky):
        place = " ".join(part for part in (ground, sky) if part)
        return f"{place}, {body}"
    if draw < 0.32:
        ground, sky = sky, ground
    place = " ".join(part for part in (ground, sky) if part)
    if not place:
        return body
    # a comma keeps the place from being read as part of a long last phrase
    return f"{body}, {place}" if "," in body or rng.random() < 0.2 else f"{body} {place}"


def _relation(scene: Scene, i: int, j: int) -> str | None:
    """The relation of item i to item j, or None where the picture leaves it open."""
    for first, relation, second in relations(scene):
        if (first, second) == (i, j):
            return relation
        if (first, second) == (j, i):
            return OPPOSITE[relation]
    return None


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
