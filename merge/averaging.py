"""The last checkpoints of a training run as models of a recipe: `{model: runs/swe, checkpoints: 5}`.

Each is opened where the run has written it, sharded as it is; no consolidated copy is made.
"""

from dataclasses import replace
from pathlib import Path

from checkpoint import manifest
from merge.inform import Place
from merge.recipe import Input, Recipe
from parallel.errors import InputError

WHERE = "checkpoints"
"""Folder of a run that holds them, `step-00000100` and so on; `train.loop.last_checkpoint` names them so."""


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """Return the last complete checkpoints of a run, the oldest first.

    Raises:
        InputError: no run's folder, or fewer checkpoints.
    """
    if not (run / WHERE).is_dir():
        raise InputError(f"{run}: no training run: it has no folder {WHERE}")
    complete = sorted(path for path in (run / WHERE).glob("step-*") if manifest.is_complete(path))
    if len(complete) < count:
        known = f": {', '.join(path.name for path in complete)}" if complete else ""
        raise InputError(f"{run}: checkpoints is {count}, but {len(complete)} of this run are complete{known}")
    return complete[-count:]


def with_checkpoints(recipe: Recipe, place: Place) -> Recipe:
    """Return a recipe with each run's checkpoints in its place, each a model with the run's parameters.

    Raises:
        InputError: there are not so many, with the line of the recipe.
    """

    def models(one: Input) -> list[Input]:
        if one.checkpoints is None:
            return [one]
        try:
            found = last_checkpoints(place(one.model), one.checkpoints)
        except InputError as error:
            raise InputError(f"{recipe.file}:{one.line}: {one.model}: {error}") from None
        names = [f"{one.model.rstrip('/')}/{WHERE}/{path.name}" for path in found]
        return [replace(one, model=name, checkpoints=None) for name in names]

    slices = [replace(part, inputs=tuple(x for one in part.inputs for x in models(one))) for part in recipe.slices]
    return replace(recipe, slices=tuple(slices))
