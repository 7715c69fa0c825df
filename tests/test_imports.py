"""Data flows one way: a module imports only what lies upstream of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# upstream first; a package stands for all of its modules, modules of one line may import each other
ORDER = [
    ["scaleweaver"],
    [
        "scaleweaver.kernels",
        "scaleweaver.schedule",
        "scaleweaver.images",
        "scaleweaver.metadata",
        "scaleweaver.precision",
        "scaleweaver.quantize",
        "scaleweaver.threads",
        "scaleweaver.download",
        "scaleweaver.controls",
    ],
    ["scaleweaver.contracts"],
    ["scaleweaver.masks", "scaleweaver.cache", "scaleweaver.guidance", "scaleweaver.sampling"],
    ["scaleweaver.tokenizers"],
    ["scaleweaver.reference", "scaleweaver.lora", "scaleweaver.cards", "scaleweaver.card_files"],
    ["scaleweaver.backbones"],
    ["scaleweaver.methods"],
    ["scaleweaver.adapters"],
    ["scaleweaver.styles"],
    ["scaleweaver.conditions", "scaleweaver.loop", "scaleweaver.control_images", "scaleweaver.request"],
    ["scaleweaver.control_maps"],
    ["scaleweaver.graph_buffers"],
    ["scaleweaver.graphs", "scaleweaver.evaluate.memory"],
    ["scaleweaver.work"],
    ["scaleweaver.dry_run"],
    ["scaleweaver.dry_loop"],
    ["scaleweaver.estimate"],
    ["scaleweaver.hub"],
    ["scaleweaver.checkpoints"],
    ["scaleweaver.pipeline"],
    ["scaleweaver.toybox"],
    ["scaleweaver.convert", "scaleweaver.evaluate"],
    ["scaleweaver.train"],
    ["scaleweaver.doctor"],
    [
        "scaleweaver.evaluate.examples",
        "scaleweaver.evaluate.record",
        "scaleweaver.evaluate.report",
        "scaleweaver.evaluate.fidelity",
        "scaleweaver.evaluate.quality",
        "scaleweaver.evaluate.plain",
        "scaleweaver.evaluate.speed",
    ],
    ["scaleweaver.demo", "scaleweaver.serve"],
    ["scaleweaver.commands"],
    ["scaleweaver.cli", "scaleweaver.demo.app"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    """Import name -> file, for all that the wheel holds."""
    found = {}
    beside = [(folder, ("scaleweaver",)) for folder in ("controls", "demo", "kernels")]
    for folder, prefix in [("scaleweaver", ()), *beside]:
        for file in (ROOT / folder).rglob("*.py"):
            parts = (*prefix, *file.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def runtime_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """The tree without what only type checkers read."""
    open_nodes: list[ast.AST] = [tree]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            open_nodes += node.orelse
        else:
            yield node
            open_nodes += ast.iter_child_nodes(node)


def imports(file: Path, known: dict[str, Path], *, at_load: bool = False) -> set[str]:
    """Our modules that a file imports: anywhere, or only while it is loaded itself."""
    tree = ast.parse(file.read_text())
    if at_load:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write the full name in place of a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            assert name.split(".")[0] not in ("kernels", "controls", "demo"), f"{file}: write scaleweaver.{name}"
            if name.split(".")[0] == "scaleweaver":
                found.add(name if name in known else name.rpartition(".")[0])
    return found


def rank(module: str) -> int:
    name = module
    while name not in RANK and "." in name:
        name = name.rpartition(".")[0]
    assert name in RANK and (name == module or name != "scaleweaver"), f"give {module} a place in ORDER"
    return RANK[name]


def test_modules_import_only_what_lies_upstream() -> None:
    known = modules()
    wrong = []
    for module, file in known.items():
        for target in imports(file, known):
            # the lazy public names of the package top, asked for by those that stand at the very end
            if target == "scaleweaver" and rank(module) < RANK["scaleweaver.toybox"]:
                if module != "scaleweaver":
                    wrong.append(f"{module} imports the package top; name the module")
            elif rank(target) > rank(module):
                wrong.append(f"{module} imports {target}, which lies downstream")
    assert not wrong, "\n".join(wrong)


def test_modules_load_in_an_order() -> None:
    known = modules()
    graph = {module: imports(file, known, at_load=True) - {module, "scaleweaver"} for module, file in known.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert set(order) >= set(known) - {"scaleweaver"}


def test_every_entry_of_the_table_exists() -> None:
    assert set(RANK) <= set(modules())
