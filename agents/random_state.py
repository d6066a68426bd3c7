"""The states of the global random generators: Python's, NumPy's, torch's on CPU and GPUs.

Those of environments are the environments' own (`agents.env_state`).
"""

import random
from typing import Any

import numpy as np
import torch as th

from agents.json_state import from_json, to_json


def random_states() -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    """Return the states as JSON and tensors."""
    numpy_state: Any = np.random.get_state(legacy=False)
    plain = {"python": to_json(random.getstate()), "numpy": to_json(numpy_state)}
    tensors = {"torch": th.get_rng_state()}
    if th.cuda.is_available():
        for i, state in enumerate(th.cuda.get_rng_state_all()):
            tensors[f"cuda.{i}"] = state
    return plain, tensors


def set_random_states(plain: dict[str, Any], tensors: dict[str, th.Tensor]) -> None:
    """Bring the generators to where `random_states` was called; GPUs only where there are any."""
    random.setstate(from_json(plain["python"]))
    np.random.set_state(from_json(plain["numpy"]))
    th.set_rng_state(tensors["torch"].clone())
    for name, state in tensors.items():
        device, _, number = name.partition(".")
        if device == "cuda" and th.cuda.is_available() and int(number) < th.cuda.device_count():
            th.cuda.set_rng_state(state.clone(), int(number))
