"""Several ranks: the same masks, repairs and distilled weights on all of them."""

import os
import subprocess
import sys
from pathlib import Path

from fxlean.ranks import agreed

ROOT = Path(__file__).parent.parent


def test_without_a_process_group_a_choice_is_ones_own():
    choice = object()
    assert agreed(choice) is choice


def test_two_ranks_have_the_same_masks_and_sharded_models_are_refused():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/support/rank.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0: same",
        "rank 1: same",
    ]
