"""Random networks by hand: `python -m tests.fuzz --minutes 60` prints what falls, and a summary.

A failure names its seed: `--seed` with that number begins there.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections import Counter

from tests.support.fuzzing import fuzz


def main() -> None:
    """Run for some minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    end, number = time.monotonic() + 60 * arguments.minutes, arguments.seed
    while time.monotonic() < end:
        try:
            fuzz(number, 20, outcomes)
        except Exception:  # whatever falls
            outcomes["FELL"] += 1
            print(f"seed {number}:")
            traceback.print_exc()
        number += 1
    print(f"{outcomes.total()} networks, seeds {arguments.seed} to {number - 1}: {dict(outcomes)}")


if __name__ == "__main__":
    main()
