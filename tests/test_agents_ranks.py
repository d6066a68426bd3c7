"""Two processes against one: real ones, started by torchrun, connected by gloo."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from transformers import AutoModelForCausalLM

from agents import TokenPPO
from agents.sequences import deal

pytestmark = pytest.mark.xdist_group("ranks")  # one worker: the processes are started once

TESTS = Path(__file__).parent
SAME = ("plain", "micro", "uneven", "warmup", "lora", "shard", "shard-all")


def launch(folder: Path, *tasks: str, n: int = 2) -> subprocess.CompletedProcess:
    start = [sys.executable]
    if n > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [*start, str(TESTS / "ranks_script.py"), str(folder), *tasks]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=TESTS.parent)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What one process and what two leave."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for folder, n in ((one, 1), (two, 2)):
        done = launch(folder, *SAME, "several", "stop", "look", n=n)
        assert done.returncode == 0, done.stderr[-3000:]
    return one, two


@pytest.mark.parametrize("task", [*SAME, "several"])
def test_weights_and_gradients_are_equal_on_all_ranks(folders, task) -> None:
    _, two = folders
    for what in ("weights", "gradients"):
        a, b = (th.load(two / task / f"{what}-{rank}.pt") for rank in (0, 1))
        assert th.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("task", SAME)
def test_two_ranks_with_half_the_rows_take_the_step_of_one(folders, task) -> None:
    a, b = (th.load(folder / task / "weights-0.pt") for folder in folders)
    th.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)
    a, b = (th.load(folder / task / "gradients-0.pt") for folder in folders)
    th.testing.assert_close(b, a, atol=1e-5, rtol=1e-3)
    assert a.abs().max() > 1e-3


@pytest.mark.parametrize("task", SAME)
def test_what_is_logged_is_of_all_ranks(folders, task) -> None:
    a, b = (json.loads((folder / task / "facts-0.json").read_text()) for folder in folders)
    assert len(a["rows"]) == len(b["rows"]) > 2 and a["steps"] == b["steps"]
    for row, other in zip(a["rows"], b["rows"], strict=True):
        assert row.keys() == other.keys()
        for key in row:
            # The exact KL is over an eighth of each rank's sequences.
            if key not in ("time/fps", "rollout/ref_kl_per_token_exact"):
                assert other[key] == pytest.approx(row[key], rel=2e-3, abs=1e-5), key
    assert a["tokens"] == b["tokens"] > 90 and b["ep_rew"] == pytest.approx(a["ep_rew"])
    assert sorted(e[:2] for e in a["episodes"]) == sorted(e[:2] for e in b["episodes"])
    assert len({row["train/kl_coef"] for row in a["rows"] if "train/kl_coef" in row}) > 1


def test_rank_0_alone_writes(folders) -> None:
    _, two = folders
    assert not (two / "plain" / "facts-1.json").exists()
    lines = (two / "plain" / "samples.jsonl").read_text().splitlines()
    one = (folders[0] / "plain" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == len(one)


def test_what_two_ranks_saved_loads_in_one_process(folders) -> None:
    _, two = folders
    weights = th.load(two / "plain" / "weights-0.pt")
    model = TokenPPO.load(two / "plain" / "model.zip", device="cpu")
    mine = th.cat([t.flatten() for _, t in sorted(model.policy.state_dict().items())])
    assert th.equal(mine.float(), weights)
    assert model.policy.optimizer.state_dict()["state"]
    lm = AutoModelForCausalLM.from_pretrained(two / "plain" / "policy")
    assert th.equal(lm.lm_head.weight, model.policy.lm.lm_head.weight)


def test_early_stopping_and_callbacks_decide_for_all(folders) -> None:
    _, two = folders
    for rank in (0, 1):
        assert (two / "stop" / f"stopped-{rank}").read_text() == "2"  # 8 steps, and 2 of the next
    names = sorted(p.name for p in (two / "stop" / "checkpoints").iterdir())
    assert len(names) == 2
    rows = json.loads((two / "several" / "facts-0.json").read_text())["rows"]
    assert max(row.get("train/approx_kl", 0) for row in rows) > 1e-3


def test_rank_0_alone_uses_and_saves_a_sharded_model(folders) -> None:
    one, two = (folder / "look" for folder in folders)
    found = json.loads((two / "found-0.json").read_text())
    assert found == json.loads((one / "found-0.json").read_text()) and len(found) == 2
    assert json.loads((two / "found-1.json").read_text()) == {}
    for name in ("within-3", "within-12", "model"):
        a, b = (
            TokenPPO.load(folder / f"{name}.zip", device="cpu").policy.state_dict()
            for folder in (one, two)
        )
        for key in a:
            th.testing.assert_close(b[key], a[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_rank_that_dies_ends_the_others_with_its_name(tmp_path, how) -> None:
    start = time.time()
    done = launch(tmp_path, how)
    assert done.returncode != 0 and time.time() - start < 60
    assert "local_rank: 1" in done.stderr
    assert ("-9" if how == "kill" else "no more memory on this one") in done.stderr


@pytest.mark.parametrize("n_parts", [1, 2, 5, 9, 12])
def test_deal_makes_as_many_parts_as_told_none_empty(n_parts) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n_tokens = rng.integers(1, 40, size=9)
        n_tokens[rng.integers(9)] = 500
        parts = deal(rng.permutation(9), n_tokens, n_parts)
        assert len(parts) == min(n_parts, 9) and all(len(part) for part in parts)
        assert sorted(np.concatenate(parts)) == list(range(9))
