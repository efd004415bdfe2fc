"""What each kind of task does, by verb. All ranks call the same function; what is done once is done by rank 0.

A verb's module is imported when the verb is used: fetching text needs no torch.
"""

import shutil
from collections.abc import Callable
from importlib import import_module

from checkpoint import manifest
from growmerge.context import Context
from growmerge.tasks import Task
from parallel.faults import point

VERBS: dict[str, tuple[str, str]] = {
    "text": ("growmerge.texts", "do_text"),
    "tokens": ("growmerge.texts", "do_tokens"),
    "pairs": ("growmerge.texts", "do_pairs"),
    "train": ("growmerge.stages", "do_train"),
    "grow": ("growmerge.stages", "do_grow"),
    "statistics": ("growmerge.merge_stages", "do_statistics"),
    "merge": ("growmerge.merge_stages", "do_merge"),
    "evaluate": ("growmerge.scores", "do_evaluate"),
    "baselines": ("growmerge.scores", "do_baselines"),
    "report": ("growmerge.results", "do_report"),
}
TRIES = ".search.jsonl"
"""What the search of a merge has tried."""


def do(context: Context, task: Task) -> None:
    """Do a task; its folder is complete when this returns, and was not before."""
    context.once(lambda: _clear(task))
    module, name = VERBS[task.verb]
    action: Callable[[Context, Task], None] = getattr(import_module(module), name)
    action(context, task)
    point(f"stage/{task.name}")
    about = {"name": task.name, "verb": task.verb, "key": task.key, "config": dict(task.config)}
    context.once(lambda: manifest.write_manifest(task.folder, about=about) and None)


def _clear(task: Task) -> None:
    """Remove what a killed run left of a task, but for what it goes on from."""
    (task.folder / manifest.NAME).unlink(missing_ok=True)
    task.folder.mkdir(parents=True, exist_ok=True)
    for path in [] if task.verb in ("train", "statistics") else task.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != TRIES:
            path.unlink()
