"""What a training starts from: a model's folder, or what growth makes of a run's checkpoint with its optimizer."""

from dataclasses import replace
from pathlib import Path

from checkpoint.open import open_checkpoint
from checkpoint.source import Source
from growmerge.context import Context
from growmerge.schema import GrowStage, TrainStage
from growmerge.shapes import recipe_of
from parallel.errors import InputError
from train.loop import last_checkpoint
from upscale.grow import grow


def starting_source(context: Context, name: str, dynamics: str) -> Source:
    """Return what a training from a stage, or from a path in the pipeline file, starts from; nothing is read yet.

    Args:
        dynamics: the training's; free needs no factors of growth.
    """
    if dynamics == "free" and not keeps_optimizer(context, name):
        return open_checkpoint(context.model(name))
    return _with_optimizer(context, name)


def kept_checkpoint(run: Path, step: int) -> Path:
    """Return the checkpoint that a run has kept of a step.

    Raises:
        InputError: it has kept none.
    """
    path = last_checkpoint(run, step)
    if not path.is_dir():
        known = sorted(one.name for one in path.parent.glob("step-*")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such checkpoint; there are: {', '.join(known) or 'none'}")
    return path


def keeps_optimizer(context: Context, name: str) -> bool:
    """Return whether a training from a stage goes on with the optimizer's state: a grow stage says so."""
    stage = context.nodes[name].stage if name in context.nodes else None
    return isinstance(stage, GrowStage) and stage.optimizer != "reset"


def _with_optimizer(context: Context, name: str) -> Source:
    """Return a stage's model with all that is known of its optimizer: state, groups, and their factors of growth.

    Those of a training are in its last checkpoint. A grown model's folder holds weights alone, so what it was grown
    from is grown again, lazily.
    """
    stage = context.nodes[name].stage if name in context.nodes else None
    if isinstance(stage, TrainStage):
        return open_checkpoint(last_checkpoint(context.folder(name), context.tasks[name].config["training"]["steps"]))
    if isinstance(stage, GrowStage):
        recipe = recipe_of(stage, context.pipeline.seed)
        if recipe.upcycles:
            raise InputError(
                f"{name} has experts of a dense model, and no rule is known for their optimizer: a training from it "
                "needs dynamics: free"
            )
        if recipe.state == "reset":
            recipe = replace(recipe, state="scaled")  # for the factors; a run that keeps no optimizer drops the rest
        return grow(_with_optimizer(context, stage.from_), recipe)
    return open_checkpoint(context.model(name))
