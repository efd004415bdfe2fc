"""What a recipe says of each tensor: which tensors it is made from, and the method's parameters there.

Values are looked for from the inside out, as in mergekit: the model's, the slice's, the module's, the recipe's, the
method's default. A gradient runs over the layers of its slice; what is before and behind the layers has its start.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from checkpoint.source import Source
from merge.reads import Operand
from merge.recipe import Given, Input, Parameters, Recipe, Setting, Slice, typed
from merge.settings import check_count, check_together, checked
from merge.stack import Order
from merge.table import METHODS, Parameter
from parallel.errors import InputError
from parallel.family import Family
from parallel.rows import Tensor


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A recipe worked out for the models at hand."""

    config: Mapping[str, Any]
    """Of the merged model."""
    orders: Mapping[str, Order]
    """By tensor, in the family's order, without aliases."""
    unused: tuple[str, ...]
    """Settings that no tensor has, each with its line."""


@dataclass(frozen=True, kw_only=True)
class _Tensors:
    """Tensors that have the same inputs."""

    part: Slice
    inputs: tuple[Input, ...]
    base: str | None


@dataclass
class _Resolver:
    recipe: Recipe
    models: Mapping[str, int]
    sources: Sequence[Source]
    used: set[int] = field(default_factory=set)
    """id of every Setting that some tensor has."""
    same: Any = ()
    """The settings of the last tensor."""

    @cached_property
    def varies(self) -> bool:
        """Whether tensors differ in their settings."""
        parts = self.recipe.slices
        places = [self.recipe.parameters, self.recipe.module, *(part.parameters for part in parts)]
        places += [one.parameters for part in parts for one in part.inputs]
        settings = [setting for place in places for given in place.values() for setting in given.settings]
        return len(parts) > 1 or any(setting.gradient or setting.filter is not None for setting in settings)

    def slices(self) -> list[_Tensors]:
        """Return the slices with all their layers written out, and the base among the inputs where it is one."""
        takes = METHODS[self.recipe.method]
        found = []
        for part in self.recipe.slices:
            base = part.base or self.recipe.base
            inputs = [self._with_layers(one) for one in part.inputs]
            if takes.base == "needed" and base is None:
                raise self._error(part.line, f"{self.recipe.method} needs a base_model: what all models started from")
            if base is not None and base not in [one.model for one in inputs]:
                line = self.recipe.lines.get("base_model", part.line)
                if self.recipe.whole:
                    inputs.append(self._with_layers(Input(model=base, line=line)))
                elif takes.base != "none":  # else it gives the config and the tokenizer alone
                    raise self._error(part.line, f"the slice has no layers of the base model {base}")
            names = [one.model for one in inputs]
            if twice := next((one for one in inputs if names.count(one.model) > 1), None):
                raise self._error(twice.line, f"{twice.model} is given twice among what is merged into one")
            lengths = {one.layers[1] - one.layers[0] for one in inputs if one.layers}
            if len(lengths) > 1:
                spans = ", ".join(f"{one.model} {list(one.layers or ())}" for one in inputs)
                raise self._error(part.line, f"as many layers of each model are needed, given are {spans}")
            if takes.base == "none":
                base = None
            try:
                check_count(self.recipe.method, len([name for name in names if name != base]))
            except InputError as error:
                raise self._error(part.line, str(error)) from None
            found.append(_Tensors(part=part, inputs=tuple(inputs), base=base))
        return found

    def _with_layers(self, one: Input) -> Input:
        layers = self.sources[self.models[one.model]].config["num_hidden_layers"]
        span = one.layers or (0, layers)
        if span[1] > layers:
            raise self._error(one.line, f"layer_range {list(span)}: {one.model} has {layers} layers")
        return Input(model=one.model, line=one.line, layers=span, parameters=one.parameters)

    def order(self, name: str, tensors: _Tensors, t: float, names: Sequence[str]) -> Order:
        """Return how a tensor is made.

        Args:
            names: of the inputs' tensors; an alias is read from its owner, but filters see its own name.
            t: how far in its slice its layer is, 0 to 1.
        """
        operands, base = [], None
        for one, their in zip(tensors.inputs, names, strict=True):
            number = self.models[one.model]
            info = self.sources[number].infos.get(their)
            operand = Operand(model=number, name=info.tied_to if info is not None and info.tied_to else their)
            if one.model == tensors.base:
                base = operand
            else:
                operands.append(operand)
        if not self.same or self.varies:
            self.same = self._settings(name, tensors, t, names)
        shared, each = self.same
        return Order(operands=tuple(operands), base=base, shared=shared, each=each)

    def _settings(
        self, name: str, tensors: _Tensors, t: float, names: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        """Return the method's parameters for a tensor: those of all models, and those that each has of its own."""
        recipe, part = self.recipe, tensors.part
        takes = METHODS[recipe.method].parameters
        outer = (part.parameters, recipe.module, recipe.parameters)
        shared = {
            key: self._value(parameter, key, outer, name, t, part.line)
            for key, parameter in takes.items()
            if not parameter.each
        }
        merged = [(one, their) for one, their in zip(tensors.inputs, names, strict=True) if one.model != tensors.base]
        each = {
            key: tuple(
                self._value(parameter, key, (one.parameters, *outer), their, t, one.line, one.model)
                for one, their in merged
            )
            for key, parameter in takes.items()
            if parameter.each
        }
        try:
            check_together(recipe.method, shared, each)
        except InputError as error:
            raise self._error(part.line, f"{name}: {error}") from None
        return shared, each

    def _value(
        self,
        parameter: Parameter,
        key: str,
        places: Sequence[Parameters],
        name: str,
        t: float,
        line: int,
        model: str | None = None,
    ) -> Any:
        for given in (place[key] for place in places if key in place):
            for setting in given.settings:
                if setting.filter is None or setting.filter in name:
                    self.used.add(id(setting))
                    return self._at(setting, given, parameter, t)
        if parameter.default is None and not parameter.optional:
            whose = f" for {model}" if model else ""
            raise self._error(line, f"{self.recipe.method} needs a {key}{whose}; {name} has none")
        return parameter.default

    def _at(self, setting: Setting, given: Given, parameter: Parameter, t: float) -> Any:
        if setting.gradient and parameter.kind is str:
            raise self._error(setting.line, f"{given.name} is a list: a folder is needed")
        values = []
        for item in setting.values:
            try:
                values.append(checked(given.name, typed(item, parameter), parameter))
            except InputError as error:
                raise self._error(item.line, str(error)) from None
        place = t * (len(values) - 1)
        if parameter.kind is not float:
            return values[int(place)]
        if None in values:
            if setting.gradient:
                raise self._error(setting.line, f"{given.name}: nothing is given among the values of a list")
            return None
        first = int(place)
        share = place - first
        return (1 - share) * values[first] + share * values[min(first + 1, len(values) - 1)]

    def check_there(self, one: Input, their: str, name: str) -> None:
        """Refuse a model that lacks what a tensor of the merged model is made from."""
        if their not in self.sources[self.models[one.model]].infos:
            there = "" if their == name else f" as {name}"
            raise self._error(one.line, f"{one.model} lacks the tensor {their}, which the merged model has{there}")

    def check_used(self, one: Input, used: Collection[str], ends: tuple[bool, bool]) -> None:
        """Refuse a model with a tensor in a slice that the merged model has no place for.

        Args:
            used: the model's tensors that are read in the slice.
            ends: whether it is the first slice, which has what is before the layers, and the last.
        """
        source = self.sources[self.models[one.model]]
        tensors = source.family.tensors(source.config)
        last = _last(tensors)
        for number, (name, tensor) in enumerate(tensors.items()):
            if tensor.layer is None:
                inside = ends[0] if number < last else ends[1]
            else:
                inside = one.layers is None or one.layers[0] <= tensor.layer < one.layers[1]
            if inside and tensor.tied_to is None and name not in used:
                raise self._error(one.line, f"{one.model} has the tensor {name}, which the merged model lacks")

    def _error(self, line: int, problem: str) -> InputError:
        return InputError(f"{self.recipe.file}:{line}: {problem}")


def resolve(recipe: Recipe, models: Mapping[str, int], sources: Sequence[Source]) -> Resolved:
    """Work out a recipe.

    Args:
        models: numbers of the sources, by what the recipe calls them.

    Raises:
        InputError: layers that a model has not, models that do not fit, a value that is missing: file and line.
    """
    resolver = _Resolver(recipe=recipe, models=models, sources=sources)
    slices = resolver.slices()
    like = sources[models[recipe.base or slices[0].inputs[0].model]]
    config = _config(like, slices, sources, models)
    family = like.family
    tensors = family.tensors(config)
    starts = [0]
    for part in slices:
        starts.append(starts[-1] + _length(part))
    last = _last(tensors)
    orders = {}
    used: dict[tuple[int, str], set[str]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if tensor.tied_to is not None:
            continue
        if tensor.layer is None:
            where, inside = (0, 0) if number < last else (len(slices) - 1, 0)
            part = slices[where]
            t = 0.0
        else:
            where = max(place for place, start in enumerate(starts[:-1]) if start <= tensor.layer)
            part, inside = slices[where], tensor.layer - starts[where]
            t = inside / (_length(part) - 1) if _length(part) > 1 else 1.0
        names = [_name_in(family, tensor, one, inside) for one in part.inputs]
        for one, their in zip(part.inputs, names, strict=True):
            resolver.check_there(one, their, name)
            used.setdefault((where, one.model), set()).add(their)
        orders[name] = resolver.order(name, part, t, names)
    for where, part in enumerate(slices):
        for one in part.inputs:
            ends = (where == 0, where == len(slices) - 1)
            resolver.check_used(one, used.get((where, one.model), set()), ends)
    return Resolved(config=config, orders=orders, unused=_unused(resolver))


def _last(tensors: Mapping[str, Tensor]) -> int:
    """Return the place of the last layers' last tensor."""
    return max(number for number, tensor in enumerate(tensors.values()) if tensor.layer is not None)


def _length(part: _Tensors) -> int:
    first = part.inputs[0].layers
    assert first is not None, "layers are not written out"
    return first[1] - first[0]


def _config(
    like: Source, slices: Sequence[_Tensors], sources: Sequence[Source], models: Mapping[str, int]
) -> dict[str, Any]:
    """Return the merged model's config: that of the base or first model, with the layers of the slices."""
    config = {**like.config, "num_hidden_layers": sum(_length(part) for part in slices)}
    kinds: list[Any] = []  # of attention, where a config lists them layer by layer
    for part in slices:
        own = sources[models[part.base or part.inputs[0].model]].config.get("layer_types")
        span = next(one.layers for one in part.inputs if one.model == (part.base or part.inputs[0].model))
        kinds += own[slice(*(span or ()))] if own else []
    if config.get("layer_types"):
        config["layer_types"] = kinds
    inputs = {models[one.model] for part in slices for one in part.inputs}
    ties = [sources[number].family.is_tied(sources[number].config) for number in inputs]
    if like.family.is_tied(config) and not all(ties):  # a head of its own somewhere: the merged one has one as well
        config["tie_word_embeddings"] = False
    return config


def _name_in(family: Family, tensor: Tensor, one: Input, inside: int) -> str:
    """Return the name of a model's tensor for one of the merged model."""
    if tensor.layer is None or one.layers is None or one.layers[0] + inside == tensor.layer:
        return tensor.name
    return family.in_layer(tensor, one.layers[0] + inside)


def _unused(resolver: _Resolver) -> tuple[str, ...]:
    """Return a line for each setting that no tensor has."""
    recipe = resolver.recipe
    places = [recipe.parameters, recipe.module]
    for part in recipe.slices:
        places += [part.parameters, *(one.parameters for one in part.inputs)]
    found = []
    for given in (given for place in places for given in place.values()):
        for setting in given.settings:
            if id(setting) not in resolver.used and not METHODS[recipe.method].parameters[given.name].unused:
                what = f"filter {setting.filter!r}" if setting.filter else "this value"
                found.append((setting.line, f"{recipe.file}:{setting.line}: {given.name}: {what} applies to no tensor"))
    return tuple(line for _, line in sorted(found))
