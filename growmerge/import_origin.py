"""Where a model that is imported lies, what it is called, and what is said of its start."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from checkpoint.nanotron_model import MODEL_CONFIG
from growmerge import hub
from growmerge.published import PUBLISHED
from parallel.errors import InputError

TRAINING = "config.yaml"
"""The config that a nanotron run was started with, in the folder of each of its steps."""
SNAPSHOTS = "snapshots"
"""What huggingface_hub's cache calls the folder that has a folder for each commit of a model."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model that is imported."""

    given: str
    """As its user names it."""
    name: str
    """The last part of that; of a step of a nanotron run the run's folder's name, in the Hub's cache the model's."""
    folder: Path | None
    """None if it is the Hub's."""

    @classmethod
    def of(cls, given: str) -> Self:
        """Return what a name stands for: a folder if there is one, else a name of the Hub.

        Raises:
            InputError: it is neither.
        """
        path = Path(given)
        if path.is_dir():
            return cls(given=given, name=_name_of(path.resolve()), folder=path)
        named = hub.NAME.fullmatch(given if given.startswith(hub.PREFIX) else hub.PREFIX + given)
        name = named[1].rpartition("/")[2] if named else ""
        if not name.strip("."):
            raise InputError(
                f"{given}: no such folder, and no name of the Hub, ORGANISATION/NAME or ORGANISATION/NAME@REVISION"
            )
        return cls(given=given, name=name, folder=None)

    def place(self) -> Path:
        """Return its folder; of the Hub's models the one in the cache, where it is fetched to if it is not there.

        Raises:
            InputError: the Hub's own words.
        """
        if self.folder is not None:
            return self.folder
        named = self.given.startswith(hub.PREFIX)
        name = self.given if named else hub.PREFIX + self.given
        try:
            return hub.place(Path(), name)
        except InputError:
            pass
        try:
            return hub.fetch(name)
        except InputError as error:
            raise error if named else InputError(f"{self.given}: no such folder; {error}") from error


def _name_of(folder: Path) -> str:
    if folder.name.isdecimal() and (folder / MODEL_CONFIG).is_file():
        return folder.parent.name
    if folder.parent.name == SNAPSHOTS:  # models--ORGANISATION--NAME/snapshots/COMMIT
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def described(origin: Origin, folder: Path) -> dict[str, Any]:
    """Return what provenance holds of a model's origin: `source` and, if its start is known, `trained_from`."""
    commit = {"commit": folder.name} if folder.parent.name == SNAPSHOTS else {}
    name = origin.name if origin.folder else origin.given
    start = start_of_run(folder)
    if start is None and origin.name in PUBLISHED:
        start = PUBLISHED[origin.name].start()
    return {"source": {"name": name, **commit}, **({"trained_from": start} if start else {})}


def start_of_run(folder: Path) -> dict[str, Any] | None:
    """Return what a nanotron run went on from, by the config that it was started with; None if that does not say."""
    try:
        config = yaml.safe_load((folder / TRAINING).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    method = _inner(config, "model", "init_method")
    cloned = _inner(method, "path")
    start = cloned or _inner(config, "checkpoints", "resume_checkpoint_path")
    if not isinstance(start, str):
        return None
    parts = [part for part in Path(start).parts if not part.isdecimal()]  # a step's number
    if not parts or parts[-1] == _inner(config, "general", "run"):  # it went on after a stop: from what, is not said
        return None
    grown = isinstance(method, Mapping) and any("cloning_factor" in str(key) for key in method)
    return {"name": parts[-1], "grown": bool(cloned) and grown, "said_by": TRAINING}


def _inner(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
