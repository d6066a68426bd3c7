"""What is asked of a model's files before they are loaded: they may come from anywhere.

`reward_models.model_files` has the same; the two packages do not import one another.
"""

import json
from pathlib import Path
from typing import Any

SAFELY: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""Arguments of `from_pretrained`: no pickle is opened, and no code that a folder brings is run."""


def check_model_folder(path: str | Path) -> None:
    """Refuse a folder whose files point out of it, or whose adapters are a pickle.

    Args:
        path: A folder; a hub id, of which there is nothing to look at, passes.

    Raises:
        ValueError: If it is such a folder.
    """
    folder = Path(path)
    there = {path.name for path in folder.glob("adapter_*")}
    if "adapter_config.json" in there and "adapter_model.safetensors" not in there:
        raise ValueError(f"{folder}: expected adapters in adapter_model.safetensors, got none")
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index}: expected a list of weight files ({error})") from error
        for name in names:
            require_plain_name(name, index)


def require_plain_name(name: object, source: Path) -> None:
    """Refuse a name, read from `source`, that is not simply one of a file or folder beside it.

    Raises:
        ValueError: If it has a "/" in it, say.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not plain:
        raise ValueError(f"{source}: expected the name of a file or folder beside it, got {name!r}")
