"""The run folder: what a stage finds there, and how it puts its own part in place."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from configs.settings import Common, Run
from stages.process import peak_memory, process_number, say, set_up


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def folder_of(common: Common) -> Path:
    """Return the run folder, which `main` has set."""
    assert common.run is not None
    return common.run


def left_by(stage_name: str, folder: Path) -> Path:
    """Return what an earlier stage left, or say which stage is missing."""
    if not folder.exists():
        raise FileNotFoundError(
            f"expected {folder}, which `python train.py {stage_name} --run {folder.parent}` makes; "
            "run that stage first, or name another input (see --help)"
        )
    return folder


@contextmanager
def stage(common: Common, name: str, go_on: bool = False) -> Iterator[tuple[dict[str, Any], Path]]:
    """Announce a stage, put its results in place when it ends well, and write down its facts.

    Until then they are in `<name>.unfinished`, which is what a failed stage leaves behind, and
    what one that goes on (`go_on`) begins with.

    Yields:
        A dict for facts, which goes to stages/<name>.json with the seconds that the stage took,
        and the folder to work in.
    """
    from reward_models.atomic import atomic_file

    if process_number() > 0:  # the first process does the bookkeeping
        set_up(common)
        yield {}, folder_of(common) / f"{name}.unfinished"
        return
    run_folder, unfinished = folder_of(common), folder_of(common) / f"{name}.unfinished"
    if not go_on:
        if any(unfinished.glob("checkpoints/step-*")) and not common.overwrite:
            raise FileExistsError(
                f"{unfinished} has checkpoints of a training that was stopped: go on with it by "
                f"`python train.py {name} --resume {run_folder}`, or pass --overwrite true"
            )
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    set_up(common)
    say(f"== {name}")
    start = time.time()
    facts: dict[str, Any] = {}
    try:
        yield facts, unfinished
        for made in MAKES[name]:
            if (unfinished / made).exists():
                put_in_place(unfinished / made, run_folder / made)
    finally:
        if not any(unfinished.iterdir()):
            unfinished.rmdir()
    facts["seconds"] = round(time.time() - start, 1)
    facts["peak_memory_gib"] = round(peak_memory() / 2**30, 2)
    (run_folder / "stages").mkdir(exist_ok=True)
    with atomic_file(run_folder / "stages" / f"{name}.json") as file:
        file.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"   {facts['seconds']:.0f} s, at most {facts['peak_memory_gib']:.1f} GiB so far")


def is_done(common: Common, name: str) -> bool:
    """Return whether a stage came to its end: its facts are written last."""
    return (folder_of(common) / "stages" / f"{name}.json").exists()


MAKES = {
    "sft": ("sft",),
    "reward": ("reward_model", "judge", "calibration.png"),
    "ppo": (
        "policy",
        "metrics.jsonl",
        "samples.jsonl",
        "doctor.jsonl",
        "tensorboard",
        "checkpoints",
    ),
    "evaluate": ("evaluation.json", "report.md", "curves.png"),
}
"""What each stage leaves in the run folder."""


def require_files(settings: Run) -> None:
    """Raise FileNotFoundError if a file that some stage is told to read is not there."""
    for part in fields(settings):
        for name, value in vars(getattr(settings, part.name)).items():
            if isinstance(value, Path) and not value.exists():
                raise FileNotFoundError(f"{part.name}.{name}: expected a file, got '{value}'")


def refuse_to_replace(common: Common, name: str) -> None:
    """Raise FileExistsError if a stage, or one of a whole run, would replace results."""
    names = list(MAKES) if name == "run" else [name]
    paths = [folder_of(common) / made for stage in names for made in MAKES.get(stage, ())]
    there = [str(path) for path in paths if path.exists()]
    if there and not common.overwrite:
        stages = list(MAKES) if name == "run" else list(MAKES)[list(MAKES).index(name) :]
        missing = [
            stage_name
            for stage_name in stages
            if not any((folder_of(common) / part).exists() for part in MAKES[stage_name])
        ]
        go_on = f"python train.py {missing[0]} --run {folder_of(common)}" if missing else ""
        if name == "ppo" and (folder_of(common) / "checkpoints").exists():
            more = f"ppo --resume {folder_of(common)} --total_timesteps MORE"
            go_on = " or ".join(["python train.py " + more, *([go_on] if missing else [])])
        raise FileExistsError(
            f"{', '.join(there)} exist already: choose another --run folder, or pass "
            "--overwrite true" + (f"; the run could go on with: {go_on}" if go_on else "")
        )


def put_in_place(new: Path, place: Path) -> None:
    """Move a file or folder to its place; what was there goes only then."""
    old = new.with_name(new.name + ".replaced")
    if place.exists():
        place.rename(old)
    new.rename(place)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:  # str.splitlines would split within a line's texts
        return [line.rstrip("\n") for line in file]


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    from reward_models.atomic import atomic_file

    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
