"""Tables of a reward model's report, as Markdown; the figures are from `evaluation`."""

import math
from collections.abc import Mapping
from typing import Any


def groups_table(groups: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Agreement with each annotator or origin; "" unless there are several.

    Args:
        groups: `GroupReport`s by annotator or origin, as `dataclasses.asdict` or JSON has them.
        name: what they are, for the head of the table.
    """
    if len(groups) < 2:
        return ""
    lines = [
        f"| {name} | held-out choices | accuracy, 95 % | held-out ratings | r |",
        "|---|---|---|---|---|",
    ]
    for group, report in groups.items():
        accuracy, r = report["accuracy"], report["pearson"]
        cells = [
            cell(group),
            str(report["choices"]),
            "" if accuracy is None else "{:.2f} [{:.2f}, {:.2f}]".format(*accuracy),
            str(report["ratings"]),
            "" if r is None or math.isnan(r) else f"{r:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return a text as a cell holds it."""
    return " ".join(text.replace("|", "\\|").split())
