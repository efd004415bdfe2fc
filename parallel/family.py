"""A family of models: its table of rows, and what a config makes of them, the tensors of one model.

One table a family drives the files (names and shapes), growth (which axis grows by which factor) and tensor
parallelism (which dim is cut).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from parallel.errors import InputError
from parallel.rows import JOINED, NORMS, Row, Tensor

PER_TOKEN = "num_experts_per_tok"
"""The config key that says to how many experts a token is sent."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models that share one table."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` values of Hugging Face configs that this table describes."""
    rows: tuple[Row, ...]
    tied: Mapping[str, str]
    """alias -> owner, when `tie_word_embeddings` is set."""
    tied_by_default: bool = False
    """What a config without `tie_word_embeddings` means."""
    head_dim: int | None = None
    """What a config without `head_dim` means; hidden_size / num_attention_heads if None."""
    logits_divisor: str | None = None
    """The config key, if there is one, by which the model divides its logits."""
    attention_scale: str | None = None
    """The config key, if there is one, that says what attention is scaled by; 1 / sqrt(head_dim) if None."""
    norm_eps: float = 1e-6
    """What a config without `rms_norm_eps` means."""
    norm_offset: float = 0.0
    """Norms multiply by this plus their weight."""
    scaled_embeddings: bool = False
    """The model multiplies its embeddings by sqrt(hidden_size)."""
    whole_heads: bool = False
    """transformers refuses a hidden size that is no multiple of the number of query heads."""
    plain_heads: bool = False
    """Each head has keys and values of its own and is hidden_size / num_attention_heads wide, whatever configs say."""
    widths: Mapping[str, str] = field(default_factory=lambda: {"ffn": "intermediate_size"})
    """Feed-forward axis -> the config key that says its size."""
    experts: tuple[str, ...] = ()
    """Config keys that say how many experts a layer has: the first that is there counts, the last is the usual one."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config key -> the values with which the table holds, or no value at all."""
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of rows that Hugging Face files spell otherwise than the running model, whose names the table has -> names
    there; with `{expert}` one a matrix of each expert, and several stand one below the other (`checkpoint.experts`)."""

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return any(row.kind in NORMS and row.axes != ("hidden",) for row in self.rows)

    @property
    def uncut(self) -> str | None:
        """Why the model cannot be cut over tensor-parallel ranks; None if it can."""
        if self.experts:
            return "has experts, all of a layer in one tensor, which is not cut within each of them"
        if self.norms_all_heads:
            return "norms all heads together, and a rank has some of them"
        fused = self.joined or self.plain_heads
        return "has queries, keys and values in one matrix, which is not cut between heads" if fused else None

    @property
    def norms_all_heads(self) -> bool:
        """Whether such a norm takes its mean over all heads."""
        return any(row.kind in NORMS and row.axes[0] in ("q", "kv") for row in self.rows)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Return whether the head is the embedding."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def axes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Return the size of each axis (elements) for a Hugging Face config."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or self.head_dim or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        if self.plain_heads:
            head_dim, kv_heads = config["hidden_size"] // heads, heads
        sizes = {
            "vocab": config["vocab_size"],
            "hidden": config["hidden_size"],
            "q": heads * head_dim,
            "kv": kv_heads * head_dim,
            **{axis: config[key] for axis, key in self.widths.items()},
            "head_dim": head_dim,
        }
        if self.experts:
            sizes |= {"experts": self.experts_of(config), "one": 1}
        if self.plain_heads:
            sizes["qkv"] = 3 * heads * head_dim
        return sizes | {axis: sum(sizes[part] for part in axis.split(JOINED)) for axis in self.joined}

    def experts_of(self, config: Mapping[str, Any]) -> int:
        """Return how many experts a layer has."""
        return int(next(config[key] for key in self.experts if key in config))

    def check(self, config: Mapping[str, Any]) -> None:
        """Check that the table describes a config of its model types.

        Raises:
            InputError: not all layers have experts, or it does not say how many, or to how many a token is sent.
        """
        for key, allowed in self.fixed.items():
            if config.get(key, allowed[0]) not in allowed:
                raise InputError(
                    f"{key} is {config[key]!r}: of {self.name} only models with {allowed[0]!r} are known, whose layers "
                    "all have experts"
                )
        if not self.experts:
            return
        count = next((key for key in self.experts if key in config), self.experts[-1])
        for key in (count, PER_TOKEN, *self.widths.values()):
            size = config.get(key)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"{key} of a {self.name} model is {size!r}: allowed are whole numbers from 1 on")
        if config[PER_TOKEN] > config[count]:
            raise InputError(f"{PER_TOKEN} is {config[PER_TOKEN]}, but {count} is {config[count]}")

    @cached_property
    def joined(self) -> tuple[str, ...]:
        """Axes that are several, one behind the other."""
        return tuple(dict.fromkeys(axis for row in self.rows for axis in row.axes if JOINED in axis))

    def tensors(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return every tensor of the model by name, in the order of the running model; aliases are listed."""
        sizes, tied = self.axes(config), self.is_tied(config)
        conditions = tuple(row.exists(config) for row in self.rows)
        key = (tuple(sizes.values()), tied, config["num_hidden_layers"], conditions)
        if key not in self._known:
            self._known[key] = self._tensors(config, sizes, self.tied if tied else {})
        return {**self._known[key]}

    @cached_property
    def _known(self) -> dict[Any, dict[str, Tensor]]:
        """Tensors of models that were asked for: the hundred merges of a sweep ask hundreds of times."""
        return {}

    def _tensors(
        self, config: Mapping[str, Any], sizes: Mapping[str, int], aliases: Mapping[str, str]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, row, layer in self._names(config):
            shape = tuple(sizes[axis] for axis in row.axes)
            found[name] = Tensor(
                name=name,
                shape=shape,
                axes=row.axes,
                kind=row.kind,
                split=row.split,
                layer=layer,
                tied_to=aliases.get(name),
            )
        return found

    def in_layer(self, tensor: Tensor, layer: int) -> str:
        """Return the name of the tensor of another layer that corresponds to a layer's tensor."""
        rows = (row for row in self.rows if row.per_layer)
        return next(row.name.format(layer=layer) for row in rows if row.name.format(layer=tensor.layer) == tensor.name)

    def _names(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Row, int | None]]:
        rows = [row for row in self.rows if row.exists(config)]
        first = next(i for i, row in enumerate(rows) if row.per_layer)
        last = max(i for i, row in enumerate(rows) if row.per_layer)
        for row in rows[:first]:
            yield row.name, row, None
        for layer in range(config["num_hidden_layers"]):
            for row in rows[first : last + 1]:
                yield row.name.format(layer=layer), row, layer
        for row in rows[last + 1 :]:
            yield row.name, row, None

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Return the number of parameters, a tied tensor counted once."""
        total = 0
        for tensor in self.tensors(config).values():
            if tensor.tied_to is None:
                count = 1
                for size in tensor.shape:
                    count *= size
                total += count
        return total

    def active_ffn(self, config: Mapping[str, Any]) -> int:
        """Return the feed-forward width that a token is computed with: of experts those that it is sent to."""
        sizes = self.axes(config)
        return sizes["ffn"] * (config[PER_TOKEN] if self.experts else 1) + sizes.get("shared_ffn", 0)

    def idle(self, config: Mapping[str, Any]) -> int:
        """Return the number of parameters of the experts that a token is not sent to."""
        if not self.experts:
            return 0
        held = [prod(tensor.shape) for tensor in self.tensors(config).values() if len(tensor.axes) == 3]
        experts = self.experts_of(config)
        return sum(held) // experts * (experts - config[PER_TOKEN])
