"""Models by their names and folders, and what they were made from."""

import hashlib
import json
from pathlib import Path


def digest_of(source: str | Path) -> str:
    """Return a digest of a model's folder; a hub id stands for itself."""
    folder, digest = Path(source), hashlib.sha256()
    if not folder.is_dir():
        return str(source)
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in CARD)
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
    return digest.hexdigest()[:16]


CARD = ("README.md", "curves.png")
"""Of a policy's folder, what is written about it; `evaluate` completes it."""


def named_model(name: str) -> str:
    """Return the folder of an asset by its short name; any other name is a folder or hub id."""
    from reward_models import assets

    known = {"smollm2": assets.smollm2, "minilm": assets.minilm}
    return str(known[name]()) if name in known else name


def base_of(lm: str) -> str:
    """Return the hub id of what a model was made from; if that is unknown, its folder's name."""
    from huggingface_hub import ModelCard

    folder = Path(lm)
    if not folder.is_dir():
        return folder.stem if folder.suffix == ".json" else HUB_IDS.get(lm, lm)
    made_by = {"sft": "sft", "reward_model": "reward"}.get(folder.name)
    facts, card = folder.parent / "stages" / f"{made_by}.json", folder / "README.md"
    if facts.exists():
        made_from = json.loads(facts.read_text(encoding="utf-8")).get("model")
        if made_from == "sft":
            made_from = str(folder.parent / "sft")
        return base_of(made_from) if made_from else folder.name
    if card.exists() and (known := ModelCard.load(card).data.base_model):
        return known if isinstance(known, str) else known[0]
    return folder.name


HUB_IDS = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
"""Of the models that have a short name."""
