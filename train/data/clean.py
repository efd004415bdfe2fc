"""Cleaning: filters that drop documents, by name.

Duplicates are `train.data.duplicates`, text that evaluation tests `train.data.contamination`, what went and why
`train.data.cleaned`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

from parallel.errors import InputError, one_of
from train.data.extra import optional
from train.data.languages import CODES, SCRIPTS, identify, script_share

Filter = Callable[[str], str | None]
"""A document's text -> why it is dropped, or None. Made of plain functions, so that processes can be handed it."""


class CleanOptions(Protocol):
    """What is left out of a corpus; `growmerge.schema_clean.Clean` says what each field means."""

    @property
    def exact_duplicates(self) -> bool: ...
    @property
    def repeated_paragraphs(self) -> int | None: ...
    @property
    def near_duplicates(self) -> float | None: ...
    @property
    def shingle(self) -> int: ...
    @property
    def permutations(self) -> int: ...
    @property
    def language(self) -> str | None: ...
    @property
    def min_confidence(self) -> float: ...
    @property
    def script(self) -> str | None: ...
    @property
    def min_script_share(self) -> float: ...
    @property
    def min_words(self) -> int | None: ...
    @property
    def max_words(self) -> int | None: ...
    @property
    def min_characters(self) -> int | None: ...
    @property
    def max_characters(self) -> int | None: ...
    @property
    def max_repeated_lines(self) -> float | None: ...
    @property
    def max_symbols(self) -> float | None: ...
    @property
    def min_alphabetic_words(self) -> float | None: ...
    @property
    def decontaminate(self) -> bool: ...
    @property
    def ngram(self) -> int: ...
    @property
    def evaluation(self) -> tuple[str, ...]: ...


def problems(options: CleanOptions) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) of each option that is wrong or needs a library that is not installed."""
    for key in ("near_duplicates", "min_confidence", "min_script_share", "max_repeated_lines", "min_alphabetic_words"):
        share = getattr(options, key)
        if share is not None and not 0 < share <= 1:
            yield key, f"{share:.12g} is out of range: allowed is above 0 and at most 1"
    for key, least in (
        ("repeated_paragraphs", 1),
        ("shingle", 1),
        ("permutations", 16),
        ("ngram", 1),
        ("min_words", 1),
        ("max_words", 1),
        ("min_characters", 1),
        ("max_characters", 1),
        ("max_symbols", 0),
    ):
        number = getattr(options, key)
        if number is not None and number < least:
            yield key, f"{number:.12g} is out of range: allowed is at least {least}"
    for unit in ("words", "characters"):
        most, fewest = getattr(options, f"max_{unit}"), getattr(options, f"min_{unit}")
        if most is not None and fewest is not None and most < fewest:
            yield f"max_{unit}", f"{most} is below min_{unit}, {fewest}: every document would be dropped"
    if options.language is not None and options.language not in CODES:
        yield "language", one_of("language", options.language, sorted(CODES))
    if options.script is not None and options.script not in SCRIPTS:
        yield "script", one_of("script", options.script, sorted(SCRIPTS))
    for key, library in (("language", "py3langid"), ("script", "regex"), ("near_duplicates", "rensa")):
        if getattr(options, key) is not None:
            try:
                optional(library)
            except InputError as error:
                yield key, str(error)


def build_filters(options: CleanOptions) -> dict[str, Filter]:
    """Return the filters that are asked for, by name, the cheap ones first; a document is dropped by the first.

    Raises:
        InputError: an option is wrong, or needs a library that is not installed.
    """
    for key, problem in problems(options):
        raise InputError(f"clean.{key}: {problem}")
    filters: dict[str, Filter] = {}
    if options.min_characters or options.max_characters:
        filters["characters"] = partial(_characters, least=options.min_characters, most=options.max_characters)
    if options.script is not None:
        filters["script"] = partial(_script, script=options.script, least=options.min_script_share)
    if options.min_words or options.max_words:
        filters["words"] = partial(_words, least=options.min_words, most=options.max_words)
    if options.max_repeated_lines is not None:
        filters["repeated_lines"] = partial(_repeated_lines, most=options.max_repeated_lines)
    if options.max_symbols is not None:
        filters["symbols"] = partial(_symbols, most=options.max_symbols)
    if options.min_alphabetic_words is not None:
        filters["alphabetic_words"] = partial(_alphabetic_words, least=options.min_alphabetic_words)
    if options.language is not None:
        filters["language"] = partial(_language, wanted=options.language, least=options.min_confidence)
    return filters


def reason_to_drop(text: str, filters: Mapping[str, Filter]) -> str | None:
    """Return the first filter's reason to drop a text, or None."""
    return next((reason for check in filters.values() if (reason := check(text)) is not None), None)


def _characters(text: str, *, least: int | None, most: int | None) -> str | None:
    return _size(len(text), "characters", least, most)


def _words(text: str, *, least: int | None, most: int | None) -> str | None:
    """Gopher: 50 to 100,000 words (arXiv 2112.11446, appendix A.1.1)."""
    return _size(len(text.split()), "words", least, most)


def _size(number: int, unit: str, least: int | None, most: int | None) -> str | None:
    if least is not None and number < least:
        return f"too few {unit}"
    return f"too many {unit}" if most is not None and number > most else None


def _repeated_lines(text: str, *, most: float) -> str | None:
    """Gopher: at most 0.3 of the lines are duplicates (arXiv 2112.11446, table A1); FineWeb2 keeps the rule, with
    thresholds by language (arXiv 2506.20920)."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return "repeated lines" if len(lines) - len(set(lines)) > most * len(lines) else None


def _symbols(text: str, *, most: float) -> str | None:
    """Gopher: at most 0.1 hash signs, or ellipses, a word (arXiv 2112.11446, appendix A.1.1)."""
    symbols = max(text.count("#"), text.count("…") + text.count("..."))
    return "symbols" if symbols and symbols > most * len(text.split()) else None


def _alphabetic_words(text: str, *, least: float) -> str | None:
    """Gopher: 0.8 of the words hold a letter (arXiv 2112.11446, appendix A.1.1)."""
    words = text.split()
    holding = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    return "few words with letters" if holding < least * len(words) else None


def _script(text: str, *, script: str, least: float) -> str | None:
    return "script" if script_share(text, script) < least else None


def _language(text: str, *, wanted: str, least: float) -> str | None:
    found, probability = identify(text)
    if CODES.get(found) != CODES[wanted]:
        return f"language {found}"
    return "language uncertain" if probability < least else None
