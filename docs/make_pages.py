"""Writes what the docs say of the code: `python docs/make_pages.py`.

That is all of docs/operators.md, the table of modules in docs/architecture.md, and the figures of
docs/how-it-works.md, which its own code draws.
"""

import ast
import os
import re
from collections import defaultdict
from pathlib import Path

from fxlean.channels.rules.table import RULES

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "fxlean"
# Ground floor first: a module imports only from those before it. A test holds that.
FLOORS = """
version
errors
pictures
nn
ranks
tracing: leaves snapshot sandbox arguments inputs functions hooks rehearsal witness tracer
masking
norms: suprema operator
channels: graph flow calls weights builder wiring site
channels.rules: movements positions weighted table
channels: walk
checkpoint: layout
calibration: moments contributions overlaps noise batches running shares elements statistics systems
calibration: least_squares side_by_side uses corrections norm_corrections samples reference
calibration: expansion repair_result repair_model distillation
selection: jit rows ranking liveness chains paths relevance methods channels
selection: takeover
costs
compaction: slots solve cut plan constants rules walk fold
compaction.exported: layers needs writer
compaction: verify attempts units trials
checkpoint: packing rebuild reading files
pruning: prunable lengths masks progress result channels latency targets options choice
pruning: networks prune_model schedules rounds shrinking
lightning
"""
BEGIN, END = "<!-- modules -->\n", "<!-- /modules -->\n"


def modules() -> list[str]:
    """Dotted names of all modules in `fxlean`, ground floor first."""
    found = []
    for line in FLOORS.split("\n"):
        package, _, names = line.partition(":")
        found += [f"{package}.{name}" for name in names.split()] if names else [package]
    return [name for name in found if name]


def summary(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.splitlines()[0].rstrip(".")


def architecture() -> str:
    """The page of the architecture, with the table of modules brought up to date."""
    page = (DOCS / "architecture.md").read_text()
    before, rest = page.split(BEGIN)
    rows = ["| module | what it holds |", "|---|---|"]
    package = ""
    for name in modules():
        above, _, _ = name.rpartition(".")
        if above != package and above:
            init = PACKAGE / above.replace(".", "/") / "__init__.py"
            rows.append(f"| **`{above}`** | **{summary(init)}** |")
        package = above
        rows.append(f"| `{name}` | {summary(PACKAGE / (name.replace('.', '/') + '.py'))} |")
    return before + BEGIN + "\n".join(rows) + "\n" + END + rest.split(END)[1]


def operators() -> str:
    """The supported operators, by the rule that they follow."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for op, rule in RULES.items():
        groups[(rule.__doc__ or "").splitlines()[0].rstrip(".")].append(f"`{op}`")
    rows = [f"| {first} | {', '.join(sorted(ops))} |" for first, ops in sorted(groups.items())]
    return "\n".join(
        [
            "# Supported operators",
            "",
            "The table of rules in `fxlean/channels/rules/table.py`, by `docs/make_pages.py`.",
            "Operators that torch tags as pointwise need no entry. Any other is *opaque*: treated",
            "as if it mixed everything, which is safe, and reported. `fxlean.register` adds rules.",
            "",
            "| rule | ATen operators |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def draw() -> None:
    """Run the code of the page with the example, which saves its figures beside it."""
    page = (DOCS / "how-it-works.md").read_text()
    os.chdir(DOCS / "images")
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)), {})


PAGES = {"architecture.md": architecture, "operators.md": operators}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    draw()
