"""What the tests of several processes run: `python ranks_script.py FOLDER TASK`, or by torchrun."""

import json
import os
import sys
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import torch as th
from conftest import letter_tokenizer, tiny_llama
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback

import agents.policy
from agents import SampleTextCallback, SavePretrainedCallback, TokenPPO, ranks
from text_env import TextVecEnv

N_ROWS = 6
PROMPTS = [">" * (1 + i % 5) + "abcdef"[i % 6] for i in range(30)]
SHARD = int(os.environ.get("WORLD_SIZE", "1")) > 1
LORA = {"r": 4, "lora_alpha": 8}


def score(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return [float(c.count("a")) + len(c) / 10 for c in completions]


def choose(logits: th.Tensor) -> th.Tensor:
    """Sample with a draw that is a function of the state: the same in any process."""
    draw = (logits.logsumexp(1, keepdim=True) * 77).frac().abs()
    cumulative = logits.softmax(1).cumsum(1)
    return th.searchsorted(cumulative, draw.clamp(max=0.999))[:, 0].clamp(max=logits.shape[1] - 1)


def make_model(**changes) -> TokenPPO:
    """A model whose ranks' rows are, put together, those of one process."""
    ranks.connect("cpu")
    n, mine = ranks.world_size(), ranks.rank()
    share = N_ROWS // n
    blocks = [PROMPTS[i : i + N_ROWS] for i in range(0, len(PROMPTS), N_ROWS)]
    env = TextVecEnv(
        num_envs=share,
        autoreset=False,
        tokenizer=letter_tokenizer("abcdef"),
        prompts=[p for block in blocks for p in block[mine * share : (mine + 1) * share]],
        shuffle=False,
        reward_fn=score,
        max_new_tokens=8,
    )
    settings = {
        "learning_rate": 1e-2,
        "n_steps": 8,
        "whole_episodes": True,
        "batch_size": 10**6,
        "kl_coef": 0.1,
        "target_ref_kl": 0.5,
        "kl_horizon": 20,
        "seed": 0,
        "device": "cpu",
        **changes,
    }
    policy_kwargs = {"lm": tiny_llama(9), **settings.pop("policy_kwargs", {})}
    return TokenPPO("CausalLMPolicy", env, policy_kwargs=policy_kwargs, **settings)


class Recorder(BaseCallback):
    """Writes what is logged, and counts calls."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.rows, self.folder, self.steps = [], folder, 0

    def _on_rollout_start(self) -> None:
        self.rows.append(dict(self.logger.name_to_value))

    def _on_rollout_end(self) -> None:
        self.rows.append(dict(self.logger.name_to_value))

    def _on_step(self) -> bool:
        self.steps += 1
        assert "infos" in self.locals
        return True

    def _on_training_end(self) -> None:
        self.rows.append(dict(self.logger.name_to_value))
        numbers = [
            {k: v for k, v in r.items() if isinstance(v, int | float | np.floating)}
            for r in self.rows
        ]
        numbers = json.loads(json.dumps(numbers, default=float))
        facts = {"rows": numbers, "steps": self.steps, "tokens": self.model.num_timesteps}
        facts["episodes"] = [
            [e["prompt"], e["completion"], e["ref_kl"]] for e in self.model.finished_episodes
        ]
        facts["ep_rew"] = sorted(e["r"] for e in self.model.ep_info_buffer)
        (self.folder / f"facts-{ranks.rank()}.json").write_text(json.dumps(facts))


def flat(model: TokenPPO) -> th.Tensor:
    tensors = ranks.whole(dict(model.policy.state_dict()))
    return th.cat([t.flatten().float() for name, t in sorted(tensors.items())])


def train(folder: Path, **changes) -> None:
    """Train for three rollouts and leave weights, gradients and facts of every rank."""
    agents.policy.sample = choose
    model = make_model(**changes)
    model.learn(
        3 * N_ROWS * 5,
        callback=[
            Recorder(folder),
            SampleTextCallback(folder / "samples.jsonl"),
            SavePretrainedCallback(folder / "policy"),
        ],
        progress_bar=True,
    )
    mine = ranks.rank()
    weights = flat(model)
    gradients = ranks.whole([p.grad for p in model.policy.parameters() if p.grad is not None])
    th.save(weights, folder / f"weights-{mine}.pt")
    th.save(th.cat([g.flatten() for g in gradients]), folder / f"gradients-{mine}.pt")
    model.save(folder / "model.zip")


class Look(BaseCallback):
    """Rank 0 alone uses and saves a sharded model, in the middle of a rollout."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.found = folder, {}

    def _on_step(self) -> bool:
        if self.n_calls in (3, 12):
            obs = np.full((1, self.model.observation_space.shape[0]), -1)
            obs[0, :3] = [6, 0, 1]
            self.found[self.n_calls] = self.model.policy.predict(obs, deterministic=True)[
                0
            ].tolist()
            self.model.save(self.folder / f"within-{self.n_calls}.zip")
        return True


def look(folder: Path) -> None:
    """A sharded model is used, saved and loaded again."""
    agents.policy.sample = choose
    model = make_model(shard=SHARD, policy_kwargs={"dtype": "float32"})
    callback = Look(folder)
    model.learn(2 * N_ROWS * 5, callback=callback)
    model.save(folder / "model.zip")
    weights = flat(model)
    again = make_model(shard=SHARD)
    again.set_parameters(str(folder / "model.zip"), device="cpu")
    assert th.equal(flat(again), weights)
    state = ranks.whole(again.policy.optimizer.state_dict()["state"])
    old = ranks.whole(model.policy.optimizer.state_dict()["state"])
    assert len(state) == len(old) > 0
    assert all(th.equal(state[i]["exp_avg"], old[i]["exp_avg"]) for i in old)
    again.learn(N_ROWS * 5, reset_num_timesteps=False)
    (folder / f"found-{ranks.rank()}.json").write_text(json.dumps(callback.found))


class StopEarly(BaseCallback):
    """Stops in the second rollout, on rank 0."""

    def _on_step(self) -> bool:
        return np.bool_(self.n_calls < 11)  # what a comparison of arrays gives


def stop(folder: Path) -> None:
    """A callback of rank 0 stops all ranks within a rollout."""
    model = make_model()
    model.learn(10**6, callback=[StopEarly(), CheckpointCallback(4, str(folder / "checkpoints"))])
    (folder / f"stopped-{ranks.rank()}").write_text(str(model.rollout_buffer.pos))


class Die(BaseCallback):
    """Nothing on rank 0; `fail` and `kill` act by themselves on rank 1."""

    def _on_step(self) -> bool:
        return True


def die(folder: Path, how: str) -> None:
    """Rank 1 dies in the second rollout."""
    model, calls = make_model(), []
    if ranks.rank() == 1:
        forward = model.policy.forward

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) > 12:
                if how == "kill":
                    os.kill(os.getpid(), 9)
                raise RuntimeError("no more memory on this one")
            return forward(*args, **kwargs)

        model.policy.forward = dying
    model.learn(10**6, callback=Die())


TASKS = {
    "plain": lambda f: train(f),
    "micro": lambda f: train(f, policy_kwargs={"micro_batch_size": 8}),
    "uneven": lambda f: train(
        f, policy_kwargs={"micro_batch_size": 20}
    ),  # one part here, two there
    "warmup": lambda f: train(f, value_warmup=1, policy_kwargs={"value_lm": tiny_llama(9, seed=4)}),
    "lora": lambda f: train(f, policy_kwargs={"lora": LORA}),
    "several": lambda f: train(f, batch_size=16, target_kl=1e-3, learning_rate=3e-2),
    "shard": lambda f: train(f, shard=SHARD),
    "shard-all": lambda f: train(
        f,
        shard=SHARD,
        value_warmup=1,
        policy_kwargs={
            "value_lm": tiny_llama(9, seed=4),
            "trainable_layers": 1,
            "micro_batch_size": 8,
            "gradient_checkpointing": True,
        },
    ),
    "look": look,
    "stop": stop,
    "kill": lambda f: die(f, "kill"),
    "raise": lambda f: die(f, "raise"),
}


def main() -> None:
    th.set_num_threads(1)
    folder = Path(sys.argv[1])
    for task in sys.argv[2:]:
        np.random.seed(0)
        (folder / task).mkdir(parents=True, exist_ok=True)
        TASKS[task](folder / task)
    ranks.leave(0)


if __name__ == "__main__":
    main()
