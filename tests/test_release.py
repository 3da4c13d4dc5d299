"""What is released: a wheel and an sdist with the same code, and files that say who and how."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fxlean
from tests.support.environments import new_environment, run

ROOT = Path(__file__).parent.parent
SMOKE = """
import torch, fxlean
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
dense = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
fxlean.prune(model, 0.5, torch.zeros(1, 3, 8, 8), granularity="channel")
small = fxlean.compact(model.eval(), torch.zeros(1, 3, 8, 8))
fxlean.save(small, "small.safetensors")
images = torch.randn(2, 3, 9, 9)
assert torch.equal(fxlean.load(dense, "small.safetensors").eval()(images), small(images))
print(fxlean.__version__, fxlean.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_what_is_built_installs_and_works_in_a_new_environment(pattern, built, tmp_path):
    (file,) = built.glob(pattern)
    python = new_environment(tmp_path / "environment")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    version, place = run(python, SMOKE, tmp_path).split()
    assert version == fxlean.__version__
    assert Path(place).is_relative_to(tmp_path / "environment")


def test_the_wheel_holds_the_package_and_no_more(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"fxlean-{fxlean.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.endswith(".py")}
    assert names == {str(path.relative_to(ROOT)) for path in (ROOT / "fxlean").rglob("*.py")}


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
