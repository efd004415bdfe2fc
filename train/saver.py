"""Saving in the background: tensors are copied into host buffers, training goes on, a thread of each rank writes.

No collective runs off the main thread: ranks agree by part files (`train.parts`), and that a save is complete, or why
not, every rank learns on the main thread when all settle it together. What `finished` says is one rank's own view, good
for a log; only what `settle` returns is the same on all ranks, and only that may decide what a run does next.
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import manifest
from checkpoint.files import disk_errors
from parallel.errors import InputError
from parallel.faults import point
from parallel.ranks import Ranks
from train.buffers import HostBuffers
from train.engine_config import PATIENCE_S
from train.parts import Part, delete, no_room, publish, wait_for_parts, write_part, write_shard, write_small


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a save ended."""

    folder: Path
    complete: bool
    """Whether the checkpoint is there."""
    error: str | None
    """One line that says what went wrong; of a complete one, in deleting older ones."""
    blocked_s: float = 0.0
    """Seconds that training stood still for it, to copy; of all ranks the longest, as below."""
    waited_s: float = 0.0
    """Seconds that training stood still later, until the writing had ended."""
    written_s: float = 0.0
    """Seconds that the writing took, until the pointer was moved."""
    bytes: int = 0
    """Of all ranks' shards."""

    @property
    def record(self) -> dict[str, float]:
        """The numbers as plain data."""
        return {name: getattr(self, name) for name in ("blocked_s", "waited_s", "written_s", "bytes")}


@dataclass(kw_only=True)
class _Save:
    """A save under way, as one rank sees it."""

    number: int
    folder: Path
    part: Part
    refused: str | None = None
    """Why nothing is written, which all ranks know."""
    states: list[tuple[Path, Any]] = field(default_factory=list)
    """What is not written yet, copied."""
    thread: threading.Thread | None = None
    verdict: str | None = None
    """What rank 0 found wrong when it wanted to publish; elsewhere None."""
    blocked_s: float = 0.0
    waited_s: float = 0.0
    written_s: float = 0.0

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Saver:
    """Saves checkpoints one at a time; `begin`, `add`, `commit` and `settle` are called by all ranks together."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        background: bool = False,
        expected: int = 0,
        patience_s: float = PATIENCE_S,
        published: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Begin to fault the buffers in, in the background as well.

        Args:
            background: copy and return; otherwise `add` writes and `commit` returns when the checkpoint is complete.
            expected: bytes of this rank's shards: of the buffers, and what the disk should have room for.
            patience_s: see PATIENCE_S.
            published: called on rank 0 with the folder of a checkpoint that is complete, off the main thread.
        """
        self.background = background
        self.buffers = HostBuffers()
        self._ranks = ranks
        self._patience_s = patience_s
        self._published = published
        self._size = sum(ranks.gather(expected))
        self._save: _Save | None = None
        self._pending: _Save | None = None
        self._begun = 0
        self._outcomes: dict[int, Outcome] = {}
        count = expected if background else 0
        self._faulting = threading.Thread(target=_attempt, args=(self.buffers.reserve, count), daemon=True)
        self._faulting.start()

    def begin(self, folder: Path) -> None:
        """Wait for the save before, make the folder anew, and look whether the disk has room for a checkpoint.

        Raises:
            InputError: it has none, and saves are not in the background (else `settle` tells).
        """
        self._settle()
        began = time.perf_counter()
        if self._pending is None:
            token, refused = self._ranks.broadcast(self._prepare(folder) if self._ranks.first else None)
        else:
            token, refused = "", f"{folder}: not saved, as {self._pending.folder.name} is still being written"
        self._begun += 1
        self._save = _Save(number=self._begun, folder=folder, part=Part(save=token), refused=refused)
        self._save.blocked_s = time.perf_counter() - began
        if refused is not None and not self.background:
            raise InputError(refused)
        if refused is None:
            self._faulting.join()
            self.buffers.rewind()

    def _prepare(self, folder: Path) -> tuple[str, str | None]:
        """Return a name for this attempt, and why it cannot succeed, if so; on rank 0."""
        token = uuid.uuid4().hex

        def make() -> str | None:
            with disk_errors(folder):
                delete(folder)  # what an interrupted save left behind
                folder.mkdir(parents=True)
            refused = no_room(folder, self._size, 3 * self._ranks.world_size)
            if refused is not None:
                folder.rmdir()
            return refused

        found: list[str | None] = []
        error = _attempt(lambda: found.append(make()))
        return token, error or found[0]

    def add(self, state: Any, path: Path) -> None:
        """Take one of this rank's shards; an error of the disk is kept until all ranks learn of it."""
        save = self._save
        assert save is not None, "add outside of begin and commit"
        if save.refused is not None:
            return
        began = time.perf_counter()
        if not self.background:
            self._write(save, path, state)
        elif save.part.error is None:
            save.part.error = _attempt(lambda: save.states.append((path, self.buffers.copied(state))))
        save.blocked_s += time.perf_counter() - began

    def commit(self, files: Mapping[str, bytes], own: Mapping[str, bytes]) -> None:
        """Have the checkpoint completed: small files of rank 0 (`files`) and of this rank alone (`own`) go with it.

        Raises:
            InputError: it failed, and saves are not in the background (else `settle` tells).
        """
        save, self._save = self._save, None
        assert save is not None, "commit without begin"
        if save.refused is not None:
            self._outcomes[save.number] = Outcome(folder=save.folder, complete=False, error=save.refused)
            return
        self._pending = save
        if self.background:
            save.thread = threading.Thread(target=self._finish, args=(save, dict(files), dict(own)), daemon=True)
            save.thread.start()
            return
        began = time.perf_counter()
        self._finish(save, files, own)
        save.blocked_s += time.perf_counter() - began
        self._settle()
        if not self._outcomes[save.number].complete:
            raise InputError(str(self._outcomes.pop(save.number).error))

    def finished(self) -> Outcome | None:
        """Return how this rank's part of a save ended, on rank 0 the whole save, once it has; all ranks settle it."""
        save = self._pending
        if save is None or save.busy:
            return None
        return Outcome(
            folder=save.folder,
            complete=manifest.is_complete(save.folder),
            error=save.verdict if self._ranks.first else save.part.error,
            blocked_s=save.blocked_s,
            waited_s=save.waited_s,
            written_s=save.written_s,
            bytes=sum(save.part.sizes.values()),
        )

    def settle(self) -> list[Outcome]:
        """Wait for the save under way, if there is one, and return how each save ended since the last call, in order.

        All ranks get the same. A save is waited for `patience_s` in all; one that takes longer is told of as an error,
        and again when it ends.
        """
        self._settle()
        outcomes, self._outcomes = self._outcomes, {}
        return [outcome for _, outcome in sorted(outcomes.items())]

    def close(self) -> None:
        """Give the buffers back; call `settle` before, if it matters how the last save ends."""
        save = self._pending
        if save is not None and save.thread is not None:
            save.thread.join(max(0.0, self._patience_s - save.waited_s))
        if save is None or not save.busy:
            self._faulting.join()
            self.buffers.release()

    def _settle(self) -> None:
        save = self._pending
        if save is None:
            return
        began = time.perf_counter()
        if save.thread is not None:
            save.thread.join(max(0.0, self._patience_s - save.waited_s))
        save.waited_s += time.perf_counter() - began
        views = self._ranks.gather(self.finished())
        late = [str(rank) for rank, view in enumerate(views) if view is None]
        if late:
            error = f"{save.folder}: rank {', '.join(late[:8])} still writing after {self._patience_s:g} s"
            self._outcomes[save.number] = Outcome(folder=save.folder, complete=False, error=error)
            return
        self._pending = None
        outcome = self._outcomes[save.number] = _agreed(views)
        if outcome.complete:
            self._size = outcome.bytes
        elif self._ranks.first:
            delete(save.folder)

    def _write(self, save: _Save, path: Path, state: Any) -> None:
        """Write a shard, unless something failed before."""
        if save.part.error is None:
            save.part.error = _attempt(write_shard, state, path, save.part)
        point(f"save/{'optim' if 'optim_states' in path.name else 'model'}/{self._ranks.rank}")

    def _finish(self, save: _Save, files: Mapping[str, bytes], own: Mapping[str, bytes]) -> None:
        """Write what this rank has to, say so in its part file, and on rank 0 complete the checkpoint."""
        began = time.perf_counter()
        for path, state in save.states:
            self._write(save, path, state)
        save.states.clear()
        part = save.part
        for name, data in own.items():
            part.error = part.error or _attempt(write_small, data, save.folder / name, part)
        if part.error is not None:  # on a full disk the part file needs room
            for name in part.sizes:
                (save.folder / name).unlink(missing_ok=True)
        failed = _attempt(write_part, save.folder, self._ranks.rank, part)
        part.error = part.error or failed
        point(f"save/part/{self._ranks.rank}")
        if not self.background:
            self._ranks.barrier()
        if self._ranks.first:
            save.verdict = self._conclude(save, files)
        save.written_s = time.perf_counter() - began

    def _conclude(self, save: _Save, files: Mapping[str, bytes]) -> str | None:
        """Wait for all ranks and complete the checkpoint; return what went wrong, if something did."""
        parts: list[Part] = []
        world, token = self._ranks.world_size, save.part.save
        error = _attempt(lambda: parts.extend(wait_for_parts(save.folder, world, token, self._patience_s)))
        if error is not None:
            return error  # some may be writing yet: the folder is deleted when all have settled
        error = _attempt(publish, save.folder, parts, files)
        if error is None:
            return _attempt(self._published, save.folder)
        if not manifest.is_complete(save.folder):
            delete(save.folder)
        return error


def _agreed(views: list[Outcome]) -> Outcome:
    """Return the outcome of a save from what each rank saw of it: rank 0's word, and the rank's that failed."""
    first = views[0]
    errors = [view.error for view in views if view.error is not None]
    return Outcome(
        folder=first.folder,
        complete=first.complete,
        error=errors[-1] if first.error is not None else None,
        blocked_s=max(view.blocked_s for view in views),
        waited_s=max(view.waited_s for view in views),
        written_s=max(view.written_s for view in views),
        bytes=sum(view.bytes for view in views),
    )


def _attempt(action: Callable[..., Any], *given: Any) -> str | None:
    """Do something whose failure all ranks have to learn of before anybody stops: return it as a line."""
    try:
        action(*given)
    except InputError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
