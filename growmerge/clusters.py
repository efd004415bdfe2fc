"""Finding a cluster's profile by name or path."""

import os
from pathlib import Path

from growmerge.config import load_file
from growmerge.schema import Resources
from parallel.errors import InputError, one_of
from slurm.profile import Profile

HOME = Path(__file__).resolve().parent.parent
PLACES = ("$GROWMERGE_CLUSTERS", "configs/clusters", "~/.config/growmerge/clusters", str(HOME / "configs" / "clusters"))
"""Folders that are searched for NAME.yaml, in order."""


def profile_of(name: str | None) -> Profile:
    """Return the profile of a name, or of a file's path; an empty one without a name.

    Raises:
        InputError: there is none of that name, or something in it is wrong, with its line.
    """
    if name is None:
        return Profile()
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        known = known_profiles()
        if name not in known:
            raise InputError(f"{one_of('profile', name, known)} (files in {', '.join(PLACES[1:3])}, or a path)")
        path = known[name]
    try:
        return load_file(Profile, path)[0]
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error


def known_profiles() -> dict[str, Path]:
    """Return the files of all profiles by name."""
    found: dict[str, Path] = {}
    for place in PLACES:
        folder = Path(os.path.expandvars(place)).expanduser()
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(path.stem, path)
    return found


def workdir_of(given: Path | None, resources: Resources, name: str) -> Path:
    """Return a run's folder: the one that is given, or one of its name where the cluster wants workdirs, or in runs."""
    if given is not None:
        return given.absolute()
    place = profile_of(resources.profile).workdirs
    filled = os.path.expandvars(place or "runs")
    if "$" in filled:
        raise InputError(f"workdirs: {place}: not all of its variables are set here")
    return (Path(filled).expanduser() / name).absolute()
