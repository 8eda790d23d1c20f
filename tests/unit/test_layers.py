"""Imports go down only, and nothing in the package loads code or leans on hidden state. Read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import zo_ds

PACKAGE = Path(zo_ds.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "launch").rglob("*.py"))

FOUNDATIONS = {"errors", "files", "fetch", "config", "version", "tensor_files"}
TOWER = [
    "maths",
    "ops",
    "stores",
    "forward",
    "planning",
    "parallel",
    "journal",
    "engine",
    "trainer",
    "cli",
    "__main__",
    "launch",
]
"""From the bottom up: a layer may import those before it."""
BESIDE = {"data", "tasks", "models", "evaluation"}
BESIDE_MAY = FOUNDATIONS | BESIDE | {"maths", "forward", "parallel"}
DEEPSPEED = ("zo_ds/stores/zero3", "zo_ds/parallel/", "zo_ds/engine/")
TRANSFORMERS = ("zo_ds/models/",)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    """First component below the package: a folder, or a module of its own; '' for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "launch" else "" if parts[1] == "__init__" else parts[1]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.Module, module: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted names of all that is imported, inside functions too; relative imports made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*module[: len(module) - node.level], *filter(None, [node.module])] if node.level else [node.module]
            yield from (".".join([*map(str, base), alias.name]) for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Layers of the package that a file imports."""
    module = path.relative_to(ROOT).with_suffix("").parts
    dotted = [name.split(".") for name in imports_of(tree_of(path), module) if name.split(".")[0] == "zo_ds"]
    known = {layer_of(file) for file in FILES}
    return {parts[1] if len(parts) > 1 and parts[1] in known else "" for parts in dotted}


def allowed(layer: str) -> set[str]:
    if layer == "":
        return FOUNDATIONS | BESIDE | set(TOWER)  # names for type checkers; see test_public for what is loaded
    if layer in FOUNDATIONS:
        return FOUNDATIONS | ({"maths"} if layer == "config" else set())
    if layer in BESIDE:
        return BESIDE_MAY
    below = set(TOWER[: TOWER.index(layer) + 1]) | FOUNDATIONS
    return below | BESIDE | {""} if TOWER.index(layer) > TOWER.index("engine") else below


def test_every_part_has_a_place() -> None:
    assert {layer_of(path) for path in FILES} - {""} <= FOUNDATIONS | BESIDE | set(TOWER)
    assert {"maths", "stores", "forward", "parallel", "journal", "engine"} <= {layer_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    layer = layer_of(path)
    assert own_imports(path) <= allowed(layer), f"{name_of(path)} reaches out of '{layer}'"


def test_parts_beside_the_engine_have_an_order_too() -> None:
    graph: dict[str, set[str]] = {layer: set() for layer in BESIDE}
    for path in FILES:
        if layer_of(path) in BESIDE:
            graph[layer_of(path)] |= (own_imports(path) & BESIDE) - {layer_of(path)}
    while free := {layer for layer, needs in graph.items() if not needs}:
        graph = {layer: needs - free for layer, needs in graph.items() if layer not in free}
    assert graph == {}, "a cycle"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    top = {name.split(".")[0] for name in imports_of(tree_of(path))}
    if not name_of(path).startswith(DEEPSPEED):
        assert "deepspeed" not in top
    if not name_of(path).startswith(TRANSFORMERS):
        assert top.isdisjoint({"transformers", "peft"})


FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "random")
FORBIDDEN_NAMES = ("torch.load", "torch.save", "torch.manual_seed", "torch.seed", "numpy.random", "torch.Generator")


def offences(tree: ast.Module) -> list[str]:
    """Uses of pickles, of generator state and of remote code."""
    found = [n for n in imports_of(tree) if n.split(".")[0] in FORBIDDEN_IMPORTS or n.startswith(FORBIDDEN_NAMES)]
    names = {
        alias.asname or alias.name: alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    settings: list[tuple[ast.expr | str | None, ast.expr | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            dotted = f"{names.get(head, head)}.{rest}"
            seeds = node.attr in ("manual_seed", "manual_seed_all")
            found += [dotted] if seeds or dotted.startswith(FORBIDDEN_NAMES) else []
        elif isinstance(node, ast.keyword):
            settings.append((node.arg, node.value))
        elif isinstance(node, ast.Dict):
            settings += [(getattr(k, "value", None), v) for k, v in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.Subscript):
            settings.append((getattr(node.slice, "value", None), None))
    for key, value in settings:
        off = isinstance(value, ast.Constant) and value.value is False
        found += [str(key)] if key in ("trust_remote_code", "allow_pickle") and not off else []
    return found


EXCEPTIONS = {"zo_ds/models/import_bin.py": ["torch.load"]}
"""Behind `zo_ds import`, the explicit command for foreign .bin checkpoints."""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_pickles_no_generators_no_remote_code(path: Path) -> None:
    assert offences(tree_of(path)) == EXCEPTIONS.get(name_of(path), [])


def test_the_exception_is_the_restricted_unpickler() -> None:
    for name in EXCEPTIONS:
        calls = [node for node in ast.walk(tree_of(ROOT / name)) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
        assert len(loads) == 1
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in loads[0].keywords}
        assert settings["weights_only"] == "True"
        assert settings.keys() <= {"weights_only", "mmap", "map_location"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import torch\ntorch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "import numpy as np\nnp.random.rand()",
        "from numpy import random",
        "from numpy.random import rand",
        "import random",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=config.trust)",
        "f(**{'trust_remote_code': True})",
        "options['trust_remote_code'] = True",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_reader_sees_offences(source: str) -> None:
    assert offences(ast.parse(source)) != []


def test_the_reader_lets_ordinary_code_pass() -> None:
    source = "import torch\nfrom safetensors.torch import load_file\ntorch.empty(1)\njson.load(x)\n"
    source += "f(trust_remote_code=False)\ng(**{'trust_remote_code': False, **other})"
    assert offences(ast.parse(source)) == []


def test_the_reader_sees_imports_inside_functions_and_relative_ones() -> None:
    source = "def f():\n    from ..engine import x\nimport a.b\nfrom . import c"
    names = set(imports_of(ast.parse(source), ("zo_ds", "maths", "noise")))
    assert names == {"zo_ds.engine.x", "a.b", "zo_ds.maths.c"}


@pytest.mark.parametrize(
    ("layer", "may", "may_not"),
    [
        ("maths", {"errors"}, {"stores", "forward", "engine", "data", ""}),
        ("planning", {"maths", "forward", "errors"}, {"parallel", "engine", "models", ""}),
        ("ops", {"maths", "errors", "fetch"}, {"stores", "forward", "engine", ""}),
        ("stores", {"maths", "ops", "errors"}, {"forward", "parallel", "engine", "models", ""}),
        ("journal", {"stores", "parallel"}, {"engine", "tasks", ""}),
        ("engine", {"journal", "config"}, {"trainer", "evaluation", "data", "tasks", "models", "cli", ""}),
        ("trainer", {"engine", "models", "evaluation", ""}, {"cli", "launch"}),
        ("cli", {"trainer", "data"}, {"__main__", "launch"}),
        ("config", {"errors", "maths"}, {"stores", "data"}),
        ("errors", {"files"}, {"maths"}),
        ("tasks", {"maths", "data"}, {"stores", "engine", "trainer", "journal", ""}),
    ],
)
def test_the_rule_itself(layer: str, may: set[str], may_not: set[str]) -> None:
    assert may <= allowed(layer)
    assert allowed(layer).isdisjoint(may_not)
