"""`growmerge eval`: every model of a file on every task of it; what is scored is kept, and never scored again.

In the folder: `<model>.json`, a model's verdict; `lm_eval/<model>.json`, the same in lm-eval's shape; and
`scores/<model's key>/<task's key>.jsonl`, a line of rows for each part of a task (see `eval.tasks`), from which a
killed run goes on and which comparisons read.
"""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checkpoint.files import disk_errors, write_json
from eval.bits_per_byte import check_window
from eval.model import load_model, refill
from eval.samples import continue_text
from eval.score import Request, check_lengths, token_logprobs
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
from parallel.ranks import ALONE, Ranks
from slurm.lease import Lease
from train.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    batch_tokens: int = 2048
    """Tokens of a batch at most, padding included."""
    lease: bool = True
    """Whether another process may evaluate the same model into the same folder, and has to be kept out."""


def evaluate_file(path: Path, options: Options, ranks: Ranks = ALONE) -> Iterator[dict[str, Any]]:
    """Evaluate what a file says; yield each model's verdict when it is written.

    Args:
        ranks: processes that share each task's sequences; all of them read the file, the first one writes.

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
    run = Evaluator(config, tasks, options, ranks)
    for subject in found:
        if not options.only or subject.name in options.only:
            try:
                yield run.verdict(subject)
            except InputError as error:
                raise InputError(f"{subject.name}: {error}") from error


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


class Evaluator:
    """Asks models, one after the other, what a file asks."""

    def __init__(self, config: EvalConfig, tasks: Mapping[str, Asked], options: Options, ranks: Ranks) -> None:
        self._config = config
        self._tasks = tasks
        self._options = options
        self._ranks = ranks
        self._model: PreTrainedModel | None = None
        """In memory; the next one takes its place where it has the same shapes."""
        self._of: Subject | None = None
        """Whose weights it has."""

    def verdict(self, subject: Subject) -> dict[str, Any]:
        """Score what is not known of a model; write its verdict and return it."""
        config = self._config
        tokenizer = subject.tokenizer()
        key = hashlib.sha256(repr((subject.key, tokenizer.sha256, config.precision)).encode()).hexdigest()[:16]
        with self._held(self._options.folder / SCORES / key, subject) if self._options.lease else nullcontext():
            results = {name: self._result(name, subject, tokenizer, f"{SCORES}/{key}") for name in self._tasks}
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
            **{name: getattr(config, name) for name in ("precision", "seed", "confidence", "resamples")},
            "versions": {
                "growmerge": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "python": platform.python_version(),
            },
            "tasks": results,
        }
        if self._ranks.first:
            write_json(self._options.folder / FOLDER / f"{subject.name}.json", as_results(verdict))
            write_json(self._options.folder / f"{subject.name}.json", verdict)
        return verdict

    @contextmanager
    def _held(self, folder: Path, subject: Subject) -> Iterator[None]:
        """Hold the folder of a model's scores: the first rank does, and all learn whether it could."""
        problem = None
        with ExitStack() as held:
            if self._ranks.first:
                try:
                    with disk_errors(folder):
                        folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(Lease(folder / ".lease.json", f"growmerge eval of {subject.name}"))
                except InputError as error:
                    problem = str(error)
            if problem := self._ranks.broadcast(problem):
                raise InputError(problem)
            yield

    def _result(self, name: str, subject: Subject, tokenizer: TextTokenizer, scores: str) -> dict[str, Any]:
        """Return what a task comes to, its scores kept in a folder."""
        asked = self._config.tasks[name]
        positions = int(subject.source.config.get("max_position_embeddings") or WINDOW)
        task = fitted(self._tasks[name], asked, positions)
        key = key_of(task)
        file = f"{scores}/{key[:16]}.jsonl"
        kept = Kept(self._options.folder / file, self._ranks)
        try:
            if isinstance(task, Prompts):
                for prompt in task.prompts[len(kept.rows) :]:
                    kept.add([[prompt, self._sample(subject, tokenizer, prompt, task)]])
                numbers: dict[str, Any] = {"samples": [{"prompt": prompt, "text": text} for prompt, text in kept.rows]}
            elif isinstance(task, Harness):
                if not kept.rows:
                    kept.add([[self._harness(subject, tokenizer, task)]])
                numbers = kept.rows[0][0]
            else:
                if len(kept.rows) < len(task):
                    self._score(task, subject, tokenizer, kept, f"{subject.name}: {name}")
                how = self._config
                numbers = task.summary(kept.rows, resamples=how.resamples, confidence=how.confidence, seed=how.seed)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        window = {"window": task.window, "stride": task.stride} if isinstance(task, TextTask) else {}
        about = {"kind": asked.kind, "language": asked.language, "domain": asked.domain, **window}
        return {**about, "data": key, "scores": file, **numbers}

    def _loaded(self, subject: Subject) -> "PreTrainedModel":
        """Return a model with a subject's weights, on every rank a whole one."""
        source = subject.source
        if self._model is not None and self._of is not None and self._of.source.config == source.config:
            if self._of is not subject:
                refill(self._model, source)
        else:
            self._model = None
            dtype = getattr(torch, self._config.precision)
            need = source.family.parameters(source.config) * dtype.itemsize
            if self._options.device == "cpu" and need > (free := available_memory()):
                raise InputError(f"{need / 1e9:.1f} GB of memory are needed for it, {free / 1e9:.1f} GB are free")
            self._model = load_model(source, dtype).to(torch.device(self._options.device))
        self._of = subject
        return self._model

    def _score(self, task: Task, subject: Subject, tokenizer: TextTokenizer, kept: Kept, what: str) -> None:
        """Score the items of a task that are not kept yet, part by part."""
        model, ranks = self._loaded(subject), self._ranks
        if isinstance(task, TextTask):
            check_window(model, window=task.window, stride=task.stride)
        items = iter(range(len(kept.rows), len(task)))
        with Bar(what, len(task), len(kept.rows)) if ranks.first else nullcontext() as bar:
            while part := [*_part(task, items, tokenizer)]:
                flat = [request for _, requests in part for request in requests]
                check_lengths(model, flat)
                found = token_logprobs(
                    model,
                    flat,
                    batch_tokens=self._options.batch_tokens,
                    rank=ranks.rank,
                    world=ranks.world_size,
                    gather=ranks.gather,
                    share=True,
                )
                scored = iter(found)
                kept.add([task.row(item, [next(scored) for _ in requests]) for item, requests in part])
                if bar is not None:
                    bar.update(len(kept.rows))
                point(f"eval/{len(kept.rows)}")

    def _sample(self, subject: Subject, tokenizer: TextTokenizer, prompt: str, task: Prompts) -> str:
        how: dict[str, Any] = {"tokens": task.tokens, "seed": task.seed, "temperature": task.temperature}
        return continue_text(self._loaded(subject), tokenizer, prompt, **how)

    def _harness(self, subject: Subject, tokenizer: TextTokenizer, task: Harness) -> dict[str, Any]:
        from growmerge.harness import run_harness  # it takes seconds to import

        found = run_harness(
            self._loaded(subject),
            tokenizer,
            task,
            batch_tokens=self._options.batch_tokens,
            resamples=self._config.resamples,
            seed=self._config.seed,
            ranks=self._ranks,
        )
        return dict(self._ranks.broadcast(found))


def _part(task: Task, items: Iterator[int], tokenizer: TextTokenizer) -> Iterator[tuple[int, list[Request]]]:
    """Yield items with their sequences until they are so many tokens."""
    tokens = 0
    while tokens < PART and (item := next(items, None)) is not None:
        requests = task.requests(item, tokenizer)
        tokens += sum(len(request.tokens) for request in requests)
        yield item, requests
