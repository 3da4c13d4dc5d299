"""Compilation: late, once, and announced."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from torch import nn
import fxlean
assert "numba" not in sys.modules, "importing fxlean imports numba"
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 1, 3))
fxlean.prune(model, 0.5, method=sys.argv[1], progress=True)
"""


@pytest.mark.parametrize("method", ["lean", "path"])
def test_the_first_call_says_that_it_compiles_and_later_ones_do_not(tmp_path, method):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for compiles in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, method],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("compiling for the first time" in done.stderr) == compiles
