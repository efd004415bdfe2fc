"""The tasks of `growmerge eval`, read: documents, minimal pairs, pairs made of text, and prompts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from eval.pair_files import Columns, pairs_of, read_pair_files
from eval.pairs import SHORTENED, make_pairs
from eval.records import Passage, Record, read_texts
from eval.tasks import PairsTask, Task, TextTask
from growmerge.places import files_of
from growmerge.schema_eval import EvalTask
from parallel.errors import InputError
from train.data.hub import hub_configs, hub_shards, hub_texts

WINDOW = 2048
"""Tokens of a window where none are given, or the model's positions if they are fewer."""
ALL = "all"
"""Of a data set's configurations, unless one is called so."""
RULE = 1
"""Raised when the same model and data get another score than before."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a model goes on from."""

    prompts: Sequence[str]
    tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Harness:
    """Tasks of lm-evaluation-harness."""

    names: Sequence[str]
    include: str | None
    shots: int | None
    limit: int | None
    version: str
    """Of lm-eval."""
    files: Sequence[tuple[str, str]]
    """Those of `include` with their checksums."""


Asked = Task | Prompts | Harness


def read_task(asked: EvalTask, base: Path, *, seed: int) -> Asked:
    """Read a task's data.

    Args:
        base: folder that its paths start from.

    Raises:
        InputError: data that is not there or not as the task says; the line names file and line.
    """
    if asked.kind == "samples":
        return Prompts(prompts=asked.prompts, tokens=asked.tokens, temperature=asked.temperature, seed=seed)
    if asked.kind == "harness":
        return _harness(asked, base)
    if asked.kind == "pairs":
        columns = Columns(good=asked.good, bad=asked.bad, phenomenon=asked.phenomenon, where=asked.where)
        if asked.files is not None:
            return PairsTask(pairs=read_pair_files(files_of(asked.files, base), columns))
        found = [
            pair
            for config, records in _hub(asked, base)
            for pair in pairs_of(records, columns, name=config or str(asked.hub), where=f"hub: {asked.hub}")
        ]
        return PairsTask(pairs=found)
    documents = _documents(asked, base)
    if asked.kind == "corrupt":
        corpus = [passage.text for passage in read_texts(files_of(asked.unlike, base))] if asked.unlike else []
        pairs = make_pairs(documents, count=asked.count, seed=seed, corpus=corpus)
        if not pairs:
            raise InputError("no pairs can be made of the text: sentences of 5 to 30 words are needed")
        return PairsTask(pairs=pairs, shortened=SHORTENED)
    window = asked.window or WINDOW
    return TextTask(documents=documents, window=window, stride=asked.stride or max(1, window // 2))


def fitted(task: Asked, asked: EvalTask, positions: int) -> Asked:
    """Return a task with a window that a model has positions for, unless the file gives one."""
    if not isinstance(task, TextTask) or asked.window is not None or task.window <= positions:
        return task
    return replace(task, window=positions, stride=min(task.stride, max(1, positions // 2)))


def key_of(task: Asked) -> str:
    """Return what decides a task's scores, as a hash: its data and its rule."""
    plain = [RULE, type(task).__name__, _plain(task)]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()


def _plain(task: Asked) -> Any:
    if isinstance(task, TextTask):
        return [[[one.id, one.text] for one in task.documents], task.window, task.stride]
    if isinstance(task, PairsTask):
        return [[one.good, one.bad, one.kind] for one in task.pairs]
    assert isinstance(task, (Prompts, Harness)), task
    return {name: value for name, value in asdict(task).items() if name != "include"}


def _harness(asked: EvalTask, base: Path) -> Harness:
    try:
        installed = version("lm_eval")
    except PackageNotFoundError:
        raise InputError("lm-eval is not installed: pip install 'growmerge[harness]'") from None
    folder = None if asked.include is None else base / asked.include
    if folder is not None and not folder.is_dir():
        raise InputError(f"include: {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".py", ".jsonl")) if folder else []
    return Harness(
        names=asked.names,
        include=None if folder is None else str(folder),
        shots=asked.shots,
        limit=asked.limit,
        version=installed,
        files=[(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files],
    )


def _documents(asked: EvalTask, base: Path) -> list[Passage]:
    if asked.files is not None:
        return read_texts(files_of(asked.files, base), asked.field)
    found = []
    for _, records in _hub(asked, base):
        for place, record in records:
            text = record.get(asked.field)
            if not isinstance(text, str):
                raise InputError(f"{place}: {asked.field} is no text ({text!r})")
            if text.strip():
                found.append(Passage(id=str(record.get("id", place)), text=text))
    if not found:
        raise InputError(f"hub: {asked.hub}: holds no text")
    return found


def _hub(asked: EvalTask, base: Path) -> Iterator[tuple[str | None, Iterator[Record]]]:
    """Yield a data set's configurations, each with its rows."""
    every = _HubSource(
        hub=asked.hub, config=None, split=asked.split, revision=asked.revision, data_files=asked.data_files
    )
    configs: Sequence[str | None]
    configs = (asked.config,) if asked.config is None or isinstance(asked.config, str) else asked.config
    if asked.config == ALL:
        known = hub_configs(every, base)
        configs = (ALL,) if ALL in known else known
    for config in configs:
        source = replace(every, config=config)
        shards = hub_shards(source, base)
        yield config, (row for number in range(shards) for row in hub_texts(source, base, number, shards))


@dataclass(frozen=True, kw_only=True)
class _HubSource:
    hub: str | None
    config: str | None
    split: str
    revision: str | None
    data_files: tuple[str, ...]
    field: str = ""
    """None of them: all columns are read."""
