"""What models are to one another: the base that a setup's models come from, those of one language, the joint one.

Roles are plain data: {"source_language", "setups": [{"base", "specialised": {language: model}, "joint", "models":
[further models, such as merges]}]}; a setup may lack a base or a joint model (None).
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from growmerge.config import Marks, load_file
from growmerge.grids import fill
from growmerge.schema_eval import EvalConfig
from growmerge.schema_eval import Roles as Templates
from growmerge.verdicts import COMPARISONS
from merge.sweep import read_sweep
from parallel.errors import InputError, one_of

Roles = Mapping[str, Any]


def read_roles(path: Path) -> tuple[list[str], Roles] | None:
    """Return the models of a file for `growmerge eval`, a sweep's included, and their roles; None if it gives none.

    Raises:
        InputError: anything wrong with the file, a role that no model has, a language without a task; the line names
            file and line.
    """
    config, marks = load_file(EvalConfig, path)
    if config.roles is None:
        return None
    merges = read_sweep(path.parent / config.sweep).merges if config.sweep is not None else ()
    names = [*config.models, *(merge.name for merge in merges)]
    if (taken := Path(COMPARISONS).stem) in names:
        raise marks.error("roles", f"a model is called {taken!r}, as the file that they are written to")
    languages = dict.fromkeys(task.language for task in config.tasks.values() if task.language)
    asked = {
        "source_language": config.roles.source_language,
        **{f"specialised.{one}": one for one in config.roles.specialised},
    }
    for key, language in asked.items():
        if language is not None and language not in languages:
            raise marks.error(f"roles.{key}", f"no task is of it: {one_of('language', language, languages)}")
    return names, {"source_language": config.roles.source_language, "setups": _setups(config.roles, names, marks)}


def _setups(roles: Templates, names: Sequence[str], marks: Marks) -> list[dict[str, Any]]:
    """Return the models of each setup, all of which have to be there, but for joint ones of some setups."""
    setups = [{"setup": setup} for setup in roles.setups] or [{}]

    def named(key: str, template: str | None, *, few: bool = False) -> list[str | None]:
        if template is None:
            return [None] * len(setups)
        with marks.within(f"roles.{key}"):
            found = [fill(template, values) for values in setups]
            missing = [name for name in found if name not in names]
            if missing and (not few or len(missing) == len(found)):
                raise InputError(one_of("model", missing[0], names))
        return [name if name in names else None for name in found]

    base, joint = named("base", roles.base), named("joint", roles.joint, few=True)
    specialised = {one: named(f"specialised.{one}", template) for one, template in roles.specialised.items()}
    return [
        {
            "base": base[number],
            "specialised": {language: found[number] for language, found in specialised.items()},
            "joint": joint[number],
            "models": models,
        }
        for number, models in enumerate(_members(roles, names, marks))
    ]


def _members(roles: Templates, names: Sequence[str], marks: Marks) -> list[list[str]]:
    """Return the models that are of each setup by their names."""
    glob = roles.models or ("{setup}-*" if roles.setups else "*")
    with marks.within("roles.models"):
        globs = [fill(glob, {"setup": setup}) for setup in roles.setups] or [fill(glob, {})]
    found: list[list[str]] = [[] for _ in globs]
    for name in names:
        fitting = [number for number, one in enumerate(globs) if fnmatchcase(name, one)]
        if fitting:
            found[max(fitting, key=lambda number: len(globs[number]))].append(name)
    if roles.models is not None and not any(found):
        raise marks.error("roles.models", one_of("model", globs[0], names))
    return found


def study_roles(study: Mapping[str, Any]) -> Roles:
    """Return the roles of a pipeline's study, as its report has it."""
    return {
        "source_language": study["source_language"],
        "setups": [
            {
                "base": study["base"].get(setup),
                "specialised": study["adapted"].get(setup, {}),
                "joint": study["joint"].get(setup),
                "models": [*study["merged"].get(setup, {}).values()],
            }
            for setup in study["setups"]
        ],
    }
