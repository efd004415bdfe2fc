"""`growmerge verify`: is a grown model the small one's function, beside what the dtype itself costs?"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from checkpoint.open import open_checkpoint
from checkpoint.source import Source, read_tensor
from eval.model import load_model, stream_model
from growmerge.sample_text import TEXT
from parallel.errors import InputError
from parallel.families import family_of
from parallel.memory import available_memory, give_back_freed
from train.data.tokenizer import load_tokenizer
from upscale.factors import AxisGrowth, Recipe, axis_growths, grown_config, residual_scale
from upscale.layers import is_exact
from upscale.state import rule_of
from upscale.verify import GradientCheck, Preservation, check_gradients, clone_asymmetry, compare

EXACT = 1e-5
"""Largest difference of logits, as a share of the largest logit, at which growth counts as exact (float32)."""
ROWS, LENGTH = 4, 256
"""Shape of the token batches."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found; `preserved` is None where the recipe does not promise it."""

    preserved: bool | None
    float32: Preservation
    """Both models computing in float32 on their stored weights."""
    bfloat16: Preservation | None
    """The grown model computing in bfloat16 against the small one in float32, for bfloat16 weights."""
    floor: Preservation | None
    """The small model against itself in the same way: what the dtype alone costs."""
    asymmetry: float | None
    """Mean over the matrices of how far copies are from one another; None where not all that is new is a copy: sizes
    were padded, or layers or experts added."""
    gradients: GradientCheck | None
    """None likewise, and where the models were read a module at a time: gradients need all of them."""


def verify(small: Source, grown: Source, batches: Sequence[torch.Tensor], *, by_module: bool = False) -> Verdict:
    """Compare two models on token ids [B, T].

    Args:
        by_module: hold no more than a module of a model at a time, for models that do not fit into memory.

    Raises:
        InputError: the second model's sizes are no whole multiples of the first one's.
    """
    recipe, known = recipe_of(small, grown)
    axes = axis_growths(recipe, small.config)
    tensors = {name: tensor for name, tensor in small.family.tensors(small.config).items() if tensor.tied_to is None}
    growths = {name: tuple(axes[axis] for axis in tensor.axes) for name, tensor in tensors.items()}
    matrices = [name for name, tensor in tensors.items() if tensor.kind == "matrix"]
    alike = small.family == grown.family and small.config["num_hidden_layers"] == grown.config["num_hidden_layers"]
    copied = alike and not recipe.sizes.given()
    asymmetries = [_asymmetry(grown, name, growths[name]) for name in matrices] if copied else []
    load = stream_model if by_module else load_model
    first, second = load(small), load(grown)
    exact = compare(first, second, batches)
    rules = {name: rule_of(tensor, axes, small.config) for name, tensor in tensors.items()}
    gradients = None if by_module or not copied else check_gradients(first, second, batches[0], growths, rules)
    del second
    coarse: dict[str, Preservation] = {}
    stored = next(iter(small.infos.values())).slots["weight"]
    if stored == torch.bfloat16:
        for name, source in (("floor", small), ("bfloat16", grown)):
            coarse[name] = compare(first, load(source, torch.bfloat16), batches)
    promised = known and promises(recipe, stored, small)
    return Verdict(
        preserved=exact.relative <= EXACT if promised else None,
        float32=exact,
        bfloat16=coarse.get("bfloat16"),
        floor=coarse.get("floor"),
        asymmetry=sum(asymmetries) / len(asymmetries) if asymmetries else None,
        gradients=gradients,
    )


def _asymmetry(grown: Source, name: str, growths: Sequence[AxisGrowth]) -> float:
    found = clone_asymmetry(read_tensor(grown, name), growths)
    give_back_freed()
    return found


def recipe_of(small: Source, grown: Source) -> tuple[Recipe, bool]:
    """Return the recipe that a grown checkpoint records, and True; or the factors that the shapes show, and False."""
    record = grown.run.provenance
    if record.get("verb") == "grow" and isinstance(record.get("recipe"), Mapping):
        recipe = {key: value for key, value in record["recipe"].items() if key in Recipe.__dataclass_fields__}
        found = Recipe(**{key: value for key, value in recipe.items() if not key.endswith("_")})
        with suppress(InputError):  # of another small model
            if sizes_of(small, found) == sizes_of(grown, Recipe()):
                return found, True
    before, after = sizes_of(small, Recipe()), sizes_of(grown, Recipe())
    factors: dict[str, Any] = {}
    for part, axis in (("hidden", "hidden"), ("heads", "q"), ("kv_heads", "kv"), ("ffn", "ffn")):
        factors[part], rest = divmod(after[axis], before[axis])
        if rest or factors[part] < 1:
            raise InputError(
                f"{axis} is {before[axis]} in the first model and {after[axis]} in the second: not a multiple"
            )
    return Recipe(**factors), False


def fits(small: Source, grown: Source) -> bool:
    """Return whether both models in float32, with their gradients, fit into four fifths of the memory that is free."""
    count = sum(source.family.parameters(source.config) for source in (small, grown))
    return 2 * 4 * count < 0.8 * available_memory()


def sizes_of(source: Source, recipe: Recipe) -> dict[str, int]:
    """Return the sizes of what a recipe makes of a model: each axis, and how many layers."""
    config = grown_config(recipe, source.config)
    return {**family_of(config).axes(config), "layers": config["num_hidden_layers"]}


def promises(recipe: Recipe, dtype: torch.dtype, small: Source) -> bool:
    """Return whether a recipe keeps the function up to float32's rounding, the weights stored in a dtype.

    Equal shares of a bfloat16 number are exact for powers of two alone, and noise that cancels is rounded. So is a norm
    that has to grow by the square root of a factor, as Gemma's do, and what padding scales. Norms of heads have the eps
    of those of a padded stream. Of layers that are added `identity` alone keeps the function. Experts that a dense
    model gets are all equal, so what the router says does not count.
    """
    axes = axis_growths(recipe, small.config)
    tensors = small.family.tensors(small.config).values()
    if not is_exact(recipe.blocks(small.config)):
        return False
    if small.family.head_norms and recipe.to_hidden:
        return False
    if dtype == torch.float32:
        return True
    if recipe.to_hidden or (recipe.to_head_dim and not small.family.attention_scale):
        return False
    if any(residual_scale(tensor, axes, small.config) != 1 for tensor in tensors):
        return False
    if recipe.method == "exact-split":
        return True
    return recipe.noise_db is None and all(factor & (factor - 1) == 0 for factor in recipe.factors().values())


def text_batches(folder: Path, text: Path | None, tokens: int) -> list[torch.Tensor]:
    """Return about `tokens` tokens of a text, by the folder's tokenizer, as batches [ROWS, LENGTH].

    Raises:
        InputError: the folder has no tokenizer.json, or the text is too short.
    """
    try:
        words = TEXT if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text}: cannot be read as UTF-8 text ({error})") from error
    ids = load_tokenizer(folder).encode(" ".join(words.split()) if text is None else words)[:tokens]
    if len(ids) < 2:
        raise InputError(f"{text}: too short: {len(ids)} tokens")
    length = min(LENGTH, len(ids))
    return list(torch.tensor(ids[: len(ids) // length * length]).view(-1, length).split(ROWS))


def print_verification(
    small: Path, grown: Path, *, text: Path | None, tokens: int, by_module: bool, as_json: bool
) -> int:
    """Verify two folders, print what was found, and return the exit code: 1 if what was promised does not hold."""
    first, second = open_checkpoint(small), open_checkpoint(grown)
    batches = text_batches(small, text, tokens)
    found = verify(first, second, batches, by_module=by_module or not fits(first, second))
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _print(found, sum(batch.numel() for batch in batches))
    return 1 if found.preserved is False else 0


def _print(found: Verdict, tokens: int) -> None:
    table = Table(
        box=box.SIMPLE_HEAD, title=f"Against the small model in float32, on {tokens:,} tokens", title_justify="left"
    )
    for column in ("", "max |logit difference|", "relative", "mean KL (nats)", "argmax agrees"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in (
        ("grown, float32", found.float32),
        ("grown, bfloat16", found.bfloat16),
        ("small, bfloat16 (noise floor)", found.floor),
    ):
        if row is not None:
            agreed = f"{row.argmax_agreement:.4f}"
            table.add_row(
                name, f"{row.max_logit_difference:.2e}", f"{row.relative:.1e}", f"{max(0.0, row.mean_kl):.6f}", agreed
            )
    console = Console(highlight=False, width=max(120, Console().width))
    console.print(table)
    console.print(f"loss {found.float32.loss_small:.6f} -> {found.float32.loss_grown:.6f} nats a token")
    if found.asymmetry is None:
        console.print("copies and gradients: not checked, as sizes were padded or layers or experts added")
    else:
        alike = "all equal: training cannot tell them apart" if found.asymmetry == 0 else "0 if equal"
        console.print(f"copies differ by {found.asymmetry:.3f} of their size, on average over the matrices ({alike})")
    if found.asymmetry is not None and found.gradients is None:
        console.print("gradients: not checked, as the models were read a module at a time")
    if found.gradients is not None:
        console.print(
            f"gradients: their mean over copies is the optimizer rule's within {found.gradients.mean:.1e}, "
            f"single copies differ from it by {found.gradients.single:.3f} (root mean square, worst tensor)"
        )
    words = {True: "preserved", False: "NOT preserved", None: "not promised by this recipe"}
    console.print(f"function: {words[found.preserved]} (bound {EXACT:g} of the largest logit)")
