"""Going on with a training of PPO that was stopped: the settings and files it began with."""

import json
import shutil
from collections.abc import Container
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from configs.settings import PPO, Common

if TYPE_CHECKING:
    from stable_baselines3.common.logger import KVWriter


FREE = (
    "total_timesteps", "save_every", "checkpoint_every", "checkpoint_keep", "stop_on", "resume",
    "threads",
)  # fmt: skip
"""Settings that may be others when a training of PPO goes on."""


def remember_settings(common: Common, settings: PPO, folder: Path) -> None:
    """Write down a training's settings, beside its checkpoints, for `as_begun`."""
    import torch as th

    from reward_models.atomic import atomic_file

    began = {
        "common": {"seed": common.seed, "dtype": common.dtype, "threads": th.get_num_threads()},
        "ppo": {**asdict(settings), "resume": None},
    }
    with atomic_file(folder / "settings.json") as aside:
        aside.write_text(json.dumps(began, indent=1, default=str), encoding="utf-8")


def as_begun(common: Common, settings: PPO, asked: Container[str]) -> PPO:
    """Return the settings that a training began with; those of `common` are set in place.

    Args:
        common: As the command line gives it.
        settings: As the command line gives it.
        asked: Names of the settings that the command line says itself, which are no defaults.

    Raises:
        ValueError: If one of those is not what the training began with, and has to be.
    """
    assert settings.resume is not None
    place = settings.resume / "ppo.unfinished" / "checkpoints"
    if not place.exists():
        place = settings.resume / "checkpoints"
    if not (place / "settings.json").exists():
        raise FileNotFoundError(
            "resume: expected a run folder with checkpoints of PPO, which one process makes and "
            f"several do not (docs/guarantees.md), got '{settings.resume}'"
        )
    began = json.loads((place / "settings.json").read_text(encoding="utf-8"))
    other = []
    for given, stored in ((settings, began["ppo"]), (common, began["common"])):
        for part in fields(given):
            if part.name not in stored:
                continue
            value, was = getattr(given, part.name), stored[part.name]
            is_asked, is_free = part.name in asked, part.name in FREE
            if is_asked and not is_free and str(value) != str(was):
                other.append(f"{part.name} is {was}, not {value}")
            if not (is_asked and is_free):
                path = was is not None and "Path" in str(part.type)
                setattr(given, part.name, Path(was) if path else was)
    if other:
        raise ValueError(
            f"resume: expected the settings that this training began with, where {', '.join(other)}"
        )
    return settings


def to_go_on_from(run_folder: Path, settings: PPO) -> Path:
    """Return a run's newest whole checkpoint, in the folder of its unfinished results.

    Results that are in their place already are copied there: those of a finished run, and those
    that a crash came behind while they were put in place.

    Raises:
        ValueError: If total_timesteps leave nothing to do.
    """
    from agents import newest_whole

    unfinished = run_folder / "ppo.unfinished"
    there = unfinished / "checkpoints"
    is_there = there.exists()
    checkpoint = newest_whole(there if is_there else run_folder / "checkpoints")
    at_end, n_tokens = how_far(checkpoint)
    is_done = at_end and not is_there and (run_folder / "stages/ppo.json").exists()
    if n_tokens >= settings.total_timesteps and (is_done or not at_end):
        raise ValueError(
            f"resume: {run_folder} is {'finished' if is_done else 'stopped'}, with {n_tokens} "
            f"tokens: expected more than that as total_timesteps, got {settings.total_timesteps}"
        )
    unfinished.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", "doctor.jsonl", "tensorboard", "checkpoints"):
        if (run_folder / name).exists() and not (unfinished / name).exists():
            copy_whole(run_folder / name, unfinished / name)
    return there / checkpoint.name


def how_far(checkpoint: Path) -> tuple[bool, int]:
    """Say whether a checkpoint is of its training's end, and the tokens of all whole rollouts."""
    from agents.checkpoint import read_state

    state = read_state(checkpoint)
    progress, rollout = state["progress"], state["rollout"]
    n_tokens: int = progress["num_timesteps"] if rollout is None else rollout["tokens_before"]
    return rollout is None and n_tokens >= progress["_total_timesteps"], n_tokens


def copy_whole(source: Path, place: Path) -> None:
    """Copy a file or folder, which appears at its place when it is whole."""
    aside = place.with_name(f"{place.name}.copy")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if source.is_dir():
        shutil.copytree(source, aside / source.name)
    else:
        shutil.copy2(source, aside)
    (aside / source.name).rename(place)
    aside.rmdir()


def appending(path: Path) -> "KVWriter":
    """Return SB3's writer of JSON lines, which goes on with a file rather than empty it."""
    from stable_baselines3.common.logger import JSONOutputFormat

    class Appending(JSONOutputFormat):
        def __init__(self) -> None:
            self.file = path.open("a", encoding="utf-8")

    return Appending()
