"""`growmerge compare`: models side by side, with what differences are more than chance.

Each model stands against the first one, or against its namesake where places have models of the same names: two runs
of one pipeline are compared stage by stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from checkpoint.files import read_json
from growmerge.paired import Comparison, Verdict, caption, judged
from growmerge.tasks import EVALUATION
from growmerge.verdicts import headline, outcome, print_whole, written
from parallel.errors import InputError, one_of


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is compared of what is there; p is adjusted for that alone."""

    base: str | None = None
    """The model that all others stand against."""
    tasks: tuple[str, ...] = ()
    """Globs."""
    models: tuple[str, ...] = ()
    """Globs, of names with or without the place; what they stand against is always there."""
    language: str | None = None


def read_verdicts(places: Sequence[Path]) -> list[Verdict]:
    """Read verdicts: files, folders of `growmerge eval` and workdirs of `growmerge run`, with all of theirs.

    Models of one name have their place before it: `runA/1x-swe`.

    Raises:
        InputError: a place that holds none, or fewer than two in all.
    """
    found: dict[Path, tuple[Path, Any]] = {}
    for place in places:
        folder = place / EVALUATION if (place / EVALUATION).is_dir() else place
        files = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
        read = {path: read_json(path) for path in files}
        # Beside them may be comparisons and a report's results.
        verdicts = {path: about for path, about in read.items() if isinstance(about, dict) and "model" in about}
        if not verdicts:
            raise InputError(f"{place}: no verdict of growmerge eval or growmerge run is there")
        for path, about in verdicts.items():
            found.setdefault(path.resolve(), (path, about))
    if len(found) < 2:
        raise InputError(f"{', '.join(map(str, places))}: one model alone; a comparison is of two or more")
    stems = [path.stem for path, _ in found.values()]
    homes = {path.parent: _home(path.parent) for path, _ in found.values()}
    short = [home.resolve().name for home in homes.values()]
    return [
        Verdict(
            name=path.stem if stems.count(path.stem) == 1 else f"{_label(homes[path.parent], short)}/{path.stem}",
            folder=path.parent,
            about=about,
        )
        for path, about in found.values()
    ]


def _home(folder: Path) -> Path:
    """Return what a user calls a folder of verdicts: of a workdir's, the workdir."""
    return folder.parent if folder.resolve().name == EVALUATION else folder


def _label(home: Path, short: Sequence[str]) -> str:
    name = home.resolve().name
    return name if short.count(name) == 1 else str(home)


def compare(places: Sequence[Path], asked: Asked | None = None) -> dict[str, Any]:
    """Return every model's numbers, and its difference to the one that it stands against, as plain JSON.

    {"base": name or None, "tasks": {task: {"unit", "models": {name: {"value", "low", "high", "against", "difference":
    {value, low, high}, "p", "adjusted", "outcome"}}}}}, as `judged`. The base is None where each model stands against
    the namesake in the first place. The value of an accuracy is the mean of its phenomena, its difference that over all
    pairs. A model that was not asked a task, or over other data, has no difference there and "why".

    Raises:
        InputError: as `read_verdicts`; a base, task, model or language that none of them has.
    """
    asked = asked or Asked()
    verdicts = read_verdicts(places)
    base = _base(verdicts, asked.base)
    against = _namesakes(verdicts) if base is None else {one: base for one in verdicts if one is not base}
    verdicts = _chosen(verdicts, against, asked.models)
    found: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    comparisons: list[Comparison] = []
    for task, called in _tasks(verdicts, asked).items():
        models: dict[str, dict[str, Any]] = {}
        for verdict in verdicts:
            shown = headline(verdict.tasks.get(task, {}))
            entry = models[verdict.name] = dict(shown[1]) if shown and shown[0] == called else {}
            other = against.get(verdict)
            if other is not None:
                entry["against"] = other.name
                entries.append(entry)
                comparisons.append(Comparison(task=task, model=verdict, against=other))
            elif not entry:
                entry["why"] = f"{verdict.name} was not asked"
        found[task] = {"unit": called, "models": models}
    for entry, result in zip(entries, judged(comparisons), strict=True):
        entry |= result
    return {"base": base.name if base else None, "tasks": found}


def _base(verdicts: Sequence[Verdict], name: str | None) -> Verdict | None:
    """Return what all models stand against: the one that is named, else the first; None if there are namesakes."""
    by_name = {verdict.name: verdict for verdict in verdicts}
    if name is None:
        return None if _namesakes(verdicts) else verdicts[0]
    if name not in by_name:
        raise InputError(one_of("model", name, by_name))
    return by_name[name]


def _namesakes(verdicts: Sequence[Verdict]) -> dict[Verdict, Verdict]:
    """Return the first of its name for each model that another one has the name of."""
    first: dict[str, Verdict] = {}
    for verdict in verdicts:
        first.setdefault(_stem(verdict), verdict)
    return {verdict: first[_stem(verdict)] for verdict in verdicts if first[_stem(verdict)] is not verdict}


def _stem(verdict: Verdict) -> str:
    return verdict.name.rpartition("/")[2]


def _chosen(verdicts: Sequence[Verdict], against: Mapping[Verdict, Verdict], globs: Sequence[str]) -> list[Verdict]:
    """Return the models that are asked for and what they stand against, namesakes side by side."""
    names = {one: (one.name, _stem(one)) for one in verdicts}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for both in names.values() for name in both):
            raise InputError(one_of("model", glob, (one.name for one in verdicts)))
    asked = [
        one for one in verdicts if not globs or any(fnmatchcase(name, glob) for name in names[one] for glob in globs)
    ]
    bases = {against.get(one) for one in asked}
    kept = [one for one in verdicts if one in asked or one in bases]
    return sorted(kept, key=lambda one: kept.index(against.get(one, one)))


def _tasks(verdicts: Iterable[Verdict], asked: Asked) -> dict[str, str]:
    """Return the tasks that are asked for, each with what its number is called."""
    known: dict[str, tuple[str, str]] = {}
    for verdict in verdicts:
        for name, about in verdict.tasks.items():
            if shown := headline(about):
                known.setdefault(name, (shown[0], about.get("language", "")))
    languages = dict.fromkeys(language for _, language in known.values() if language)
    if asked.language is not None and asked.language not in languages:
        raise InputError(one_of("language", asked.language, languages))
    known = {name: about for name, about in known.items() if asked.language in (None, about[1])}
    for pattern in asked.tasks:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(one_of("task", pattern, known))
    kept = [name for name in known if not asked.tasks or any(fnmatchcase(name, one) for one in asked.tasks)]
    return {name: known[name][0] for name in kept}


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print a row for each task and model."""
    table = Table(box=box.SIMPLE_HEAD)
    numbers = ("value", "difference", "p, adjusted")
    for column in ("task", "model", "value", "against", "difference", "p, adjusted", ""):
        table.add_column(column, no_wrap=True, justify="right" if column in numbers else "left")
    for task, about in found["tasks"].items():
        for name, entry in about["models"].items():
            table.add_row(f"{task} ({about['unit']})", name, *_cells(about["unit"], entry))
        table.add_section()
    print_whole(table)
    print(caption([one for about in found["tasks"].values() for one in about["models"].values()]))


def _cells(unit: str, entry: Mapping[str, Any]) -> Iterator[Any]:
    yield written(unit, entry) if "value" in entry else "–"
    yield entry.get("against", "")
    yield written(unit, entry["difference"], sign=True) if "difference" in entry else ""
    yield f"{entry['adjusted']:.2g}" if "adjusted" in entry else ""
    yield outcome(entry)
