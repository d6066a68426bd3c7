"""Plain values as JSON and back, exactly: numbers, text, lists, dicts, tuples, NumPy's.

Floats keep every bit (Python writes the shortest text that reads back the same); NaN and the
infinities are written as Python's json does.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

TAG = "__is__"


def to_json(value: Any, place: str = "state") -> Any:
    """Return JSON types for a value; arrays, scalars of NumPy and tuples are marked as such.

    Raises:
        TypeError: If there is something else in it, with its place.
    """
    if isinstance(value, np.generic):
        return {TAG: "scalar", "dtype": value.dtype.name, "value": value.item()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {TAG: "array", "dtype": value.dtype.name, "value": value.tolist()}
    if isinstance(value, tuple):
        return {TAG: "tuple", "value": [to_json(x, f"{place}[{i}]") for i, x in enumerate(value)]}
    if isinstance(value, list | deque):
        return [to_json(x, f"{place}[{i}]") for i, x in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_json(x, f"{place}.{key}") for key, x in value.items()}
    raise TypeError(f"{place}: expected what JSON can hold, got {type(value).__name__}")


def from_json(value: Any) -> Any:
    """Return the value that `to_json` was given."""
    if isinstance(value, list):
        return [from_json(x) for x in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(TAG)
    if kind == "tuple":
        return tuple(from_json(x) for x in value["value"])
    if kind == "array":
        return np.array(value["value"], dtype=value["dtype"])
    if kind == "scalar":
        return np.dtype(value["dtype"]).type(value["value"])
    return {key: from_json(x) for key, x in value.items()}
