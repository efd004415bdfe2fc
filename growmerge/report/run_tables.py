"""Tables of the run itself: how far it is, what it cost, what went wrong, searches, text, stages, versions."""

from collections.abc import Mapping
from typing import Any

from growmerge.report.drawing import slug
from growmerge.report.tables import NONE, Cell, Table, count, number, rows


def progress(results: Mapping[str, Any]) -> Table | None:
    """How far an unfinished run is: a row a stage."""
    about = results.get("progress")
    if not about:
        return None
    return Table(
        name="progress",
        caption=f"Unfinished: {about['done']} of {about['stages']} stages are done",
        columns=["stage", "state", "note"],
        rows=rows([one["stage"], one["state"], one.get("note") or NONE] for one in about["rows"]),
        words=frozenset({0, 1, 2}),
    )


def cost(results: Mapping[str, Any]) -> Table | None:
    """What the stages cost, in core-hours or GPU-hours, and the totals."""
    about = results.get("timings", {}).get("cost")
    if not about or not about["rows"]:
        return None
    on_gpus = about.get("gpu_hours") is not None
    found: list[list[str | Cell]] = []
    for one in about["rows"]:
        hours = number(one["hours"], ".3f"), Cell(text=NONE)
        kept = [number(one["seconds"], ",.1f"), number(one["ranks"]), number(one.get("memory_gb"), ".1f")]
        gpus = [number(one["gpus"]), *(reversed(hours) if one["gpus"] else hours)] if on_gpus else [hours[0]]
        found.append([one["stage"], one["verb"], *kept, *gpus])
    total: list[str | Cell] = [number(sum(one["seconds"] for one in about["rows"]), ",.1f"), NONE, NONE]
    sums = [number(about["core_hours"], ".3f")]
    sums = [Cell(text=NONE), *sums, number(about["gpu_hours"], ".3f")] if on_gpus else sums
    columns = ["stage", "verb", "seconds", "ranks", "memory, GB"]
    return Table(
        name="cost",
        caption="What the run has cost"
        + (": hours of GPUs where a stage had any, else of cores" if on_gpus else ": no GPU was used"),
        columns=[*columns, *(["GPUs"] if on_gpus else []), "core-hours", *(["GPU-hours"] if on_gpus else [])],
        rows=rows([*found, ["all stages", NONE, *total, *sums]]),
        breaks=frozenset({len(found)}),
        words=frozenset({0, 1}),
    )


def incidents(results: Mapping[str, Any]) -> Table | None:
    """What failed, was stopped, warned or begun again."""
    found = [
        [one["stage"], one["event"], number(one["times"]), one.get("text") or NONE]
        for one in results.get("timings", {}).get("incidents") or []
    ]
    columns = ["stage", "event", "times", "last message"]
    caption = "Failures and requeues: a row a stage and kind of event"
    table = Table(name="incidents", caption=caption, columns=columns, rows=rows(found), words=frozenset({0, 1, 3}))
    return table if found else None


def searches(results: Mapping[str, Any]) -> list[Table]:
    """What searches for weights came to: their cost, what each language gained, and the factors of the weights."""
    asked = results.get("searches") or {}
    if not asked:
        return []
    took = results.get("timings", {}).get("searches", {})
    summary: list[list[str | Cell]] = []
    gains: list[list[str | Cell]] = []
    breaks = []
    for stage, one in asked.items():
        how = one["search"]
        blocks = how.get("blocks", 1)
        parts = f"{blocks} blocks" if blocks > 1 else "all layers alike"
        parts += ", kinds of tensors apart" if how.get("kinds") else ""
        means = [one["start"]["mean"], one["best"]["mean"]]
        numbers = [number(value, ".4f") for value in (*means, means[1] - means[0])]
        tried = [number(one["merges"]), number(how.get("evaluations")), number(took.get(stage), ",.1f")]
        summary.append([stage, how["method"], parts, *numbers, *tried])
        breaks.append(len(gains))
        for code, before in one["start"]["bits_per_byte"].items():
            after = one["best"]["bits_per_byte"].get(code)
            change = None if after is None else after - before
            name = results["languages"].get(code, code)
            gains.append([stage, name, *(number(value, ".4f") for value in (before, after, change))])
    columns = ["merge", "method", "weights of", "start", "best", "change", "merges tried", "at most", "seconds"]
    return [
        Table(
            name="searches",
            caption="Searches: mean bits per byte of development texts, with the weights as given (start) and as found",
            columns=columns,
            rows=rows(summary),
            words=frozenset({0, 1, 2}),
        ),
        Table(
            name="search-languages",
            caption="Searches: bits per byte of each language's development text",
            columns=["merge", "language", "start", "best", "change"],
            rows=rows(gains),
            breaks=frozenset(breaks),
            words=frozenset({0, 1}),
        ),
        *(_factors(results, stage, one, n) for n, (stage, one) in enumerate(asked.items(), 1)),
    ]


def _factors(results: Mapping[str, Any], stage: str, one: Mapping[str, Any], n: int) -> Table:
    factors = one["best"]["factors"]
    width = max(map(len, factors.values()), default=0)
    parents = results["models"].get(stage, {}).get("parents") or []
    # A base that is not itself summed stands behind the models.
    names = parents[:width] if len(parents) >= width else [f"model {i + 1}" for i in range(width)]
    return Table(
        name=f"search-{n}-factors-{slug(stage)}".rstrip("-"),
        caption=f"{stage}: what the search has found each model's weight to be multiplied by",
        columns=["tensors", *names],
        rows=rows([group, *(number(value, ".3f") for value in values)] for group, values in factors.items()),
    )


def corpora(results: Mapping[str, Any]) -> list[Table]:
    """The text: how much of it, and where each part comes from."""
    sizes, origins = [], []
    for code, corpus in results.get("corpora", {}).items():
        name = results["languages"].get(code, code)
        dropped = ", ".join(f"{reason} {count(n)}" for reason, n in corpus.get("dropped", {}).items()) or NONE
        keys = ("documents", "bytes", "tokens", "heldout_documents", "heldout_bytes", "parallel_documents")
        sizes.append([name, *(number(corpus.get(key)) for key in keys), dropped])
        for source in corpus["sources"]:
            place = source.get("package") or NONE
            facts = [source.get(key) or NONE for key in ("edition", "rights_holder", "licence")]
            origins.append([name, *facts, place, source.get("files") or NONE, (source.get("sha256") or NONE)[:12]])
    columns = ["language", "documents", "bytes", "tokens", "held-out documents", "held-out bytes", "of them parallel"]
    where = ["language", "edition", "rights holder", "licence", "package", "files", "sha256"]
    sized, placed = "Text: its size", "Text: where it comes from"
    tables = [
        Table(name="text", caption=sized, columns=[*columns, "left out"], rows=rows(sizes), words=frozenset({0, 7})),
        Table(name="sources", caption=placed, columns=where, rows=rows(origins), words=frozenset(range(7))),
    ]
    return [table for table in tables if table.rows]


def stages(results: Mapping[str, Any]) -> Table | None:
    """What was run: a row a stage, with the seconds it took unless the costs have them."""
    timings = results.get("timings", {})
    took = {} if timings.get("cost") else timings.get("stages", {})
    found: list[list[str | Cell]] = [
        [s["name"], s["verb"], ", ".join(s["inputs"]) or NONE, *([number(took.get(s["name"]), ",.1f")] if took else [])]
        for s in results.get("graph", [])
    ]
    columns = ["stage", "verb", "reads from", *(["seconds"] if took else [])]
    table = Table(name="stages", caption="Stages", columns=columns, rows=rows(found), words=frozenset({0, 1, 2}))
    return table if found else None


def versions(results: Mapping[str, Any]) -> Table | None:
    found = [[name, str(version)] for name, version in results.get("versions", {}).items()]
    columns = ["software", "version"]
    table = Table(name="versions", caption="Versions", columns=columns, rows=rows(found), words=frozenset({0, 1}))
    return table if found else None
