"""The merge stages of a pipeline file, their searches, and the statistics of models that some of them go by."""

import json
import shutil
from typing import Any

from checkpoint import manifest
from checkpoint.open import open_checkpoint
from growmerge.context import Context
from growmerge.searching import development_text, result, said, searched
from growmerge.stages import export
from growmerge.statistics import Pass, make_statistics
from growmerge.tasks import Task
from growmerge.texts import documents_of, tokenizer_of
from growmerge.verbs import TRIES
from merge.merge import MergedSource, merge
from merge.search import Try, groups_of
from merge.search_settings import RESULT, Search
from merge.table import statistic_of
from parallel.errors import InputError
from slurm.lease import BEAT, STALE


def do_statistics(context: Context, task: Task) -> None:
    config = task.config
    folder = task.folder / config["statistic"]

    def action() -> None:
        if manifest.is_complete(folder):
            try:
                manifest.check(folder)
            except InputError:
                shutil.rmtree(folder)
        given = Pass(
            statistic=config["statistic"],
            model=context.model(config["from_"]),
            texts=(),
            documents={config["text"]: documents_of(context, config["text"])},
            tokenizer=context.folder("tokens") / "tokenizer",
            folder=folder,
            tokens=config["tokens"],
            sequence_length=config["sequence_length"],
            labels=config.get("labels", "text"),
            seed=config.get("seed", 0),
            patience=STALE + BEAT,
        )
        make_statistics(given, lambda done, total: _step(context, task, done, total, "tokens"))

    context.once(action)


def do_merge(context: Context, task: Task) -> None:
    config = task.config
    search = Search(**config["search"]) if "search" in config else None
    method = search.method if search else config["method"]
    statistic = statistic_of(method)
    names = config.get("statistics", [])
    statistics = {name: context.folder(name) / str(statistic) for name in names}

    def action() -> None:
        parameters = dict(config["parameters"])
        if statistic:
            parameters[statistic] = [str(statistics[name]) for name in names]
        merged = merge(
            [open_checkpoint(context.model(name)) for name in config["from_"]],
            method,
            base=open_checkpoint(context.model(config["base"])) if config["base"] else None,
            parameters=parameters,
            names=config["from_"],
            seed=config["seed"],
            allow_unrelated=config.get("allow_unrelated", False),
        )
        for note in merged.notes:
            context.report({"event": "note", "stage": task.name, "text": note})
        files = {}
        if search:
            merged, found = _search(context, task, merged, search)
            files[RESULT] = (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()
        export(context, task, merged, also=statistics, more=files)

    context.once(action)


def _search(context: Context, task: Task, merged: MergedSource, search: Search) -> tuple[MergedSource, dict[str, Any]]:
    """Return the merge with the weights found, and what is kept of the search."""
    tokenizer = tokenizer_of(context)
    texts = {
        language: development_text(documents_of(context, name), tokenizer, search)
        for language, name in search.texts.items()
    }
    best = float("inf")

    def tell(number: int, one: Try) -> None:
        nonlocal best
        best = min(best, one.mean)
        _step(context, task, number, search.evaluations, f"best {best:.4f} bits per byte")

    merged, found = searched(merged, search, texts, tell, task.folder / TRIES)
    context.report({"event": "outcome", "stage": task.name, "text": said(found)})
    groups = groups_of(merged, search)
    weights = {groups[name]: list(order.each["weight"]) for name, order in merged.orders.items()}
    return merged, {**result(search, found), "models": task.config["from_"], "weights": weights}


def _step(context: Context, task: Task, done: int, total: int, facts: str) -> None:
    context.report({"event": "step", "stage": task.name, "step": done, "steps": total, "facts": facts})
