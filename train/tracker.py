"""Where a run's log goes: JSON lines always, and Weights & Biases if it is asked for.

`metrics.jsonl` holds what follows from the run alone: every checkpoint has a copy, a resumed run goes on from it, and
so it ends with the very bytes of an undisturbed run. What the clock and the machine decide (tokens/s, memory) goes to
`timings.jsonl`, joined by `step`.

A run stays one run in wandb across resumes: its id is kept in the run's folder and in the checkpoint's state. wandb
cannot take back what it has, so a step is a metric of our own, `step`, which all others are drawn over: what was logged
after the checkpoint that a run resumes from comes a second time with the same steps (and, with an exact resume, the
same values), and wandb's own counter never goes backwards. Offline every start of the run has a folder of its own with
the same id; `wandb sync RUN/wandb` uploads them in order. wandb writes once a second, so a kill costs it no more.
"""

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.files import disk_errors, read_json, write_bytes, write_json
from parallel.errors import InputError, one_of

METRICS, TIMINGS, WANDB_ID = "metrics.jsonl", "timings.jsonl", "wandb.json"
TRACKERS = ("none", "jsonl", "wandb")
"""none and jsonl are the same: JSON lines are what a run resumes with, and always written."""
SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "login_timeout": 30.0,
    "finish_timeout": 300.0,
    "x_transaction_log_flush_interval": 1.0,
}
"""Of wandb (seconds), as far as the installed one has them: nothing waits for a network or a prompt for ever."""
Warn = Callable[[str], None]


class JsonLines:
    """A file of JSON lines that begins with the bytes that are known of it."""

    def __init__(self, path: Path, known: bytes = b"") -> None:
        self.path = path
        write_bytes(path, known)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        with disk_errors(self.path):
            self._file.write(json.dumps(plain(line), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class Tracker:
    """The log of one run. All ranks have one; those that are not the first write nothing."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        *,
        first: bool,
        warn: Warn,
        known: bytes = b"",
        state: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        project: str | None = None,
        name: str | None = None,
    ) -> None:
        """Open the log.

        Args:
            kind: one of TRACKERS.
            folder: the run's.
            first: whether this is rank 0.
            warn: told, once, that wandb does not work; the run goes on without it.
            known: metrics.jsonl as the checkpoint that is resumed from holds it.
            state: what `state` returned when that checkpoint was saved.
            config, project, name: of the run, for wandb; without them WANDB_PROJECT and WANDB_NAME hold.

        Raises:
            InputError: an unknown tracker; a full disk.
        """
        if kind not in TRACKERS:
            raise InputError(one_of("tracker", kind, TRACKERS))
        self._warn = warn
        self._files: list[JsonLines] = []
        self._run: Any = None
        self._id: str | None = None
        if not first:
            return
        last = max((line["step"] for line in read_lines(known)), default=-1)
        timings = [line for line in read_lines(_read(folder / TIMINGS)) if line["step"] <= last]
        self._files = [
            JsonLines(folder / METRICS, known),
            JsonLines(folder / TIMINGS, "".join(json.dumps(line) + "\n" for line in timings).encode()),
        ]
        if kind == "wandb":
            self._id = (state or {}).get("wandb") or _kept_id(folder)
            self._try(lambda: self._open_wandb(folder, config or {}, project, name))

    def _open_wandb(self, folder: Path, config: Mapping[str, Any], project: str | None, name: str | None) -> None:
        import wandb

        known = wandb.Settings.model_fields
        self._run = wandb.init(
            id=self._id,
            resume="allow",
            dir=str(folder),
            project=project,
            name=name,
            config=plain(config),
            allow_val_change=True,  # a resumed run may have other ranks
            reinit="create_new",
            settings=wandb.Settings(**{key: value for key, value in SETTINGS.items() if key in known}),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def where(self) -> str | None:
        """wandb's page of the run, or offline its folder; None without wandb."""
        return None if self._run is None else self._run.url or str(Path(self._run.dir).parent)

    def write(self, line: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Log a line that has a `step`; wandb gets the numbers in it, nested keys joined by slashes."""
        if not self._files:
            return
        metrics, timings = self._files
        metrics.write(line)
        if timing:
            timings.write({"step": line["step"], **timing})
        if self._run is not None:
            self._try(lambda: self._run.log(dict(numbers({**line, **(timing or {})}))))

    def content(self) -> bytes:
        """Return metrics.jsonl, for a checkpoint."""
        return self._files[0].path.read_bytes() if self._files else b""

    def state(self) -> dict[str, Any]:
        """Return plain data for the checkpoint's state."""
        return {"wandb": self._id} if self._id else {}

    def close(self, *, failed: bool = False) -> None:
        """Close the files, and let wandb finish; `failed` is how it then marks the run."""
        for file in self._files:
            file.close()
        self._files = []
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(failed)))
            self._run = None

    def _try(self, use_wandb: Callable[[], None]) -> None:
        """Do something with wandb; where it fails, say so and leave it be from then on."""
        try:
            use_wandb()
        except Exception as error:
            self._run = None
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"wandb does not work ({text}): the run goes on without it; {METRICS} has everything")


def _kept_id(folder: Path) -> str:
    """Return the run's id from its folder, made up at its first start: a kill may come before any checkpoint."""
    path = folder / WANDB_ID
    if not path.is_file():
        write_json(path, {"id": secrets.token_hex(4)})
    return str(read_json(path)["id"])


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def read_lines(data: bytes) -> list[dict[str, Any]]:
    """Return JSON lines; a last one that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    for text in data.decode("utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file."""
    return read_lines(_read(path))


def plain(value: Any) -> Any:
    """Return a value as JSON has it: mappings, lists, and None for what is no number (nan, inf)."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers inside nested mappings, each under its path; lists and texts are left out."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from numbers(each, f"{name}/{key}" if name else str(key))
    elif isinstance(value, int | float):
        yield name, value + 0  # True is 1
