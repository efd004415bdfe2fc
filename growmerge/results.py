"""The run's results: what the stages left, gathered into one plain structure, and the report made from it."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from checkpoint.files import read_json, write_json
from eval.bootstrap import difference_interval
from growmerge import heat
from growmerge.context import Context
from growmerge.costs import costs, events_by_stage, incidents, training_seconds
from growmerge.findings import asked, curve, losses, versions
from growmerge.graph import Node, match, study_branches, study_stages
from growmerge.prepared import corpus_sizes
from growmerge.report import analyse
from growmerge.report_files import write_report
from growmerge.retention import role_comparisons
from growmerge.roles import study_roles
from growmerge.schema import OWN_TASKS, Pipeline, Study
from growmerge.shapes import model_configs, multiplied, parameters
from growmerge.stages import write_card
from growmerge.tasks import EVALUATION, Task
from growmerge.texts import described, tokenizer_of
from merge.search_settings import RESULT
from train.data.corpus import read_corpus
from train.tracker import read_metrics


def do_report(context: Context, task: Task) -> None:
    """Write report.html, report.md and results.json, and every model's card anew."""
    context.once(lambda: _write(context, task))


def _write(context: Context, task: Task) -> None:
    results = analyse(gather(context))
    write_report(results, task.folder)
    failed = [
        f"{check['model']} on {check['language']} beats the {check['baseline']} model by {check['value']:.3f} "
        f"[{check['low']:.3f}, {check['high']:.3f}] bits per byte; at least {check['by']:g} was asked for"
        for check in results["checks"]
        if not check["passed"]
    ]
    write_json(task.folder / "outcome.json", {"failed_checks": failed})
    for name in context.nodes:
        write_card(context, context.tasks[name])


def gather(context: Context, progress: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return every number of the run as plain JSON, the contract of growmerge.report; timings apart.

    Args:
        progress: how far an unfinished run is; what is not done yet is left out.
    """
    pipeline = context.pipeline
    done = {name for name, task in context.tasks.items() if task.done}

    def of(verb: str, file: str) -> dict[str, Any]:
        """Return what a file says, by model, of each that is done."""
        names = [name for name in context.nodes if f"{verb}/{name}" in done]
        return {name: read_json(context.folder(f"{verb}/{name}") / file) for name in names}

    scored, verdicts = of("evaluate", "scores.json"), of("evaluate", "verdict.json")
    trained = [name for name, node in context.nodes.items() if node.verb == "train"]
    metrics = {name: read_metrics(context.folder(name) / "metrics.jsonl") for name in trained}
    scores = {
        name: {language: entry["documents"] for language, entry in found["languages"].items()}
        for name, found in scored.items()
    }
    baselines = read_json(context.folder("baselines") / "baselines.json") if "baselines" in done else {}
    models = _models(context)
    raw: dict[str, Any] = {
        "name": pipeline.name,
        "title": pipeline.title,
        "seed": pipeline.seed,
        "confidence": pipeline.evaluation.confidence,
        "resamples": pipeline.evaluation.resamples,
        "languages": {language: corpus.name for language, corpus in pipeline.corpora.items()},
        "corpora": _corpora(context) if "tokens" in done else {},
        "tokenizer": _tokenizer(context) if "tokens" in done else {},
        "models": models,
        "scores": scores,
        "pairs": {
            name: {language: _pairs(entry["pairs"]) for language, entry in found["languages"].items()}
            for name, found in scored.items()
        },
        "baselines": baselines,
        "curves": {name: curve(lines, models[name]["flops_per_token"]) for name, lines in metrics.items() if lines},
        "losses": {name: losses(lines) for name, lines in metrics.items() if lines},
        "searches": {name: found for name, (found, _) in _searches(context).items()},
        "growth": [_growth(context, name) for name in context.nodes if name in done and _grows(context, name)],
        "checks": checks(context, scores, baselines),
        "samples": [sample for found in scored.values() for sample in found["samples"]],
        "tasks": asked(verdicts, without=_own(pipeline)),
        "graph": [
            {"name": node.name, "verb": node.verb, "inputs": list(node.inputs)} for node in context.nodes.values()
        ],
        "versions": versions(),
        "timings": _timings(context),
    }
    if progress is not None:
        raw["progress"] = dict(progress)
    if pipeline.study is not None:
        raw["study"] = _study(pipeline.study, context.nodes)
        raw["heat"] = heat.of_pipeline(raw)
        raw["comparisons"] = role_comparisons(verdicts, study_roles(raw["study"]), context.workdir / EVALUATION)
    return raw


def _grows(context: Context, name: str) -> bool:
    return context.nodes[name].verb == "grow"


def _own(pipeline: Pipeline) -> set[str]:
    return {f"{name}-{language}" for name in OWN_TASKS.values() for language in pipeline.corpora}


def _study(study: Study, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Return the stages that the study's templates stand for, nested by setup; a file may have no joint models."""

    def by_setup(part: str) -> dict[str, dict[str, str]]:
        nested: dict[str, dict[str, str]] = {}
        for (setup, other), name in study_stages(study, part).items():
            nested.setdefault(setup, {})[other] = name
        return nested

    return {
        "source_language": study.source_language,
        "languages": list(study.languages),
        "setups": list(study.setups),
        "methods": list(study.methods),
        "seed": study.seed,
        "base": {setup: name for (setup,), name in study_stages(study, "base").items()},
        "adapted": by_setup("adapted"),
        "joint": {setup: name for (setup,), name in study_stages(study, "joint").items() if name in nodes},
        "merged": by_setup("merged"),
        **({"branches": study_branches(study, nodes)} if study.branches else {}),
    }


def checks(context: Context, scores: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each check of the pipeline file with its figure: bits per byte by which a model beats the baseline.

    A check is passed if the whole interval of the paired difference lies beyond what was asked for.
    """
    found = []
    evaluation = context.pipeline.evaluation
    for check in context.pipeline.checks:
        for model in dict.fromkeys(
            name for template in check.models for name in match(context.nodes, template, context.pipeline.study)
        ):
            if model not in scores or check.language not in baselines:
                continue  # not yet
            ours, theirs = scores[model][check.language], baselines[check.language][check.beats]
            interval = difference_interval(
                [row[1] for row in theirs],
                [row[1] for row in ours],
                [row[2] for row in ours],
                resamples=evaluation.resamples,
                confidence=evaluation.confidence,
                seed=context.pipeline.seed,
            )
            found.append(
                {
                    "model": model,
                    "language": check.language,
                    "baseline": check.beats,
                    "by": check.by,
                    **asdict(interval),
                    "passed": interval.low >= check.by,
                }
            )
    return found


def _corpora(context: Context) -> dict[str, Any]:
    found = {}
    for language in context.pipeline.corpora:
        metadata = described(context, language)
        found[language] = {
            "sources": metadata["sources"],
            "documents": metadata["training"]["documents"],
            "bytes": metadata["training"]["bytes"],
            "tokens": _tokens_of(context, language),
            "heldout_documents": metadata["heldout"]["documents"],
            "heldout_bytes": metadata["heldout"]["bytes"],
            "parallel_documents": metadata["parallel_documents"],
            "dropped": metadata["dropped_passages"],
        }
    return found


def _tokens_of(context: Context, language: str) -> int:
    """Return the tokens of a language's training text: of the whole, or of its splits together."""
    sizes = corpus_sizes(context)
    splits = [size.tokens for name, size in sizes.items() if name.startswith(f"{language}.")]
    return sizes[language].tokens if language in sizes else sum(splits)


def _tokenizer(context: Context) -> dict[str, Any]:
    tokenizer = tokenizer_of(context)
    bytes_per_token, tokens_per_word = {}, {}
    for language in context.pipeline.corpora:
        texts = [document.text for document in read_corpus(context.folder("text"), language).heldout]
        tokens, words = sum(len(tokenizer.encode(text)) for text in texts), sum(len(text.split()) for text in texts)
        bytes_per_token[language] = sum(len(text.encode()) for text in texts) / tokens
        tokens_per_word[language] = tokens / words
    rates = {"bytes_per_token": bytes_per_token, "tokens_per_word": tokens_per_word}
    return {"vocab_size": tokenizer.vocab_size, **rates}


def _models(context: Context) -> dict[str, Any]:
    models: dict[str, Any] = {}
    planned = model_configs(context.pipeline, context.nodes, base=context.base)
    lines: dict[str, set[str]] = {}
    """A model with all its ancestors, each once however many ways lead to it."""
    for name, node in context.nodes.items():
        path = context.folder(name) / "model" / "config.json"
        config = read_json(path) if path.is_file() else planned[name]
        plan = context.tasks[name].config.get("training")
        at = context.tasks[name].config.get("at", 0)
        a_step = plan["global_batch"] * plan["sequence_length"] if plan else 0
        tokens = (plan["steps"] - at) * a_step if plan else 0
        a_token = 6 * multiplied(config)
        flops = a_token * tokens
        # A branch comes from a part of its run, which counts as its own.
        before = node.inputs if not at else [one for of in node.inputs for one in context.nodes[of].inputs]
        lines[name] = {name}.union(*(lines[parent] for parent in before))
        models[name] = {
            "verb": node.verb,
            "parents": list(node.inputs),
            "parameters": parameters(config),
            "steps": plan["steps"] if plan else 0,
            "tokens": tokens,
            "flops_per_token": a_token,
            "flops": flops,
            "adaptation_tokens": tokens + at * a_step,
            "adaptation_flops": flops + at * a_step * a_token,
            "total_flops": flops
            + at * a_step * a_token
            + sum(models[other]["flops"] for other in lines[name] - {name}),
            "path": f"models/{name}",
            "method": context.tasks[name].config.get("method"),
        }
    return models


def _pairs(rows: list[list[Any]]) -> dict[str, dict[str, int]]:
    """Count right pairs: swaps by summed log-probability, drops a token (a sum favours the shorter sentence)."""
    counts: dict[str, dict[str, int]] = {}
    for good, bad, good_tokens, bad_tokens, kind in rows:
        right = good > bad if kind == "swap" else good / good_tokens > bad / bad_tokens
        entry = counts.setdefault(kind, {"correct": 0, "n": 0})
        entry["correct"] += right
        entry["n"] += 1
    return counts


def _searches(context: Context) -> dict[str, tuple[dict[str, Any], float]]:
    """Return what each merge that searched has come to, and the seconds that it took, by stage."""
    paths = {name: context.folder(name) / "model" / RESULT for name in context.nodes}
    found = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    return {name: (one, one.pop("seconds")) for name, one in found.items()}


def _growth(context: Context, name: str) -> dict[str, Any]:
    return dict(read_json(context.folder(name) / "growth.json"))


def _timings(context: Context) -> dict[str, Any]:
    """Return what the run cost; of stages that an earlier run did, what they cost then."""
    said = events_by_stage(context.workdir)
    resources = context.pipeline.resources
    threads = resources.threads or context.resources.threads
    cost = costs(
        {name: task.verb for name, task in context.tasks.items()},
        said,
        ranks=resources.ranks,
        threads=threads,
        gpus=resources.gpus * resources.nodes,
    )
    done = [event for name in context.tasks for event in said.get(name, []) if event["event"] == "done"]
    seconds = {event["stage"]: event["seconds"] for event in done}
    trained = [name for name, node in context.nodes.items() if node.verb == "train"]
    return {
        "wall_s": round(max(context.resources.elapsed, sum(seconds.values())), 1),
        "cores": resources.ranks * threads,
        "ranks": resources.ranks,
        "peak_memory_gb": round(max((event.get("memory_gb", 0.0) for event in done), default=0.0), 2),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(context.resources.began)),
        "stages": seconds,
        "searches": {name: took for name, (_, took) in _searches(context).items()},
        "curves": {name: times for name in trained if (times := training_seconds(context.folder(name)))},
        "cost": cost,
        "incidents": incidents(context.tasks, said),
    }
