"""The benchmark's own arithmetic, and one round of it for real."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th

from benchmarks.bare_loop import BareLoop
from benchmarks.peers import count_tokens, steps_per_row
from benchmarks.throughput import Found, compare, ratio, table, take
from benchmarks.timing import Timing
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent


def test_tokens_count_up_to_the_first_end() -> None:
    ends = th.tensor([0, 9])
    assert count_tokens(th.tensor([[1, 2, 9, 4, 0], [1, 2, 3, 4, 5]]), ends) == 3 + 5
    assert count_tokens(th.tensor([[0, 2, 9, 4, 0]]), ends) == 1


def test_a_rollout_has_the_mean_length_of_a_completion() -> None:
    assert steps_per_row(WORKLOADS["tiny"]) == 32
    mean = sum(0.95 ** (t - 1) for t in range(1, 65))  # each token is written with that chance
    assert steps_per_row(WORKLOADS["variable"]) == round(mean)


def test_ratios_are_taken_round_by_round() -> None:
    found = {
        "bare loop": Found({r: Timing(10, s, s / 2, s / 2) for r, s in ((0, 9), (1, 1), (2, 2))}),
        "TokenPPO": Found({r: Timing(20, s, s / 2, s / 2) for r, s in ((0, 1), (1, 1), (2, 2))}),
        "stock SB3 PPO": Found({0: Timing(10, 90.0, 50.0, 40.0)}),
        "TRL GRPO": Found(error="ImportError: no trl"),
    }
    compare(found)
    assert ratio(found, "TokenPPO") == 2
    assert ratio(found, "stock SB3 PPO") == pytest.approx(0.1)
    assert "| stock SB3 PPO (first iteration only) |" in table(found)
    assert "| 2.00 |" in table(found) and "no trl" in table(found)


def test_a_peer_from_which_nothing_comes_is_given_up() -> None:
    pipe, other = multiprocessing.Pipe()
    silent, dead = Found(), Found()
    assert take(pipe, silent, 0.1) is None and "no iteration within" in silent.error
    other.close()
    assert take(pipe, dead, 0.1) is None and "died" in dead.error


def test_prompts_have_the_same_number_of_tokens() -> None:
    workload = WORKLOADS["tiny"]
    ids = workload.tokenizer()(workload.prompts())["input_ids"]
    assert {len(row) for row in ids} == {16} and len({tuple(row) for row in ids}) == 32


def test_the_bare_loops_advantages_by_hand() -> None:
    loop = BareLoop.__new__(BareLoop)
    rewards = th.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    values = th.tensor([[0.1, 0.2, 0.3], [0.5, 0.5, 9.0]])
    mask = th.tensor([[True, True, True], [True, True, False]])
    third = 1 - 0.3
    second = 0.3 - 0.2 + 0.95 * third
    first = 0.2 - 0.1 + 0.95 * second
    other = 2 - 0.5
    expected = th.tensor([[first, second, third], [0.5 - 0.5 + 0.95 * other, other, 0.0]])
    th.testing.assert_close(loop.gae(rewards, values, mask), expected)


@pytest.mark.slow
def test_one_round_for_real(tmp_path) -> None:
    line = "--workloads variable --rounds 1 --threads 1 --peers"
    peers = ["bare loop", "TokenPPO", "TokenPPO, cut episodes", "generate"]
    command = [sys.executable, "-m", "benchmarks.throughput", *line.split(), *peers]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, timeout=250)
    found = json.loads((tmp_path / "throughput.json").read_text())["workloads"]["variable"]
    assert {peer: facts["error"] for peer, facts in found.items()} == dict.fromkeys(peers)
    for facts in found.values():
        assert set(facts["timings"]) == {"0", "1"}
        timing = facts["timings"]["1"]
        assert timing["tokens"] > 300 and timing["seconds"] > 0 and facts["memory"] > 0
    report = (tmp_path / "throughput.md").read_text()
    assert "| TokenPPO |" in report and (tmp_path / "throughput.png").stat().st_size > 5000
