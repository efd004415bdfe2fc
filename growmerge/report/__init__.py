"""The report of a run: `analyse` the raw results, `render` them as a page that opens offline and as markdown.

`files` are what lies beside the page: its tables as CSV, its figures as SVG and PNG.
"""

from growmerge.report.analysis import analyse
from growmerge.report.page import files, render

__all__ = ["analyse", "files", "render"]
