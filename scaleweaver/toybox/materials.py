"""What the parts of things are made of: the thing's own colour, or one of a few fixed ones."""

from __future__ import annotations

from scaleweaver.toybox.mesh import Mesh

# material number = position in this table; 0 is the thing's own colour. RGB as seen on a lit surface.
MATERIALS: dict[str, tuple[float, float, float]] = {
    "main": (0.0, 0.0, 0.0),
    "wood": (0.55, 0.33, 0.16),
    "bark": (0.42, 0.27, 0.15),
    "leaf": (0.20, 0.58, 0.20),
    "cream": (0.97, 0.90, 0.74),
    "white": (0.96, 0.96, 0.95),
    "grey": (0.60, 0.62, 0.65),
    "steel": (0.40, 0.43, 0.48),
    "coal": (0.11, 0.11, 0.13),
    "glass": (0.50, 0.74, 0.90),
    "carrot": (0.98, 0.52, 0.08),
    "sun": (1.00, 0.85, 0.25),
    "brick": (0.70, 0.30, 0.22),
    "glow": (1.00, 0.95, 0.70),
    "waffle": (0.86, 0.62, 0.34),
    "rose": (0.96, 0.66, 0.70),
}
_NUMBER = {name: number for number, name in enumerate(MATERIALS)}


def paint(mesh: Mesh, name: str) -> Mesh:
    """The mesh in one of the fixed colours."""
    return mesh.painted(_NUMBER[name])
