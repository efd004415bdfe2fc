"""Tables of the models and what is known of them: scores, growth, acceptability, checks, answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from growmerge.report.study import Study
from growmerge.report.tables import NONE, Cell, Table, bits, estimate, least, number, percent, rows, short

BASELINES = {"unigram": "unigram", "ngram5": "5-gram", "xz": "xz, primed"}


def setups(results: Mapping[str, Any]) -> Table | None:
    """Parts of the study by languages and setups, then the baselines; the best model of each language in bold."""
    study = Study(results)
    languages = [study.source, *study.languages]
    scores, forgetting, roles = results["bits_per_byte"], results["forgetting"], study.roles
    stages = {stage: place for stage, place in study.members().items() if stage in scores}
    best = {language: least(scores[stage].get(language) for stage in stages) for language in languages}
    worst_lost = least(forgetting.get(stage) for stage in stages)
    parts = {"base": f"base ({study.name(study.source)})"}
    parts |= {code: f"trained on {study.name(code)}" for code in study.languages}
    parts |= {"joint": "trained on both" if len(study.languages) == 2 else "trained on all"}
    parts |= {method: f"merged: {method}" for method in study.methods}
    by_place = {place: stage for stage, place in stages.items()}
    found: list[list[Cell]] = []

    def one(estimated: Mapping[str, Any] | None, lowest: float | None) -> Cell:
        return bits(estimated, best=estimated is not None and estimated["value"] == lowest)

    n = len(study.setups)
    seed = scores.get(roles.get("seed"), {})
    if seed:
        found.append([Cell(text="seed"), *(bits(seed.get(c), span=n) for c in languages), Cell(text=NONE, span=n)])
    for part, label in parts.items():
        members = [by_place.get((setup, part)) for setup in study.setups]
        if any(members):
            cells = [one(scores.get(stage, {}).get(c), best[c]) for c in languages for stage in members]
            found.append([Cell(text=label), *cells, *(one(forgetting.get(stage), worst_lost) for stage in members)])
    models = len(found)
    found += [
        [Cell(text=label), *(bits(value, span=n) for value in values), Cell(text=NONE, span=n)]
        for label, values in _baselines(results, languages)
    ]
    if not found:
        return None
    return Table(
        name="setups",
        caption="Bits per byte on held-out text; less is better, the best model of a language in bold",
        groups=[("", 1), *((study.name(c), n) for c in languages), (f"{study.name(study.source)} forgotten", n)],
        columns=["model", *(setup for _ in range(len(languages) + 1) for setup in study.setups)],
        rows=found,
        breaks=frozenset({models}),
    )


def _baselines(results: Mapping[str, Any], languages: Sequence[str]) -> list[tuple[str, list[Any]]]:
    found = results["baselines_summary"]
    names = dict.fromkeys(name for language in languages for name in found.get(language, {}))
    return [(BASELINES.get(name, name), [found.get(c, {}).get(name) for c in languages]) for name in names]


def models(results: Mapping[str, Any]) -> Table | None:
    """Every model: what made it, its size and cost, and its scores with their intervals."""
    scores, forgetting = results["bits_per_byte"], results["forgetting"]
    languages = list(results["languages"])
    best = {c: least(s.get(c) for s in scores.values()) for c in languages}
    found: list[list[str | Cell]] = []
    for stage, model in results["models"].items():
        own = scores.get(stage, {})
        made = f"{model['verb']} {model['method']}" if model.get("method") else model["verb"] or NONE
        made = f"{made} ← {', '.join(model['parents'])}" if model["parents"] else made
        size = [number(model.get("parameters")), number(model.get("tokens"))]
        cost = [short(model.get("flops")), short(model.get("total_flops"))]
        values = [estimate(own.get(c), best=c in own and own[c]["value"] == best[c]) for c in languages]
        forgot = [estimate(forgetting.get(stage))] if forgetting else []
        found.append([stage, made, *size, *cost, *values, *forgot])
    for label, baselines in _baselines(results, languages):
        forgot = [Cell(text=NONE)] if forgetting else []
        found.append([label, "baseline", *[NONE] * 4, *(estimate(value) for value in baselines), *forgot])
    if not found:
        return None
    names = [results["languages"][c] for c in languages]
    lost = [f"{results['languages'].get(results['study']['source_language'], '')} forgotten"] if forgetting else []
    columns = ["model", "made by", "parameters", "tokens", "FLOPs", "FLOPs with ancestors", *names, *lost]
    cells = rows(found)
    known = [i for i in range(len(columns)) if any(row[i].text != NONE for row in cells)]
    return Table(
        name="models",
        caption="Every model" + (": bits per byte with intervals; less is better" if scores else ""),
        columns=[columns[i] for i in known],
        rows=[[row[i] for i in known] for row in cells],
        breaks=frozenset({len(results["models"])}),
        words=frozenset({0, 1}),
    )


def pairs(results: Mapping[str, Any]) -> Table | None:
    """Acceptability: how often a model prefers the sentence to its corrupted copy; a row a kind of corruption."""
    languages = list(results["languages"])
    accuracy = {stage: found for stage, found in results["accuracy"].items() if any(found.values())}
    kinds = {"swap": "two words swapped", "drop": "a word dropped, by length"}
    found: list[list[str | Cell]] = [
        [stage, label, *(percent(accuracy[stage].get(c, {}).get(kind)) for c in languages)]
        for kind, label in kinds.items()
        for stage in accuracy
    ]
    if not found:
        return None
    return Table(
        name="acceptability",
        caption="Acceptability pairs: sentences preferred to their corrupted copy, % [Wilson interval]; a tie is "
        "wrong. Chance is 50 for swaps, but a model without word order ties; drops have no fixed chance level",
        columns=["model", "corruption", *(results["languages"][c] for c in languages)],
        rows=rows(found),
        breaks=frozenset({len(accuracy)}),
        words=frozenset({0, 1}),
    )


def growth(results: Mapping[str, Any]) -> Table | None:
    """Growth: the held-out loss of the small and the grown model before its first step."""
    found = []
    for one in results.get("growth", []):
        losses = [number(one["loss_small"], ".7f"), number(one["loss_grown"], ".7f")]
        differences = [number(abs(one["difference"]), ".2e"), number(one.get("max_logit_difference"), ".2e")]
        how = [one["stage"], one["from"], one["method"], one.get("optimizer", "reset")]  # older runs knew reset alone
        found.append([*how, *losses, *differences])
    columns = ["grown", "from", "method", "optimizer", "loss, small", "loss, grown", "|difference|"]
    columns.append("largest logit difference")
    caption = "Growth keeps the function: held-out loss (nats a token) before the first step"
    table = Table(name="growth", caption=caption, columns=columns, rows=rows(found), words=frozenset(range(4)))
    return table if found else None


def checks(results: Mapping[str, Any]) -> Table | None:
    """The bounds that the run had to meet."""
    found: list[list[str | Cell]] = []
    for one in results.get("checks", []):
        language = results["languages"].get(one["language"], one["language"])
        bounds = [number(one["by"], ".3f"), estimate(one), "passed" if one["passed"] else "failed"]
        found.append([one["model"], language, one["baseline"], *bounds])
    columns = ["model", "language", "has to beat", "by at least", "beats it by", "result"]
    caption = "Checks (bits per byte)"
    table = Table(name="checks", caption=caption, columns=columns, rows=rows(found), words=frozenset({0, 1, 2, 5}))
    return table if found else None


def answers(results: Mapping[str, Any]) -> Table | None:
    """Every answer with its parts, and the difference as a signed number."""
    asked = results["questions"]
    if not asked:
        return None
    return Table(
        name="answers",
        caption="Answers over all languages (Q1) and for each part (Q1/swe); the difference is first minus second",
        columns=["question", "answer", "difference"],
        rows=rows([q["id"], q["sentence"], estimate(q)] for q in asked),
        breaks=frozenset(i for i, q in enumerate(asked) if "/" not in q["id"]),
        words=frozenset({0, 1}),
    )
