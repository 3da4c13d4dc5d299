"""Prints docs/operators.md from the table of rules: `python docs/make_operators.py`."""

from collections import defaultdict

from fxlean.rules import RULES


def page() -> str:
    """The supported operators, by the rule that they follow."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for op, rule in RULES.items():
        summary = (rule.__doc__ or "").splitlines()[0].rstrip(".")
        groups[summary].append(f"`{op}`")
    rows = [f"| {summary} | {', '.join(sorted(ops))} |" for summary, ops in sorted(groups.items())]
    return "\n".join(
        [
            "# Supported operators",
            "",
            "The table of rules in `fxlean/rules.py`, as `docs/make_operators.py` prints it.",
            "Operators that torch tags as pointwise need no entry. Any other is *opaque*: treated",
            "as if it mixed everything, which is safe, and reported. `fxlean.register` adds rules.",
            "",
            "| rule | ATen operators |",
            "|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(page(), end="")
