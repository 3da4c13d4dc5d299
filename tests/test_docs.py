"""Pages whose code runs: in one process with fxlean, and in environments that have none."""

import functools
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fxlean
from fxlean.channels.rules import table
from fxlean.nn import Selected
from tests.support.environments import new_environment, run
from tests.support.pages import PAGES, ROOT, blocks, given

DOCS = ROOT / "docs"
# Warnings that the code of a page causes in other packages.
OF_OTHERS = {
    "shipping.md": [("", DeprecationWarning), ("", FutureWarning)],  # of TorchScript, about itself
    "training.md": [(".*does not have many workers", UserWarning), (".*LeafSpec", FutureWarning)],
}


@pytest.fixture(scope="session")
def apart(tmp_path_factory):
    """Runs code in a new environment without fxlean."""
    return functools.partial(run, new_environment(tmp_path_factory.mktemp("environment")))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_on_the_pages_runs(page, apart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for registered in ("RULES", "RESIZES"):  # what a page registers is for that page
        monkeypatch.setattr(table, registered, dict(getattr(table, registered)))
    names = {}
    with warnings.catch_warnings():
        for message, category in OF_OTHERS.get(page.name, ()):
            warnings.filterwarnings("ignore", message, category)
        for block in blocks(page):
            if block.apart:
                apart(block.code, tmp_path)
            else:
                names |= given(page)
                exec(compile("\n" * block.line + block.code, page, "exec"), names)
                printed = capsys.readouterr().out
                assert block.output is None or printed.rstrip() == block.output.rstrip()


def test_code_runs_apart_only_without_fxlean(apart, tmp_path):
    with pytest.raises(AssertionError, match="No module named 'fxlean'"):
        apart("import fxlean", tmp_path)


def test_the_site_is_built_without_a_warning_and_has_every_page(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in DOCS.glob("*.md"):
        assert f": {page.name}\n" in (DOCS.parent / "mkdocs.yml").read_text()
    reference = (tmp_path / "reference/index.html").read_text()
    for name in set(fxlean.__all__) - {"rules", "__version__"}:
        assert f'id="fxlean.{name}"' in reference
    signatures = re.sub(r"<[^>]+>", "", reference)
    assert "rounds: int = 3," in signatures  # and not the name of a constant
    assert not re.findall(r"\w+: [\w\[\]]+ = [A-Z]{2,}", signatures)


@pytest.mark.parametrize("size", [(2, 5, 8, 8), (2, 5, 8), (2, 5)])
@pytest.mark.parametrize("reads", [[0, 3], None])
@pytest.mark.parametrize("places", [[1, 2, 4], None])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_selections_script_and_export_for_an_environment_without_fxlean(
    size, reads, places, apart, tmp_path
):
    torch.manual_seed(0)
    width, rank = 5 if reads is None else 2, len(size)
    layer = {2: nn.Linear(width, 3), 3: nn.Conv1d(width, 3, 3), 4: nn.Conv2d(width, 3, 3)}[rank]
    indices = [None if index is None else torch.tensor(index) for index in (reads, places)]
    model, data = nn.Sequential(Selected(layer, *indices, 6)).eval(), torch.randn(size)
    expected = model(data)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(data), expected)
    program = torch.export.export(model, (data,))
    assert torch.equal(program.module()(data), expected)
    if size == (2, 5, 8, 8):
        torch.save((data, expected), tmp_path / "expected.pt")
        scripted.save(tmp_path / "scripted")
        torch.export.save(program, tmp_path / "exported.pt2")
        apart(
            """
            import torch
            data, expected = torch.load("expected.pt")
            assert torch.equal(torch.jit.load("scripted")(data), expected)
            assert torch.equal(torch.export.load("exported.pt2").module()(data), expected)
            """,
            tmp_path,
        )
