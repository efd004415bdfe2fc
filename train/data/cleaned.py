"""The report of a cleaning: how much came in, what was dropped and why, with examples for a person to read."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3
"""Examples that a report keeps a reason."""
WIDTH = 80
"""Characters of an example."""


@dataclass(kw_only=True)
class Dropped:
    """What was dropped for one reason."""

    documents: int = 0
    """Whole documents."""
    passages: int = 0
    """Paragraphs of documents."""
    characters: int = 0
    examples: list[str] = field(default_factory=list)
    """The first ones' first characters."""


@dataclass(kw_only=True)
class Report:
    """What came in and what was dropped, of a shard or of a corpus.

    `dataclasses.asdict` makes plain data of it for a file, `read_report` reads that back.
    """

    documents: int = 0
    characters: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """By reason."""

    def see(self, text: str) -> None:
        """Count a document that comes in."""
        self.documents += 1
        self.characters += len(text)

    def drop(self, reason: str, text: str, *, passage: bool = False) -> None:
        """Count a document, or a passage of one, that is dropped."""
        found = self.dropped.setdefault(reason, Dropped())
        found.passages += passage
        found.documents += not passage
        found.characters += len(text)
        if len(found.examples) < EXAMPLES:
            found.examples.append(" ".join(text[: 4 * WIDTH].split())[:WIDTH].rstrip())


def read_report(plain: Mapping[str, Any]) -> Report:
    """Return a report from its plain data."""
    dropped = {reason: Dropped(**found) for reason, found in plain["dropped"].items()}
    return Report(documents=plain["documents"], characters=plain["characters"], dropped=dropped)


def combine(reports: Iterable[Report]) -> Report:
    """Return the report of a corpus from those of its shards in order: the same however many processes made them."""
    total = Report()
    for report in reports:
        total.documents += report.documents
        total.characters += report.characters
        for reason, found in report.dropped.items():
            known = total.dropped.setdefault(reason, Dropped())
            known.documents += found.documents
            known.passages += found.passages
            known.characters += found.characters
            known.examples = (known.examples + found.examples)[:EXAMPLES]
    return total


def report_lines(report: Report) -> Iterator[str]:
    """Yield a report as a table with examples, the reason that took most first."""
    gone = sum(found.characters for found in report.dropped.values())
    yield f"{report.documents:,} documents, {report.characters:,} characters; {_share(gone, report)} dropped"
    for reason, found in sorted(report.dropped.items(), key=lambda item: (-item[1].characters, item[0])):
        units = {"documents": found.documents, "passages": found.passages}
        counts = ", ".join(f"{number:,} {unit}" for unit, number in units.items() if number)
        yield f"  {reason}: {counts}, {found.characters:,} characters ({_share(found.characters, report)})"
        for example in found.examples:
            yield f"    | {example}"


def _share(characters: int, report: Report) -> str:
    return f"{100 * characters / max(1, report.characters):.1f} %"
