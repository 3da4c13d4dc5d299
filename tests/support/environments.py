"""New environments that have all that is installed here, but fxlean."""

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path


def new_environment(folder):
    """The interpreter of a new environment, which also searches the packages of this one."""
    venv.create(folder, symlinks=True)
    new = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # The folder here is only searched: how it points to an editable fxlean is not followed.
    Path(new, "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def run(python, code, folder):
    """What code prints that an interpreter runs in a folder, warnings being errors."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", STRICT + textwrap.dedent(code)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


STRICT = """
import warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)
warnings.simplefilter("ignore", FutureWarning)  # of TorchScript, about itself
"""
