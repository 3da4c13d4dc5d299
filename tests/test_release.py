"""What is released: a wheel and an sdist with the same code, and files that say who and how."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fxlean

ROOT = Path(__file__).parent.parent
SMOKE = """
import torch, fxlean
assert fxlean.__file__.startswith({folder!r}), fxlean.__file__
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
result = fxlean.prune(model, 0.5, torch.zeros(1, 3, 8, 8))
fxlean.save(fxlean.compact(model), "small.safetensors")
print(fxlean.__version__, result.kept)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_the_wheel_holds_the_package_and_works_by_itself(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"fxlean-{fxlean.__version__}-py3-none-any.whl"
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(unpacked)
    assert names == {str(path.relative_to(ROOT)) for path in (ROOT / "fxlean").rglob("*.py")}
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r})" + SMOKE.format(folder=str(unpacked))
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == fxlean.__version__


def test_the_sdist_holds_what_the_wheel_is_made_of_and_no_more(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CITATION.cff", "fxlean/nn.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".ci/"))]


def test_the_version_is_in_one_place():
    files = [*(ROOT / "fxlean").rglob("*.py"), *map(ROOT.joinpath, ("pyproject.toml", "README.md"))]
    found = [path.name for path in files if f'"{fxlean.__version__}"' in path.read_text()]
    assert found == ["version.py"]
