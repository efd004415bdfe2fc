"""The report of a run: `analyse` the raw results, `render` them as a page that opens offline and as markdown."""

from growmerge.report.analysis import analyse
from growmerge.report.page import render

__all__ = ["analyse", "render"]
