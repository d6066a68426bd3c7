"""Exact resume: a training that is stopped and goes on is, bit for bit, one that never was."""

from pathlib import Path

import pytest
from checkpoint_fixtures import (
    Watch,
    decay,
    differences,
    make_env,
    make_model,
    result,
    run,
)

from agents import TokenPPO

TOTAL = 80
"""Tokens: four rollouts of 24, the last of which goes beyond it."""


def never_stopped(folder: Path, stops: list[int], at: str = "token", **changes):
    make = changes.pop("make_env", make_env)
    model = make_model(make(), **changes)
    callback = Watch(folder, stops, at)
    rows = run(model, TOTAL, callback)
    return result(model, folder / "end", rows, callback)


def gone_on(folder: Path, stop: int, algorithm=TokenPPO, make_env=make_env, **changes):
    model = algorithm.load(folder / str(stop), make_env(), "cpu", learning_rate=decay, **changes)
    callback = Watch(folder / "again", [])
    rows = run(model, TOTAL, callback, go_on=True)
    return result(model, folder / "again" / str(stop), rows, callback)


def test_a_run_goes_on_as_if_it_never_had_stopped(tmp_path) -> None:
    stops = [3, 8, 13, 31]  # in mid-rollout, at a rollout's start, and in the last one
    never = never_stopped(tmp_path, stops)
    assert len(never["tokens"]) == 32 and len(never["rows"]) == 4
    for stop in stops:
        assert differences(never, gone_on(tmp_path, stop)) == [], stop
