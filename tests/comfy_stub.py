"""The part of ComfyUI's `comfy_api.latest` that our nodes use: schemas that refuse fields which the interface lacks.

ComfyUI is an application and no package, so it cannot be a test dependency. `installed()` puts the stand-in where the
nodes import it from.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NODES = Path(__file__).resolve().parent.parent / "comfyui"
_SOCKET = {"display_name", "optional", "tooltip", "lazy", "extra_dict"}
_WIDGET = _SOCKET | {"default", "socketless"}


class Input:
    """One input of a node: its type, id, and the fields that this type has."""

    def __init__(self, kind: str, allowed: set[str], name: str, **fields: Any) -> None:
        unknown = set(fields) - allowed
        if unknown:
            raise TypeError(f"{kind}.Input does not take {sorted(unknown)}")
        self.kind, self.id, self.fields = kind, name, fields
        self.optional = fields.get("optional", False)


class Output:
    def __init__(self, kind: str, id: str | None = None, display_name: str | None = None) -> None:
        self.kind, self.id, self.display_name = kind, id, display_name


def socket(kind: str, *allowed: str, widget: bool = False) -> Any:
    """A type of the interface, with its Input and Output."""
    fields = (_WIDGET if widget else _SOCKET) | set(allowed)
    return SimpleNamespace(
        io_type=kind,
        Input=lambda name, **given: Input(kind, fields, name, **given),
        Output=lambda **given: Output(kind, **given),
    )


class Schema:
    def __init__(
        self, *, node_id: str, display_name: str, category: str, inputs: list[Input], outputs: list[Output],
        description: str = "",
    ) -> None:  # fmt: skip
        self.node_id, self.display_name, self.category = node_id, display_name, category
        self.inputs, self.outputs, self.description = inputs, outputs, description


class NodeOutput:
    def __init__(self, *args: Any) -> None:
        self.args = args


class ComfyNode:
    """Base of all nodes; `run` does what the executor does with values for some of the inputs."""

    @classmethod
    def run(cls, **values: Any) -> tuple[Any, ...]:
        schema = cls.define_schema()  # type: ignore[attr-defined]
        for one in schema.inputs:
            if one.id not in values and not one.optional:
                values[one.id] = one.fields["default"]
        assert set(values) <= {one.id for one in schema.inputs}
        result = cls.execute(**values)  # type: ignore[attr-defined]
        assert len(result.args) == len(schema.outputs)
        return tuple(result.args)


class ComfyExtension:
    async def on_load(self) -> None:
        """Called once, before the nodes are asked for."""


@contextmanager
def installed() -> Iterator[ModuleType]:
    """The folder of nodes, imported as ComfyUI imports it: by its path, under a name of its own."""
    latest = ModuleType("comfy_api.latest")
    number = ("min", "max", "step", "display_mode")
    latest.io = SimpleNamespace(  # type: ignore[attr-defined]
        ComfyNode=ComfyNode, Schema=Schema, NodeOutput=NodeOutput, Custom=socket,
        Image=socket("IMAGE"), Mask=socket("MASK"),
        String=socket("STRING", "multiline", "placeholder", "dynamic_prompts", widget=True),
        Int=socket("INT", *number, "control_after_generate", widget=True),
        Float=socket("FLOAT", *number, "round", widget=True),
        Boolean=socket("BOOLEAN", "label_on", "label_off", widget=True),
        Combo=socket("COMBO", "options", "control_after_generate", "upload", widget=True),
    )  # fmt: skip
    latest.ComfyExtension = ComfyExtension  # type: ignore[attr-defined]
    package = ModuleType("comfy_api")
    names = {"comfy_api": package, "comfy_api.latest": latest}
    before = set(sys.modules)
    sys.modules.update(names)
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_scaleweaver", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in [*names, *(name for name in sys.modules if name.startswith("custom_nodes_scaleweaver"))]:
            if name not in before:
                sys.modules.pop(name, None)
