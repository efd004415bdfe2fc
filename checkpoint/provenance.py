"""Where a model comes from: its parents, all known ancestors, and whether it stems from a given base.

A record is what `growmerge.json` holds: `name`; `hash`, of the written data; `parents`, a list of {name, hash};
`ancestors`, every known hash above. A parent without a record has the hash None.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def descend(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `parents` and `ancestors` of what is made from the models with these records."""
    known = {
        value for record in records for value in (record.get("hash"), *record.get("ancestors", ())) if value is not None
    }
    return {
        "parents": [{"name": record.get("name"), "hash": record.get("hash")} for record in records],
        "ancestors": sorted(known),
    }


def stems_from(record: Mapping[str, Any], base: Mapping[str, Any]) -> bool | None:
    """Return whether a model is the base or descends from it; None if the records do not tell.

    They do not if the base has no hash, or if the model has no record or a parent without one.
    """
    wanted = base.get("hash")
    if wanted is None:
        return None
    if wanted == record.get("hash") or wanted in record.get("ancestors", ()):
        return True
    parents = record.get("parents")
    if parents is None or any(parent.get("hash") is None for parent in parents):
        return None
    return False


def by_name(record: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """Return what is said of the model that one was trained from, if nothing says that the base is that one.

    An imported model's record may hold `trained_from`: {name, grown, said_by}, what its publisher says of its start, by
    name and no hash. A base is the start if its own record has the name or, of a start that was grown first, if the
    base was grown from a model of the name.
    """
    start = record.get("trained_from")
    if not isinstance(start, Mapping):
        return None
    names = [base.get("name")]
    if start.get("grown"):
        names = [parent.get("name") for parent in base.get("parents", ())] if base.get("verb") == "grow" else []
    if start.get("name") in names:
        return None
    return f"{start.get('name')}{', grown' if start.get('grown') else ''} (says {start.get('said_by')})"
