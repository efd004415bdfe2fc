"""Merges of subsets of models by what they reach on each language, for a heat map."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml


def of_pipeline(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the merges of a study: which languages' models each is of, by bits per byte on every language.

    Args:
        raw: as `growmerge.results.gather` has it: `study`, `models`, `scores`, `languages`.
    """
    study = raw["study"]
    places = {
        stage: (setup, language) for setup, stages in study["adapted"].items() for language, stage in stages.items()
    }
    columns = [*study["languages"], study["source_language"]]
    rows = []
    for name, model in raw["models"].items():
        parts = [places[parent] for parent in model["parents"] if parent in places]
        if model["verb"] != "merge" or not parts or name not in raw["scores"]:
            continue
        label = " + ".join(raw["languages"].get(language, language) for _, language in parts)
        setups = "/".join(dict.fromkeys(setup for setup, _ in parts))
        documents = raw["scores"][name]
        values = [_bits_per_byte(documents[language]) if documents.get(language) else None for language in columns]
        rows.append({"model": name, "label": label, "group": f"{model['method']}, {setups}", "values": values})
    names = [raw["languages"].get(language, language) for language in columns]
    return _maps("bits per byte on held-out text", "bits per byte", True, names, rows)


def of_verdicts(verdicts: Mapping[str, Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the merges among models that were evaluated, by each kind of number: a map of all tasks that have it.

    Args:
        verdicts: by model; a merge is known by its provenance.
        tasks: as `growmerge.findings.asked` has them.
    """
    merges = {name: found for name, verdict in verdicts.items() if (found := _merged(verdict["model"]["provenance"]))}
    shown = labels({model for _, models in merges.values() for model in models})
    drawn: list[dict[str, Any]] = []
    for unit in dict.fromkeys(task["unit"] for task in tasks):
        mine = [task for task in tasks if task["unit"] == unit]
        rows = [
            {
                "model": name,
                "label": " + ".join(shown[model] for model in models),
                "group": method,
                "values": [task["values"].get(name, {}).get("value") for task in mine],
            }
            for name, (method, models) in merges.items()
        ]
        names = [task["name"] for task in mine]
        drawn += _maps(unit, unit, bool(mine[0]["less_is_better"]), names, rows)
    return drawn


def labels(names: Collection[str]) -> dict[str, str]:
    """Return the shortest ends of paths that tell names apart, by name."""
    parts = {name: PurePath(name).parts for name in names}
    for depth in range(1, max((len(found) for found in parts.values()), default=0) + 1):
        ends = {name: "/".join(found[-depth:]) for name, found in parts.items()}
        if len({*ends.values()}) == len(ends):
            return ends
    return {name: name for name in names}


def _maps(
    title: str, unit: str, less_is_better: bool, columns: Sequence[str], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return one map, or none of fewer than two rows; rows of one label and group are told apart by their names.

    Groups of one row each are one group, of rows that are called by them.
    """
    if len(rows) < 2:
        return []
    if len({row["group"] for row in rows}) == len(rows):
        for row in rows:
            row["label"], row["group"] = f"{row['group']}: {row['label']}", ""
    groups = [*dict.fromkeys(row["group"] for row in rows)]
    rows.sort(key=lambda row: (groups.index(row["group"]), row["label"].count(" + ")))
    known = [(row["group"], row["label"]) for row in rows]
    for row, place in zip(rows, known, strict=True):
        if known.count(place) > 1:
            row["label"] += f" ({row['model']})"
    about = {"title": title, "unit": unit, "less_is_better": less_is_better, "columns": list(columns)}
    return [{**about, "rows": [{key: row[key] for key in ("label", "group", "values")} for row in rows]}]


def _bits_per_byte(rows: Sequence[Sequence[Any]]) -> float:
    return float(sum(row[1] for row in rows) / sum(row[2] for row in rows))


def _merged(record: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Return the method and the models that were merged, but for their base; None of what is no merge."""
    recipe = record.get("recipe")
    if record.get("verb") != "merge" or not isinstance(recipe, Mapping):
        return None
    names = record.get("models") or [parent.get("name") for parent in record.get("parents", ())]
    try:
        written = yaml.safe_load(recipe.get("text") or "{}")
    except yaml.YAMLError:
        written = {}
    base = written.get("base_model") if isinstance(written, Mapping) else recipe.get("base_model")
    listed = [str(name) for name in names if name]
    return str(recipe.get("method", "merge")), [name for name in listed if name != base] or listed
