"""Pages whose code runs: in one process with fxlean, and in others that cannot import it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import fxlean
from fxlean.nn import Selected

DOCS = Path(__file__).parent.parent / "docs"
APART = "<!-- without fxlean -->"
BLOCKED = """
import sys, warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)
warnings.simplefilter("ignore", FutureWarning)  # of TorchScript, about itself
sys.modules["fxlean"] = None  # whatever imports it fails
"""


def blocks(page):
    """The Python on a page, each block with whether it is for a process without fxlean."""
    apart, lines = False, None
    for line in (DOCS / page).read_text().splitlines():
        if line == "```python":
            lines = []
        elif line == "```" and lines is not None:
            yield apart, "\n".join(lines)
            apart, lines = False, None
        elif lines is not None:
            lines.append(line)
        else:
            apart = apart or line == APART


def run_apart(code, folder):
    command = [sys.executable, "-c", BLOCKED + textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_way_of_shipping(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for apart, code in blocks("shipping.md"):
        if apart:
            run_apart(code, tmp_path)
        else:
            exec(code, names)
    with pytest.raises(AssertionError, match="import of fxlean halted"):
        run_apart("import fxlean", tmp_path)


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*isinstance.*LeafSpec.*:FutureWarning"
)
@pytest.mark.parametrize("page", ["index.md", "training.md"])
def test_pages_whose_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for _, code in blocks(page):
        exec(code, names)


def test_the_site_is_built_without_a_warning_and_has_every_page(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in DOCS.glob("*.md"):
        assert f": {page.name}\n" in (DOCS.parent / "mkdocs.yml").read_text()
    reference = (tmp_path / "reference/index.html").read_text()
    for name in set(fxlean.__all__) - {"rules", "__version__"}:
        assert f'id="fxlean.{name}"' in reference


@pytest.mark.parametrize("size", [(2, 5, 8, 8), (2, 5, 8), (2, 5)])
@pytest.mark.parametrize("reads", [[0, 3], None])
@pytest.mark.parametrize("places", [[1, 2, 4], None])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_selections_script_and_export_for_a_process_without_fxlean(size, reads, places, tmp_path):
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
        run_apart(
            """
            import torch
            data, expected = torch.load("expected.pt")
            assert torch.equal(torch.jit.load("scripted")(data), expected)
            assert torch.equal(torch.export.load("exported.pt2").module()(data), expected)
            """,
            tmp_path,
        )
