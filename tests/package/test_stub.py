"""``_C.pyi`` says what the compiled module has: the same names, and the same arguments."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import signadam_ext
from signadam_ext.core.native import compiled

STUB = Path(signadam_ext.__file__).with_name("_C.pyi")
BUILT_WITH_CUDA = compiled.build_info()["cuda"] is not None
#: Arguments without a name, as pybind11 shows them.
NAMELESS = re.compile(r"arg\d+|self")


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def is_there(name: str) -> bool:
    return BUILT_WITH_CUDA or "cuda" not in name


MODULE = {name: node for name, node in members(ast.parse(STUB.read_text()).body).items() if is_there(name)}


def public(what: Any) -> set[str]:
    return {name for name in vars(what) if not name.startswith("_")}


def test_names_of_the_module() -> None:
    assert public(compiled) == MODULE.keys()


CLASSES = [name for name, node in MODULE.items() if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("name", CLASSES)
def test_names_of_a_class(name: str) -> None:
    node = MODULE[name]
    assert isinstance(node, ast.ClassDef)
    stated = {member for member in members(node.body) if is_there(member) and not member.startswith("_")}
    assert public(getattr(compiled, name)) == stated


def arguments(node: ast.FunctionDef) -> list[str]:
    # Positional-only ones have no names in the module.
    return [each.arg for each in (*node.args.args, *node.args.kwonlyargs) if each.arg != "self"]


FUNCTIONS = {
    **{name: (getattr(compiled, name), node) for name, node in MODULE.items() if isinstance(node, ast.FunctionDef)},
    **{
        f"{owner}.{name}": (getattr(getattr(compiled, owner), name), method)
        for owner in CLASSES
        for name, method in members(MODULE[owner].body).items()  # type: ignore[attr-defined]
        if isinstance(method, ast.FunctionDef) and is_there(name) and not method.decorator_list
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments(name: str) -> None:
    function, node = FUNCTIONS[name]
    shown = re.match(r"\w+\((.*)\) -> ", function.__doc__)
    assert shown is not None, function.__doc__
    # Types have colons only in C++'s names.
    names = [each for each in re.findall(r"(\w+): ", shown[1]) if not NAMELESS.fullmatch(each)]
    assert names == arguments(node)


def test_constants_have_the_types_that_are_stated() -> None:
    kinds = {"tuple": tuple, "dict": dict, "int": int, "float": float}
    for name, node in MODULE.items():
        if isinstance(node, ast.AnnAssign):
            assert type(getattr(compiled, name)) is kinds[ast.unparse(node.annotation).partition("[")[0]], name
