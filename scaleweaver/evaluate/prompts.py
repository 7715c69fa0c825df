"""Prompts that say everything a scene's attributes hold, so that each of them may be asked of the picture.

The captions of training leave attributes out at random; a score must not count what nobody asked for.
"""

from __future__ import annotations

from scaleweaver.toybox.captions import (
    BUILD_NOUNS,
    COUNTS,
    FINISH_WORDS,
    GROUND_WORDS,
    HAIR_WORDS,
    NOUNS,
    OPPOSITE,
    PATTERN_WORDS,
    POSE_WORDS,
    SIZE_WORDS,
    SKY_WORDS,
    WEATHER_WORDS,
)
from scaleweaver.toybox.scene import Person, Scene, Thing, base, relations


def explicit_caption(scene: Scene) -> str:
    """One fixed wording in the training grammar: things, colours, clothes, poses, relations, ground, sky, weather."""
    body = _body(scene)
    comma = "," if "," in body else ""
    weather = "".join(f" {words}" for words in WEATHER_WORDS[scene.weather][:1])
    return f"{body}{comma} {GROUND_WORDS[scene.ground][0]} {SKY_WORDS[scene.sky][0]}{weather}"


def _body(scene: Scene) -> str:
    names = [_person(item) if isinstance(item, Person) else _thing(item) for item in scene.items]
    links = relations(scene)
    if len(names) == 4:
        return f"{COUNTS[4][0]} from left to right: {_row(scene, names)}"
    if len(names) == 3 and isinstance(scene.items[0], Person):
        left, right = sorted((1, 2), key=lambda i: scene.items[i].x)
        return f"{names[0]}, between {names[left]} and {names[right]}"
    if len(names) == 3 and (stack := [(i, j) for i, relation, j in links if relation == "on top of"]):
        top, carrier = stack[0]
        other = 3 - top - carrier
        pair = f"{names[top]} on top of {names[carrier]}"
        return f"{pair}, {_relation(scene, carrier, other) or 'next to'} {names[other]}"
    if len(names) == 3:
        left, middle, right = sorted(range(3), key=lambda i: scene.items[i].x)
        return f"{COUNTS[3][0]} from left to right: {names[left]}, {names[middle]} and {names[right]}"
    if len(names) == 2:
        i, relation, j = links[0] if links else (0, "next to", 1)
        comma = "," if isinstance(scene.items[i], Person) else ""
        return f"{names[i]}{comma} {relation} {names[j]}"
    return names[0]


def _row(scene: Scene, names: list[str]) -> str:
    """Things from left to right, each with what stands on it."""
    stacked = {below: top for top, relation, below in relations(scene) if relation == "on top of"}
    row = sorted((i for i in range(len(names)) if not base(scene.items[i])), key=lambda i: scene.items[i].x)
    told = [f"{names[stacked[i]]} on top of {names[i]}" if i in stacked else names[i] for i in row]
    return f"{', '.join(told[:-1])} and {told[-1]}"


def _relation(scene: Scene, i: int, j: int) -> str | None:
    """The relation of item i to item j, told from either side."""
    for first, relation, second in relations(scene):
        if (first, second) == (i, j):
            return relation
        if (first, second) == (j, i):
            return OPPOSITE[relation]
    return None


def _thing(thing: Thing) -> str:
    size = [] if thing.size == "medium" else [SIZE_WORDS[thing.size][0]]
    finish = [] if thing.finish == "matte" else [FINISH_WORDS[thing.finish][0]]
    pattern = PATTERN_WORDS[thing.pattern][:1]
    return _article(" ".join([*size, *finish, thing.color, *pattern, NOUNS[thing.kind][0]]))


def _person(person: Person) -> str:
    hair = HAIR_WORDS[person.hair][-1].format(color=person.hair_color)
    clothes = f"in {_article(person.shirt)} shirt and {person.trousers} trousers"
    return f"{_article(BUILD_NOUNS[person.build][0])} with {hair} {clothes}, {POSE_WORDS[person.pose][0]}"


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
