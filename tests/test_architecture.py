"""The layering that docs/architecture.md shows."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
MODULES = sorted(path.stem for path in (ROOT / "fxlean").glob("*.py") if path.stem != "__init__")


def test_every_module_has_its_place():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_above(module):
    tree = ast.parse((ROOT / "fxlean" / f"{module}.py").read_text())
    above = set(ORDER[: ORDER.index(module)])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            assert set(names) <= above, f"{module} imports {names}"


@pytest.mark.parametrize("module", MODULES)
def test_no_star_imports_and_no_print(module):
    tree = ast.parse((ROOT / "fxlean" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"


def test_the_page_of_operators_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs/make_operators.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert (ROOT / "docs/operators.md").read_text() == make.page()
