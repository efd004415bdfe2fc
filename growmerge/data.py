"""`growmerge data prepare`: corpora to token files, with a bar or lines while it works and a table at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoint.files import disk_errors
from growmerge.config import Marks, load_file
from growmerge.events import EventLog
from growmerge.hub import place
from growmerge.schema_data import DataConfig
from growmerge.show import Bar
from parallel.errors import InputError
from train.data.prepare import Settings, corpus_key, finished, prepare, tokenizer_hashes
from train.data.shards import stamp_source

PASSES = {"scan": "reading", "done": "tokenising"}


def prepare_corpora(path: Path, *, workers: int | None, check: bool) -> None:
    """Make what is not up to date of a file's corpora, and print what all of them are.

    Raises:
        InputError: a wrong file, or what `train.data.prepare` raises.
    """
    config, marks = load_file(DataConfig, path)
    base = path.absolute().parent
    folder = base / config.folder
    with marks.within("tokenizer"):
        tokenizer = place(base, config.tokenizer, path, tokenizer=True)
    settings = Settings(
        folder=folder,
        tokenizer=tokenizer,
        base=base,
        seed=config.seed,
        workers=workers or config.workers,
    )
    made = _up_to_date(config, settings, marks, deep=check)
    if any(found is None for found in made.values()):
        from slurm.lease import Lease

        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with Lease(folder / "lease.json", f"growmerge data prepare {path}"), _Show(folder / "log.jsonl") as show:
            made = dict(prepare(config.corpora, settings, show.event))
    else:
        print(f"nothing to do: all {len(made)} corpora are up to date")
    Console(markup=False, highlight=False).print(_table(made))


def _up_to_date(
    config: DataConfig, settings: Settings, marks: Marks, *, deep: bool
) -> dict[str, dict[str, Any] | None]:
    """Return what is known of each corpus that is up to date, None for others.

    Raises:
        InputError: a glob that matches nothing, no tokenizer: with the line of the file.
    """
    found = {}
    with marks.within("tokenizer"):
        tokenizer_hashes(settings.tokenizer)
    for language, corpus in config.corpora.items():
        for number, source in enumerate(corpus.sources):
            with marks.within(f"corpora.{language}.sources.{number}"):
                stamp_source(source, settings.base)
        with marks.within(f"corpora.{language}"):
            key = corpus_key(corpus, settings)
        found[language] = finished(settings.folder, language, key, deep=deep)
        if deep and found[language] is None and finished(settings.folder, language, key) is not None:
            place = settings.folder / f"{language}.json"
            raise InputError(f"{place}: a file that it lists is damaged (checksum); delete it to have all made again")
    return found


def _table(made: Mapping[str, Mapping[str, Any] | None]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("language", "documents", "tokens", "bytes", "bytes/token", "held out", "dropped"):
        table.add_column(name, justify="left" if name in ("language", "dropped") else "right")
    for language, found in made.items():
        assert found is not None, f"{language} was not made"
        for number, (name, counts) in enumerate({language: found, **found["splits"]}.items()):
            table.add_row(
                f"  {name}" if number else name,
                f"{counts['documents']:,}",
                f"{counts['tokens']:,}",
                f"{counts['bytes']:,}",
                f"{counts['bytes'] / counts['tokens']:.2f}",
                "" if number else f"{found['heldout']['documents']:,}",
                "" if number else _dropped(found),
            )
    return table


def _dropped(found: Mapping[str, Any]) -> str:
    """Return what was dropped by reason, most first; passages are told from documents."""
    reasons = [
        (count, f"{reason} {count:,}" + (" passages" if what == "passages" else ""))
        for reason, counts in found["cleaned"]["dropped"].items()
        for what in ("documents", "passages")
        if (count := counts[what])
    ]
    return ", ".join(text for _, text in sorted(reasons, key=lambda item: -item[0]))


class _Show(Bar):
    """Shows the events of `train.data.prepare`; JSON lines always."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = EventLog(log)
        self._done = 0

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event in."""
        with disk_errors(Path("log.jsonl")):
            self._log.write(event)
        if event["event"] == "pass":
            self._done = event["done"]
            self.begin(f"{event['corpus']}: {PASSES[event['pass']]}", event["total"], self._done)
        elif event["event"] == "shard":
            self._done += event["size"]
            self.update(self._done)
        elif event["event"] == "done":
            self.say(f"{event['corpus']}: done")
