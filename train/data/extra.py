"""Libraries of the extra `data`, which cleaning alone needs: imported when used."""

import importlib
from typing import Any

from parallel.errors import InputError


def optional(name: str) -> Any:
    """Import a library of the extra.

    Raises:
        InputError: it is not installed; the line says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name.partition('.')[0]} is not installed: pip install growmerge[data]") from None
