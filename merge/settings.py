"""Values of a merge method's parameters: checked, and in the form that an Order has them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge.table import METHODS, Parameter
from parallel.errors import InputError, one_of

MOST = 1e30
"""What parameters stay below, in size: products and quotients of them have to fit float32."""


def settings_of(method: str, given: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Return the values of a method's parameters, as an Order has them."""
    takes = METHODS[method].parameters
    shared, each = {}, {}
    for name in given:
        if name not in takes:
            raise InputError(one_of(f"parameter of {method}", name, takes))
    for name, parameter in takes.items():
        value = given.get(name, parameter.default)
        if not parameter.each:
            shared[name] = checked(name, value, parameter)
            continue
        several = isinstance(value, Sequence) and not isinstance(value, str)
        values = list(value) if several else [value] * len(labels)
        if len(values) != len(labels):
            raise InputError(f"{name}: {len(values)} values given for {len(labels)} models")
        pairs = zip(values, labels, strict=True)
        each[name] = tuple(checked(name, one, parameter, whose=f" for {label}") for one, label in pairs)
    check_together(method, shared, each)
    return {"shared": shared, "each": each}


def checked(name: str, value: Any, parameter: Parameter, *, whose: str = "") -> Any:
    """Return a parameter's value as its kind.

    Raises:
        InputError: it is missing, of another kind, or out of range.
    """
    if value is None:
        if parameter.optional or parameter.unused:
            return None
        raise InputError(f"{name}: a {'folder' if parameter.kind is str else 'value'} is needed{whose}")
    if parameter.kind is str:
        if not isinstance(value, str) or not value:
            raise InputError(f"{name} is {value!r}: a folder is needed")
        return value
    if parameter.kind is bool or isinstance(value, bool):
        if parameter.kind is not bool or not isinstance(value, bool):
            raise InputError(
                f"{name} is {value!r}: {'true or false' if parameter.kind is bool else 'a number'} is needed"
            )
        return value
    if not isinstance(value, int | float) or not math.isfinite(value) or parameter.kind(value) != value:
        raise InputError(f"{name} is {value}: a {'whole' if parameter.kind is int else 'finite'} number is needed")
    if abs(value) >= MOST:
        raise InputError(f"{name} is {value}: that is too much for float32; allowed is less than {MOST:g} in size")
    if not parameter.low <= value <= parameter.high:
        allowed = (
            f"{parameter.low:g} to {parameter.high:g}" if parameter.high < math.inf else f"{parameter.low:g} or more"
        )
        raise InputError(f"{name} is {value}: allowed is {allowed}")
    return parameter.kind(value)


def check_together(method: str, shared: Mapping[str, Any], each: Mapping[str, Sequence[Any]]) -> None:
    """Refuse values that make no sense beside each other."""
    weights = each.get("weight", ())
    nothing = weights and abs(sum(weights)) <= 1e-9 * sum(map(abs, weights))
    if nothing and (method, shared.get("normalize")) == ("linear", True):
        raise InputError(f"weights {list(weights)} add up to 0: nothing to divide by; give others or normalize: false")
    if nothing and method in ("fisher", "regmean"):
        raise InputError(f"weights {list(weights)} add up to 0: one model at least has to count")
    if nothing and shared.get("normalize_weights"):
        raise InputError(f"weights {list(weights)} add up to 0: give others or normalize_weights: false")
    if method in ("della", "della_linear"):
        for density, epsilon in zip(each["density"], each["epsilon"], strict=True):
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise InputError(f"density {density} +- epsilon {epsilon}: both ends have to be between 0 and 1")


def check_count(method: str, count: int) -> None:
    """Refuse a number of models that a method does not take; a base is not counted unless it is one of them."""
    takes = METHODS[method]
    if count < takes.least or (takes.most is not None and count > takes.most):
        more = "" if takes.most == takes.least else " or more" if takes.most is None else f" to {takes.most}"
        beside = " beside the base" if takes.base == "needed" else ""
        raise InputError(f"merge method {method} takes {takes.least}{more} models{beside}, not {count}")
