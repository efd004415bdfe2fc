"""The report's tables, as text: the page and the markdown show the same cells."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growmerge.report.study import Study

NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    best: bool = False
    span: int = 1
    """Columns that the cell takes."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under a header; the first cell of a row is its header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    groups: Sequence[tuple[str, int]] = ()
    """A line above the header: a text and the columns that it takes."""
    breaks: frozenset[int] = frozenset()
    """Rows that begin a new part of the table."""
    words: frozenset[int] = frozenset({0})
    """Columns that hold words; the others hold numbers."""

    @property
    def starts(self) -> set[int]:
        """Columns that begin a group."""
        return {sum(span for _, span in self.groups[:i]) for i in range(1, len(self.groups))}


def bits(found: Mapping[str, Any] | None) -> str:
    return NONE if found is None else f"{found['value']:z.3f}"


def with_interval(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Return `2.314 [2.290, 2.338]`, or the value alone where it has no interval."""
    if found is None:
        return NONE
    if found["low"] is None:
        return f"{found['value']:z.{digits}f}"
    return f"{found['value']:z.{digits}f} [{found['low']:z.{digits}f}, {found['high']:z.{digits}f}]"


def count(number: float | None) -> str:
    return NONE if number is None else f"{number:,.0f}"


def si(number: float | None) -> str:
    """Return a large number in short: `1.2e+15` as `1.20 P`."""
    if number is None:
        return NONE
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number:.0f}"


def _rows(rows: Iterable[Iterable[str]]) -> list[list[Cell]]:
    return [[Cell(text=text) for text in row] for row in rows]


BASELINES = {"unigram": "unigram", "ngram5": "5-gram", "xz": "xz, primed"}


def setups(results: Mapping[str, Any]) -> Table:
    """Parts of the study by languages and setups, then the baselines; the best model of each language in bold."""
    study = Study(results)
    languages = [study.source, *study.languages]
    scores, forgetting, roles = results["bits_per_byte"], results["forgetting"], study.roles
    stages = {stage: place for stage, place in study.members().items() if stage in scores}
    best = {
        language: min((found[language]["value"] for s in stages if language in (found := scores[s])), default=None)
        for language in languages
    }
    worst_lost = min((forgetting[stage]["value"] for stage in stages if stage in forgetting), default=None)
    parts = {"base": f"base ({study.name(study.source)})"}
    parts |= {code: f"trained on {study.name(code)}" for code in study.languages}
    parts |= {"joint": "trained on both" if len(study.languages) == 2 else "trained on all"}
    parts |= {method: f"merged: {method}" for method in study.methods}
    by_place = {place: stage for stage, place in stages.items()}
    rows: list[list[Cell]] = []

    def one(found: Mapping[str, Any] | None, least: float | None) -> Cell:
        return Cell(text=bits(found), best=found is not None and found["value"] == least)

    n = len(study.setups)
    seed = scores.get(roles.get("seed"), {})
    if seed:
        rows.append(
            [Cell(text="seed"), *(Cell(text=bits(seed.get(c)), span=n) for c in languages), Cell(text=NONE, span=n)]
        )
    for part, label in parts.items():
        members = [by_place.get((setup, part)) for setup in study.setups]
        if any(members):
            cells = [one(scores.get(stage, {}).get(c), best[c]) for c in languages for stage in members]
            rows.append([Cell(text=label), *cells, *(one(forgetting.get(stage), worst_lost) for stage in members)])
    models = len(rows)
    rows += [
        [Cell(text=label), *(Cell(text=bits(found), span=n) for found in values), Cell(text=NONE, span=n)]
        for label, values in _baselines(results, languages)
    ]
    return Table(
        caption="Bits per byte on held-out text; less is better, the best model of a language in bold",
        groups=[("", 1), *((study.name(c), n) for c in languages), (f"{study.name(study.source)} forgotten", n)],
        columns=["model", *(setup for _ in range(len(languages) + 1) for setup in study.setups)],
        rows=rows,
        breaks=frozenset({models}),
    )


def _baselines(results: Mapping[str, Any], languages: Sequence[str]) -> list[tuple[str, list[Any]]]:
    found = results["baselines_summary"]
    names = dict.fromkeys(name for language in languages for name in found.get(language, {}))
    return [(BASELINES.get(name, name), [found.get(c, {}).get(name) for c in languages]) for name in names]


def models(results: Mapping[str, Any]) -> Table:
    """Every model: what made it, its size and cost, and its scores with their intervals."""
    scores, forgetting = results["bits_per_byte"], results["forgetting"]
    languages = list(results["languages"])
    best = {c: min((s[c]["value"] for s in scores.values() if c in s), default=None) for c in languages}
    rows: list[list[Cell]] = []
    for stage, model in results["models"].items():
        found = scores.get(stage, {})
        made = f"{model['verb']} {model['method']}" if model.get("method") else model["verb"]
        cells = [stage, f"{made} ← {', '.join(model['parents'])}" if model["parents"] else made]
        cells += [
            count(model["parameters"]),
            count(model.get("tokens")),
            si(model.get("flops")),
            si(model.get("total_flops")),
        ]
        numbers = [
            Cell(text=with_interval(found.get(c)), best=c in found and found[c]["value"] == best[c]) for c in languages
        ]
        forgot = [Cell(text=with_interval(forgetting.get(stage)))] if forgetting else []
        rows.append([*(Cell(text=text) for text in cells), *numbers, *forgot])
    rows += [
        [
            Cell(text=label),
            Cell(text="baseline"),
            *[Cell(text=NONE)] * 4,
            *(Cell(text=with_interval(v)) for v in values),
        ]
        + ([Cell(text=NONE)] if forgetting else [])
        for label, values in _baselines(results, languages)
    ]
    names = [results["languages"][c] for c in languages]
    lost = [f"{results['languages'].get(results['study']['source_language'], '')} forgotten"] if forgetting else []
    return Table(
        caption="Every model: bits per byte with intervals; less is better",
        columns=["model", "made by", "parameters", "tokens", "FLOPs", "FLOPs with ancestors", *names, *lost],
        rows=rows,
        breaks=frozenset({len(results["models"])}),
        words=frozenset({0, 1}),
    )


def pairs(results: Mapping[str, Any]) -> Table | None:
    """Acceptability: how often a model prefers the sentence to its corrupted copy; a row a kind of corruption."""
    languages = list(results["languages"])
    accuracy = results["accuracy"]
    kinds = {"swap": "two words swapped", "drop": "a word dropped, by length"}
    rows = [
        [stage, label, *(_percent(accuracy[stage].get(c, {}).get(kind)) for c in languages)]
        for kind, label in kinds.items()
        for stage in accuracy
    ]
    if not rows:
        return None
    return Table(
        caption="Acceptability pairs: sentences preferred to their corrupted copy, % [Wilson interval]; a tie is "
        "wrong. Chance is 50 for swaps, but a model without word order ties; drops have no fixed chance level",
        columns=["model", "corruption", *(results["languages"][c] for c in languages)],
        rows=_rows(rows),
        breaks=frozenset({len(accuracy)}),
        words=frozenset({0, 1}),
    )


def _percent(found: Mapping[str, Any] | None) -> str:
    return NONE if found is None else with_interval({key: 100 * value for key, value in found.items()}, 1)


def growth(results: Mapping[str, Any]) -> Table | None:
    """Growth: the held-out loss of the small and the grown model before its first step."""
    rows = []
    for one in results.get("growth", []):
        losses = [f"{one['loss_small']:.7f}", f"{one['loss_grown']:.7f}", f"{abs(one['difference']):.2e}"]
        logits = one.get("max_logit_difference")
        how = [one["stage"], one["from"], one["method"], one.get("optimizer", "reset")]  # older runs knew reset alone
        rows.append([*how, *losses, NONE if logits is None else f"{logits:.2e}"])
    columns = ["grown", "from", "method", "optimizer", "loss, small", "loss, grown", "|difference|"]
    columns.append("largest logit difference")
    caption = "Growth keeps the function: held-out loss (nats a token) before the first step"
    return Table(caption=caption, columns=columns, rows=_rows(rows), words=frozenset(range(4))) if rows else None


def corpora(results: Mapping[str, Any]) -> list[Table]:
    """The text: how much of it, and where each part comes from."""
    sizes, origins = [], []
    for code, corpus in results.get("corpora", {}).items():
        name = results["languages"].get(code, code)
        dropped = ", ".join(f"{reason} {count(n)}" for reason, n in corpus.get("dropped", {}).items()) or NONE
        rate = results.get("tokenizer", {}).get("bytes_per_token", {}).get(code)
        numbers = [
            count(corpus.get(key))
            for key in ("documents", "bytes", "tokens", "heldout_documents", "heldout_bytes", "parallel_documents")
        ]
        sizes.append([name, *numbers, NONE if rate is None else f"{rate:.2f}", dropped])
        for source in corpus["sources"]:
            place = source.get("package") or NONE
            facts = [source.get(key) or NONE for key in ("edition", "rights_holder", "licence")]
            origins.append([name, *facts, place, source.get("files") or NONE, (source.get("sha256") or NONE)[:12]])
    if not sizes:
        return []
    columns = ["language", "documents", "bytes", "tokens", "held-out documents", "held-out bytes"]
    columns += ["of them parallel", "bytes a token"]
    where = ["language", "edition", "rights holder", "licence", "package", "files", "sha256"]
    return [
        Table(caption="Text: its size", columns=[*columns, "left out"], rows=_rows(sizes), words=frozenset({0, 8})),
        Table(caption="Text: where it comes from", columns=where, rows=_rows(origins), words=frozenset(range(7))),
    ]


def checks(results: Mapping[str, Any]) -> Table | None:
    """The bounds that the run had to meet."""
    rows = []
    for one in results.get("checks", []):
        language = results["languages"].get(one["language"], one["language"])
        bounds = [f"{one['by']:.3f}", with_interval(one), "passed" if one["passed"] else "failed"]
        rows.append([one["model"], language, one["baseline"], *bounds])
    columns = ["model", "language", "has to beat", "by at least", "beats it by", "result"]
    return (
        Table(caption="Checks (bits per byte)", columns=columns, rows=_rows(rows), words=frozenset({0, 1, 2, 5}))
        if rows
        else None
    )


def answers(results: Mapping[str, Any]) -> Table | None:
    """Every answer with its parts, and the difference as a signed number."""
    asked = results["questions"]
    return (
        Table(
            caption="Answers over all languages (Q1) and for each part (Q1/swe); the difference is first minus second",
            columns=["", "answer", "difference"],
            rows=_rows([q["id"], q["sentence"], with_interval(q) if q["value"] is not None else NONE] for q in asked),
            breaks=frozenset(i for i, q in enumerate(asked) if "/" not in q["id"]),
            words=frozenset({0, 1}),
        )
        if asked
        else None
    )


def samples(results: Mapping[str, Any]) -> Table | None:
    """What models write after a prompt."""
    names = results["languages"]
    rows = [
        [s["stage"], names.get(s["language"], s["language"]), s["prompt"], s["text"]]
        for s in results.get("samples", [])
    ]
    columns = ["model", "language", "prompt", "text"]
    return (
        Table(caption="Text written by the models", columns=columns, rows=_rows(rows), words=frozenset(range(4)))
        if rows
        else None
    )


def stages(results: Mapping[str, Any]) -> Table:
    """What was run: a row a stage, with the seconds it took."""
    took = results.get("timings", {}).get("stages", {})
    rows = [
        [s["name"], s["verb"], ", ".join(s["inputs"]) or NONE, f"{took[s['name']]:.1f}" if s["name"] in took else NONE]
        for s in results["graph"]
    ]
    return Table(
        caption="Stages",
        columns=["stage", "verb", "reads from", "seconds"],
        rows=_rows(rows),
        words=frozenset({0, 1, 2}),
    )


def versions(results: Mapping[str, Any]) -> Table | None:
    rows = [[name, str(version)] for name, version in results.get("versions", {}).items()]
    return (
        Table(caption="Versions", columns=["software", "version"], rows=_rows(rows), words=frozenset({0, 1}))
        if rows
        else None
    )
