"""A report as files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.files import write_bytes
from growmerge.report import files, render

BESIDE = "report"
"""Folder of a report's tables and figures."""


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write a report, and beside it its numbers, tables and figures; return the page's path."""
    html, markdown = render(results)
    content = {
        "report.html": html.encode(),
        "report.md": markdown.encode(),
        "results.json": (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode(),
        **{f"{BESIDE}/{name}": data for name, data in files(results).items()},
    }
    for name, data in content.items():
        write_bytes(folder / name, data)
    return folder / "report.html"
