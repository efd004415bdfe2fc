"""From a recipe to what becomes of each axis: how often it is copied, and in which order the copies stand.

Copies stand in tile order, [x; x; ..], so that growth stays local to tensor-parallel shards. The one exception are
query heads that grow more than the key/value heads: their copies have to stay with the head that they attend to.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from parallel.errors import InputError, one_of
from parallel.families import family_of
from parallel.rows import JOINED, Tensor
from upscale.layers import Block, blocks_of, deep_config
from upscale.siblings import moe_config
from upscale.sizes import Sizes, padded_config

Method = Literal["exact-split", "symmetric", "diagonal"]
State = Literal["reset", "scaled", "asymmetric"]
FAINTEST = 200
"""Noise so many dB below the weights is less than float32 can tell from none."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to grow, by whole factors; `width` is the factor of all that is not named."""

    width: int = 1
    hidden: int | None = None
    """Factor of the residual stream."""
    heads: int | None = None
    """Factor of the query heads, a multiple of the key/value heads' factor."""
    kv_heads: int | None = None
    """Factor of the key/value heads."""
    ffn: int | None = None
    """Factor of the feed-forward width."""
    to_hidden: int | None = None
    """Size of the residual stream, which may be no multiple: what lacks after the factors is padded (`upscale.pad`)."""
    to_heads: int | None = None
    to_kv_heads: int | None = None
    to_ffn: int | None = None
    to_head_dim: int | None = None
    depth: str | None = None
    """How layers are added: stack, interleave, solar, identity, or a map such as 0-23,8-31 (`upscale.layers`)."""
    layers: int | None = None
    """Layers of the grown model; not with a map."""
    experts: int | None = None
    """Experts a layer that a dense model's feed-forward blocks become, last of all (`upscale.upcycle`)."""
    experts_per_token: int | None = None
    """To how many of them a token is sent; 2 by default."""
    method: Method = "exact-split"
    """How a weight is shared among the copies of its input: unequal parts that add up exactly, equal parts, or the
    whole to one copy (HyperCloning's diagonal)."""
    noise_db: float | None = None
    """Gaussian noise on matrices that cancels in the sum, so many dB below the weights (HyperCloning: 10); with
    symmetric and diagonal alone."""
    state: State = "reset"
    """What becomes of Adam's moments: none (a fresh optimizer); scaled as the gradients are; or scaled in the first
    copy and zero in the others (SPARKLING, arXiv 2602.02472)."""
    seed: int = 0
    """Decides the unequal parts and the noise."""

    @property
    def upcycles(self) -> bool:
        """Whether the grown model has experts that the small one has not."""
        return self.experts is not None or self.experts_per_token is not None

    def factors(self) -> dict[str, int]:
        """Return the factor of each part.

        Raises:
            InputError: a factor is not a whole number from 1 on, the method is unknown, or Adam's state cannot be kept.
        """
        for what, value, allowed in (
            ("growth method", self.method, get_args(Method)),
            ("treatment of the optimizer's state", self.state, get_args(State)),
        ):
            if value not in allowed:
                raise InputError(one_of(what, value, allowed))
        if self.noise_db is not None and (self.method == "exact-split" or not 0 <= self.noise_db <= FAINTEST):
            raise InputError(
                f"noise of {self.noise_db} dB with method {self.method}: allowed is 0 to {FAINTEST}, with symmetric or "
                "diagonal; an exact split is unequal by itself"
            )
        if self.upcycles and self.state != "reset":
            raise InputError(
                f"experts with the optimizer's state ({self.state}): no rule is known for what becomes of it; "
                "grow without it"
            )
        given = {"hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads, "ffn": self.ffn}
        found = {part: self.width if factor is None else factor for part, factor in given.items()}
        for part, factor in found.items():
            if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
                raise InputError(f"growth factor of {part} is {factor!r}: allowed are whole numbers from 1 on")
        return found

    @property
    def sizes(self) -> Sizes:
        """What is padded, and to what size."""
        return Sizes(**{part.name: getattr(self, f"to_{part.name}") for part in fields(Sizes)})

    def blocks(self, config: Mapping[str, Any]) -> list[Block]:
        """Return the layers of the grown model, given the small one's config.

        Raises:
            InputError: see `blocks_of`.
        """
        return blocks_of(self.depth, self.layers, config["num_hidden_layers"])

    def plain(self) -> dict[str, Any]:
        """Return what provenance keeps of it: all factors, and what else is asked for."""
        kept = {key: value for key, value in asdict(self).items() if value is not None or key == "noise_db"}
        del kept["width"]
        return {**kept, **self.factors()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A piece of a grown axis that is copied from one contiguous piece of the small axis."""

    copy: int
    """Which copy it belongs to."""
    source: tuple[int, int]
    """Start and stop on the small axis."""
    target: slice
    """Where it stands, counted from the start of the piece that was asked for."""


@dataclass(frozen=True, kw_only=True)
class AxisGrowth:
    """What becomes of an axis: runs of elements stay together, each repeated, and the whole of it tiled."""

    size: int
    """Elements of the small axis."""
    copies: int = 1
    run: int
    """Elements that stay together: the whole axis in tile order."""
    repeats: int = 1
    """How often a run is repeated before the next one follows; divides `copies`."""

    def runs(self, part: slice) -> Iterator[Run]:
        """Cut a piece of the grown axis into runs, in order."""
        groups = self.size // self.run
        for number in range(part.start // self.run, -(-part.stop // self.run)):
            tile, rest = divmod(number, groups * self.repeats)
            group, repeat = divmod(rest, self.repeats)
            start, stop = max(part.start, number * self.run), min(part.stop, (number + 1) * self.run)
            shift = (group - number) * self.run
            yield Run(
                copy=tile * self.repeats + repeat,
                source=(start + shift, stop + shift),
                target=slice(start - part.start, stop - part.start),
            )


@dataclass(frozen=True, kw_only=True)
class JoinedGrowth(AxisGrowth):
    """What becomes of several axes, one behind the other: each is copied by itself, all equally often."""

    parts: tuple[AxisGrowth, ...]

    def runs(self, part: slice) -> Iterator[Run]:
        small = large = 0
        for one in self.parts:
            grown = one.size * one.copies
            start, stop = max(part.start, large), min(part.stop, large + grown)
            for run in one.runs(slice(start - large, stop - large)) if start < stop else ():
                shift = start - part.start
                yield Run(
                    copy=run.copy,
                    source=(run.source[0] + small, run.source[1] + small),
                    target=slice(run.target.start + shift, run.target.stop + shift),
                )
            small, large = small + one.size, large + grown


def joined(axis: str, found: Mapping[str, AxisGrowth]) -> JoinedGrowth:
    """Return what becomes of an axis that is several.

    Raises:
        InputError: they are copied differently often, so that no rule holds for the optimizer's state of the matrix.
    """
    parts = tuple(found[part] for part in axis.split(JOINED))
    if len({part.copies for part in parts}) > 1:
        raise InputError(
            f"{axis.replace(JOINED, ', ')} are one matrix in this family and grow alike: give heads and kv_heads the "
            "same factor"
        )
    size = sum(part.size for part in parts)
    return JoinedGrowth(size=size, copies=parts[0].copies, run=size, parts=parts)


def axis_growths(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, AxisGrowth]:
    """Return what becomes of each axis of a family's table.

    Raises:
        InputError: a factor that cannot keep the function (see `Recipe`), a shape that transformers refuses, or layers
            that cannot be made (`upscale.layers.blocks_of`).
    """
    factors = recipe.factors()
    sizes = family_of(config).axes(config)
    heads, kv_heads = factors["heads"], factors["kv_heads"]
    if heads % kv_heads:
        raise InputError(
            f"growth factor of heads is {heads}: allowed are multiples of that of kv_heads, {kv_heads}, "
            "so that each query head keeps its key/value head"
        )
    if family_of(config).plain_heads and len({factors["hidden"], heads, kv_heads}) > 1:
        raise InputError(
            f"growth factors of hidden {factors['hidden']}, heads {heads} and kv_heads {kv_heads}: they have to be "
            f"equal in the {family_of(config).name} family, whose heads are hidden_size / num_attention_heads wide"
        )
    copies = {"hidden": factors["hidden"], "q": heads, "kv": kv_heads, "qkv": heads}
    copies |= dict.fromkeys(family_of(config).widths, factors["ffn"])
    found = {axis: AxisGrowth(size=size, copies=copies.get(axis, 1), run=max(1, size)) for axis, size in sizes.items()}
    if heads != kv_heads:
        # Head i attends to key/value head i // group: a group's copies have to follow it at once.
        group = sizes["q"] // (sizes["kv"] // sizes["head_dim"])
        found["q"] = AxisGrowth(size=sizes["q"], copies=heads, run=group, repeats=heads // kv_heads)
    found |= {axis: joined(axis, found) for axis in family_of(config).joined}
    grown = grown_config(recipe, config)
    if family_of(config).whole_heads and grown["hidden_size"] % grown["num_attention_heads"]:
        raise InputError(
            f"hidden size {grown['hidden_size']} and {grown['num_attention_heads']} heads after growth: "
            f"transformers' {config['model_type']} allows a hidden size that is a multiple of the heads alone"
        )
    return found


def grown_config(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Hugging Face config of the grown model.

    Raises:
        InputError: see `Recipe.factors`, `padded_config`, `blocks_of` and `moe_config`.
    """
    found = copied_config(recipe, config)
    if recipe.sizes.given():
        found = padded_config(found, recipe.sizes)
    blocks = recipe.blocks(config)
    if recipe.depth is not None:
        found = deep_config(found, blocks)
    return moe_config(found, recipe.experts, recipe.experts_per_token) if recipe.upcycles else found


def copied_config(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of what whole factors make; `head_dim` is kept and becomes explicit."""
    factors = recipe.factors()
    heads = config["num_attention_heads"]
    divisor = family_of(config).logits_divisor
    heads_apart = {
        "num_key_value_heads": (config.get("num_key_value_heads") or heads) * factors["kv_heads"],
        "head_dim": family_of(config).axes(config)["head_dim"],
    }
    # All copies add up in the logits: where the model divides them, it divides by as much more.
    logits = {divisor: config.get(divisor, 1.0) * factors["hidden"]} if divisor else {}
    return {
        **config,
        **logits,
        "hidden_size": config["hidden_size"] * factors["hidden"],
        "num_attention_heads": heads * factors["heads"],
        **{key: config[key] * factors["ffn"] for key in family_of(config).widths.values()},
        **({} if family_of(config).plain_heads else heads_apart),
    }


def residual_scale(tensor: Tensor, axes: Mapping[str, AxisGrowth], config: Mapping[str, Any]) -> float:
    """Return what a tensor that writes into the residual stream is multiplied by, so that all of the stream is.

    Embeddings that the model multiplies by sqrt(hidden_size) are sqrt(copies) times as large after growth, and so has
    to be what a sublayer adds. The norms that read the stream do not notice, but for their eps: a relative change of
    eps / (2 * mean square) * (1 - 1 / copies).
    """
    if tensor.kind == "post_norm" and family_of(config).scaled_embeddings:
        return math.sqrt(axes["hidden"].copies)
    return 1.0


def divided_dim(tensor: Tensor, config: Mapping[str, Any]) -> int | None:
    """Return the dim whose copies share each value, since the model sums over them; None if all is copied as it is.

    That is a matrix's input, and the head's, unless the model divides its logits itself. With tied embeddings the head
    cannot be divided: the final norm is, as nothing else reads it.
    """
    family = family_of(config)
    if tensor.kind == "matrix":
        return len(tensor.axes) - 1
    if family.logits_divisor:
        return None
    if tensor.kind == "head":
        return 1
    last = tensor.kind == "final_norm" or (tensor.kind == "norm_bias" and tensor.layer is None)
    return 0 if last and family.is_tied(config) else None
