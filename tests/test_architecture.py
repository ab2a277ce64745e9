"""The shape of the code: imports point one way, classes are abstract or final, axes are plain frozen values."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import miras
from miras.registry import Axis
from miras.state import BatchState

ROOT = Path(miras.__file__).parent
# A module may import from its own group and from those before it.
ORDER = (
    ("errors",),
    ("products",),
    ("decay",),
    ("weights",),
    ("gates",),
    ("inputs",),
    ("registry",),
    ("memory", "bias", "retention", "algorithm"),
    ("state",),
    ("mixer",),
    ("rule",),
    ("layout",),
    ("attention",),
    ("recurrence",),
    ("engines",),
    ("variants",),
    ("pointwise",),
    ("sources",),
    ("layer",),
    ("storage",),
    ("model",),
    ("hf",),
    ("data",),
    ("process",),
    ("train",),
    ("evaluate",),
    ("report",),
    ("inside",),
    ("lab",),
    ("demo",),
    ("bench",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)
PLACE = {name: place for place, group in enumerate(ORDER) for name in group}
CORE = ORDER[: PLACE["variants"] + 1]
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def package_of(path):
    """The entry of `ORDER` that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """The parts of miras that a file imports, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            if node.module == "miras":
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif node.module and node.module.startswith("miras."):
                yield node.module.split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "miras":
                    yield from ((name, node.lineno) for name in FACE)
                elif alias.name.startswith("miras."):
                    yield alias.name.split(".")[1], node.lineno


# `import miras` imports all of these.
FACE = sorted({name for name, _ in imported(ROOT / "__init__.py") if name in PLACE})


def by_path(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_imports_point_downward(path):
    own = package_of(path)
    assert own in PLACE, f"{path.name}: give it a place in ORDER and in the design"
    for name, line in imported(path):
        allowed = name not in PLACE or PLACE[name] < PLACE[own] or name == own
        assert allowed, f"{by_path(path)}:{line}: {own} may not import {name}, which stands at or after it"


def test_the_four_axes_do_not_know_each_other():
    axes = set(ORDER[PLACE["memory"]])
    for path in FILES:
        if package_of(path) in axes:
            assert not {name for name, _ in imported(path)} & (axes - {package_of(path)}), by_path(path)


@pytest.mark.parametrize("path", [p for p in FILES if any(package_of(p) in group for group in CORE)], ids=by_path)
def test_the_core_imports_only_at_the_top_of_a_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            inner = [n.lineno for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{by_path(path)}:{inner}"


def test_a_layer_starts_without_the_compiler():
    code = "import sys, miras.layer; sys.exit('torch._dynamo' in sys.modules)"  # which takes seconds to import
    subprocess.run([sys.executable, "-c", code], check=True)


# -- classes ----------------------------------------------------------------------------------------------------------


def classes():
    """The classes of the core that are parts or states, by introspection of every module."""
    found = {}
    for module in pkgutil.walk_packages([str(ROOT)], "miras."):
        if any(module.name.split(".")[1] in group for group in CORE):
            for cls in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(cls) and cls.__module__.startswith("miras.") and issubclass(cls, Axis | BatchState):
                    found[f"{cls.__module__}.{cls.__name__}"] = cls
    return list(found.values())


CLASSES = classes()
FINAL = [cls for cls in CLASSES if "__dataclass_fields__" in vars(cls) and cls is not BatchState]
by_name = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: f"{c.__module__}.{c.__name__}")


def concrete(cls):
    """Names of the methods and properties with a body that a class defines itself."""
    return {
        name
        for name, value in vars(cls).items()
        if isinstance(value, property | staticmethod | classmethod) or inspect.isfunction(value)
        if not getattr(value, "__isabstractmethod__", False) and not name.startswith("__")
    }


def test_the_walk_finds_the_parts():
    names = {cls.__name__ for cls in FINAL}
    assert names >= {"MLP", "Huber", "KL", "Momentum", "Rule", "Attention", "State", "CacheState"}


@by_name
def test_no_class_derives_from_a_final_one(cls):
    assert not [base.__name__ for base in cls.__mro__[1:] if base in FINAL]


@by_name
def test_no_method_with_a_body_is_overridden(cls):
    for base in cls.__mro__[1:]:
        if base in CLASSES:
            again = concrete(base) & set(vars(cls)) - {"gates"}
            assert not again, f"{cls.__name__} overrides {base.__name__}.{again}"


@pytest.mark.parametrize("cls", FINAL, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_final_classes_are_frozen_dataclasses_without_abstract_methods(cls):
    assert cls.__dataclass_params__.frozen and not inspect.isabstract(cls)
    assert inspect.getdoc(cls), "the first line of the docstring is the formula that people see"
    if issubclass(cls, Axis):
        assert cls.members[cls.__name__] is cls


@pytest.mark.parametrize("cls", [c for c in FINAL if issubclass(c, Axis)], ids=lambda c: f"{c.axis}.{c.__name__}")
def test_every_field_of_a_part_has_a_default_but_the_axes_of_a_rule(cls):
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    assert needed == (["memory", "bias", "retention", "algorithm"] if cls.__name__ == "Rule" else [])
