"""The layering that docs/architecture.md shows, and the pages that are made from the code."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fxlean

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fxlean"


def load_maker():
    spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs/make_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()
ORDER = MAKER.modules()
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imported(module, tree):
    """Dotted names of the modules of fxlean that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = module.split(".")[: -node.level]
            found = [*package, *(node.module or "").split(".")] if node.module else package
            below = [".".join([*found, alias.name]) for alias in node.names]
            names = [name for name in below if name in FILES]
            yield from names or [".".join(found)]


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(FILES)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("module", sorted(FILES))
def test_modules_import_only_from_above(module):
    tree = ast.parse(FILES[module].read_text())
    assert set(imported(module, tree)) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_star_imports_and_no_print(module):
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"


def test_what_is_imported_later_is_where_type_checkers_find_it():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {alias.name: node.module for node in checking.body for alias in node.names}
    assert found == fxlean._LATER


def test_a_fresh_import_has_all_public_names_and_imports_them_later():
    code = (
        "import sys, fxlean\n"
        "assert 'fxlean.pruning' not in sys.modules\n"
        "assert dir(fxlean) == fxlean.__all__\n"
        "assert all(getattr(fxlean, name) for name in fxlean.__all__)\n"
        "from fxlean.rules import pointwise\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="'prunes'"):
        _ = fxlean.prunes


def test_no_module_has_the_name_of_a_public_function():
    # One of the two would hide the other, depending on the order of imports.
    functions = {name for name in fxlean.__all__ if name.islower() and name != "rules"}
    assert functions.isdisjoint(module.rpartition(".")[2] for module in FILES)


def test_test_modules_do_not_import_from_each_other():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                assert node.module.startswith("tests.support."), path


@pytest.mark.parametrize("name", sorted(MAKER.PAGES))
def test_pages_made_from_the_code_are_up_to_date(name):
    assert (ROOT / "docs" / name).read_text() == MAKER.PAGES[name]()
