"""`growmerge eval`: every model of a file on every task of it; what is scored is kept, and never scored again.

In the folder: `<model>.json`, a model's verdict; `lm_eval/<model>.json`, the same in lm-eval's shape; and
`scores/<model's key>/<task's key>.jsonl`, a line of rows for each part of a task (see `eval.tasks`), from which a
killed run goes on and which comparisons read.
"""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from checkpoint.files import disk_errors, write_json
from eval.bits_per_byte import check_window
from eval.model import load_model, refill
from eval.samples import continue_text
from eval.score import check_lengths, token_logprobs
from eval.tasks import Task, TextTask
from growmerge import __version__
from growmerge.config import load_file
from growmerge.eval_export import FOLDER, as_results, export_tasks
from growmerge.eval_rows import Kept
from growmerge.eval_tasks import WINDOW, Asked, Harness, Prompts, fitted, key_of, read_task
from growmerge.merging import checked_device
from growmerge.schema_eval import EvalConfig
from growmerge.show import Bar
from growmerge.subjects import Subject, subjects
from parallel.errors import InputError, one_of
from parallel.faults import point
from parallel.memory import available_memory
from slurm.lease import Lease
from train.data.tokenizer import TextTokenizer

PART = 1 << 16
"""Tokens of a task that are scored between two writes, more or less."""
SCORES = "scores"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How models are evaluated; no score depends on it beyond rounding."""

    folder: Path
    only: tuple[str, ...] = ()
    """Names of the models to evaluate; all of them by default."""
    device: str = "cpu"
    """As torch names it."""
    batch_tokens: int = 4096
    """Tokens of a batch at most, padding included."""


def evaluate_file(path: Path, options: Options) -> Iterator[dict[str, Any]]:
    """Evaluate what a file says; yield each model's verdict when it is written.

    Raises:
        InputError: anything wrong with the file, its models or its data, all of which is read before any work; a model
            that has diverged or does not fit into memory.
    """
    config, tasks = _read(path)
    checked_device(options.device)
    found = [*subjects(config.models, config.sweep, path.absolute())]
    names = [one.name for one in found]
    for name in options.only:
        if name not in names:
            raise InputError(f"{path}: {one_of('model', name, names)}")
    chosen = [one for one in found if not options.only or one.name in options.only]
    with disk_errors(options.folder):
        options.folder.mkdir(parents=True, exist_ok=True)
    machine = _Machine(config, options)
    for subject in chosen:
        yield _verdict(config, tasks, subject, machine, options)


def export_file(path: Path, folder: Path) -> list[Path]:
    """Write a file's tasks as lm-eval reads them; return the YAML files.

    Raises:
        InputError: as `evaluate_file` of the file and its data.
    """
    _, tasks = _read(path)
    return export_tasks(
        {name: task for name, task in tasks.items() if not isinstance(task, (Prompts, Harness))}, folder / FOLDER
    )


def _read(path: Path) -> tuple[EvalConfig, dict[str, Asked]]:
    config, marks = load_file(EvalConfig, path)
    tasks = {}
    for name, asked in config.tasks.items():
        with marks.within(f"tasks.{name}"):
            tasks[name] = read_task(asked, path.absolute().parent, seed=config.seed)
    return config, tasks


class _Machine:
    """The model in memory, which the next one takes the place of where it has the same shapes."""

    def __init__(self, config: EvalConfig, options: Options) -> None:
        self._dtype = getattr(torch, config.precision)
        self._device = torch.device(options.device)
        self._model: PreTrainedModel | None = None
        self._config: Mapping[str, Any] = {}

    def model(self, subject: Subject) -> PreTrainedModel:
        """Return a model with a subject's weights."""
        source = subject.source
        if self._model is not None and source.config == self._config:
            refill(self._model, source)
            return self._model
        self._model = None
        need = source.family.parameters(source.config) * self._dtype.itemsize
        if self._device.type == "cpu" and need > (free := available_memory()):
            raise InputError(
                f"{subject.name}: {need / 1e9:.1f} GB of memory are needed for it, {free / 1e9:.1f} GB are free"
            )
        self._model, self._config = load_model(source, self._dtype).to(self._device), dict(source.config)
        return self._model


def _verdict(
    config: EvalConfig, tasks: Mapping[str, Asked], subject: Subject, machine: _Machine, options: Options
) -> dict[str, Any]:
    """Score what is not known of a model; write its verdict and return it."""
    try:
        tokenizer = subject.tokenizer()
        model_key = _hash(subject.key, tokenizer.sha256, config.precision)
        folder = options.folder / SCORES / model_key
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with Lease(folder / ".lease.json", f"growmerge eval of {subject.name}"):
            results = _results(config, tasks, subject, tokenizer, folder, machine, options)
    except InputError as error:
        raise InputError(f"{subject.name}: {error}") from error
    verdict = {
        "format": 1,
        "model": {
            "name": subject.name,
            "key": subject.key,
            "family": subject.source.family.name,
            "parameters": subject.source.family.parameters(subject.source.config),
            "tokenizer": tokenizer.sha256,
            "provenance": dict(subject.record),
            "notes": list(subject.notes),
        },
        "precision": config.precision,
        "seed": config.seed,
        "confidence": config.confidence,
        "resamples": config.resamples,
        "versions": {
            "growmerge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "tasks": results,
    }
    write_json(options.folder / FOLDER / f"{subject.name}.json", as_results(verdict))
    write_json(options.folder / f"{subject.name}.json", verdict)
    return verdict


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _results(
    config: EvalConfig,
    tasks: Mapping[str, Asked],
    subject: Subject,
    tokenizer: TextTokenizer,
    folder: Path,
    machine: _Machine,
    options: Options,
) -> dict[str, Any]:
    """Return what each task comes to, its scores kept in a folder."""
    positions = int(subject.source.config.get("max_position_embeddings") or WINDOW)
    found: dict[str, Any] = {}
    model: PreTrainedModel | None = None

    def loaded() -> PreTrainedModel:
        nonlocal model
        model = machine.model(subject) if model is None else model
        return model

    for name, asked in config.tasks.items():
        task = fitted(tasks[name], asked, positions)
        key = key_of(task)
        file = folder / f"{key[:16]}.jsonl"
        kept = Kept(file)
        try:
            if isinstance(task, Prompts):
                for prompt in task.prompts[len(kept.rows) :]:
                    kept.add([[prompt, _sample(loaded(), tokenizer, prompt, task)]])
                samples = [{"prompt": prompt, "text": text} for prompt, text in kept.rows]
                numbers: dict[str, Any] = {"samples": samples}
            elif isinstance(task, Harness):
                if not kept.rows:
                    kept.add([[_harness(loaded(), tokenizer, task, config, options)]])
                numbers = kept.rows[0][0]
            else:
                if len(kept.rows) < len(task):
                    _score(task, loaded(), tokenizer, kept, f"{subject.name}: {name}", options.batch_tokens)
                numbers = task.summary(
                    kept.rows, resamples=config.resamples, confidence=config.confidence, seed=config.seed
                )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        window = {"window": task.window, "stride": task.stride} if isinstance(task, TextTask) else {}
        about = {"kind": asked.kind, "language": asked.language, "domain": asked.domain, **window}
        found[name] = {**about, "data": key, "scores": f"{SCORES}/{folder.name}/{file.name}", **numbers}
    return found


def _score(
    task: Task, model: PreTrainedModel, tokenizer: TextTokenizer, kept: Kept, what: str, batch_tokens: int
) -> None:
    """Score the items of a task that are not kept yet, part by part."""
    if isinstance(task, TextTask):
        check_window(model, window=task.window, stride=task.stride)
    items = iter(range(len(kept.rows), len(task)))
    with Bar(what, len(task), len(kept.rows)) as bar:
        while part := [*_part(task, items, tokenizer)]:
            flat = [request for _, requests in part for request in requests]
            check_lengths(model, flat)
            scored = iter(token_logprobs(model, flat, batch_tokens=batch_tokens, share=True))
            kept.add([task.row(item, [next(scored) for _ in requests]) for item, requests in part])
            bar.update(len(kept.rows))
            point(f"eval/{len(kept.rows)}")


def _part(task: Task, items: Iterator[int], tokenizer: TextTokenizer) -> Iterator[tuple[int, list[Any]]]:
    """Yield items with their sequences until they are so many tokens."""
    tokens = 0
    while tokens < PART and (item := next(items, None)) is not None:
        requests = task.requests(item, tokenizer)
        tokens += sum(len(request.tokens) for request in requests)
        yield item, requests


def _sample(model: PreTrainedModel, tokenizer: TextTokenizer, prompt: str, task: Prompts) -> str:
    return continue_text(model, tokenizer, prompt, tokens=task.tokens, seed=task.seed, temperature=task.temperature)


def _harness(
    model: PreTrainedModel, tokenizer: TextTokenizer, task: Harness, config: EvalConfig, options: Options
) -> dict[str, Any]:
    from growmerge.harness import run_harness  # it takes seconds to import

    how = {"batch_tokens": options.batch_tokens, "resamples": config.resamples, "seed": config.seed}
    return run_harness(model, tokenizer, task, **how)
