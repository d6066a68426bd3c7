"""Who is compared: each peer does iterations of one workload and hands over their timings.

`run(report)` never returns by itself: it calls `report(timing)` after each iteration, which waits
for the word to go on, or raises `Stop`. The bare loop is in `bare_loop`.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import deepcopy
from io import StringIO
from math import nan
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from agents import TokenPPO
from benchmarks import bare_loop as bare
from benchmarks.timing import Timing
from benchmarks.workloads import Workload, reward
from text_env import TextVecEnv

Report = Callable[[Timing], None]


class Stop(Exception):
    """Raised by `report` when enough iterations have been seen."""


class Bare:
    """The padded loop without a framework."""

    def __init__(self, workload: Workload, dtype: str) -> None:
        self.loop = bare.BareLoop(workload, dtype)

    def run(self, report: Report) -> None:
        """Do iterations."""
        while True:
            report(self.loop.iterate())


class Ours:
    """TokenPPO in TextVecEnv, as a user calls it: `learn`, one rollout at a time.

    A rollout is one whole completion per prompt, as in the padded loop; or, with `cut`, rows go
    on with their next prompt at once, and a rollout has about as many tokens.
    """

    def __init__(self, workload: Workload, dtype: str, cut: bool = False) -> None:
        self.model = TokenPPO(
            "CausalLMPolicy",
            text_env(workload, autoreset=cut),
            learning_rate=bare.LEARNING_RATE,
            n_steps=steps_per_row(workload) if cut else workload.max_new_tokens,
            whole_episodes=not cut,
            batch_size=10**9,
            n_epochs=workload.n_epochs,
            kl_coef=bare.KL_COEF,
            vf_coef=bare.VF_COEF,
            policy_kwargs={"lm": workload.model(), "dtype": dtype},
            seed=0,
            device="cpu",
        )
        self.spent = {"policy": 0.0, "reference": 0.0, "update": 0.0}
        self._time(self.model.policy, "forward", "policy")
        self.model.rollout_buffer.before_advantages = self._timed(
            self.model.rollout_buffer.before_advantages, "reference"
        )
        self._time(self.model, "train", "update")

    def _time(self, owner: Any, method: str, part: str) -> None:
        setattr(owner, method, self._timed(getattr(owner, method), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.spent[part] += time.perf_counter() - start
            return result

        return timed

    def run(self, report: Report) -> None:
        """Do iterations."""
        while True:
            self.spent = dict.fromkeys(self.spent, 0.0)
            start, before = time.perf_counter(), self.model.num_timesteps
            self.model.learn(1, reset_num_timesteps=False)  # one rollout and its update
            tokens = self.model.num_timesteps - before
            seconds = time.perf_counter() - start
            rollout = seconds - self.spent["update"] - self.spent["reference"]
            bookkeeping = rollout - self.spent["policy"]
            report(Timing(tokens, seconds, rollout, self.spent["update"], bookkeeping))


class Generate:
    """transformers' `generate`: the rollout alone."""

    def __init__(self, workload: Workload, dtype: str) -> None:
        self.workload, self.lm = workload, workload.model()
        if dtype == "bfloat16":
            self.lm.bfloat16()
        self.prompts = th.tensor(workload.tokenizer()(workload.prompts())["input_ids"])
        self.ends = th.tensor(workload.eos_token_ids, dtype=th.long)

    def run(self, report: Report) -> None:
        """Do iterations."""
        n_prompt = self.prompts.shape[1]
        while True:
            start = time.perf_counter()
            ids = self.lm.generate(
                self.prompts,
                attention_mask=th.ones_like(self.prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.workload.max_new_tokens,
                eos_token_id=self.ends.tolist() or None,
                pad_token_id=0,
            )
            seconds = time.perf_counter() - start
            report(Timing(count_tokens(ids[:, n_prompt:], self.ends), seconds, seconds, nan))


class StockSB3:
    """Stock SB3 PPO whose features extractor runs the LM on every observation."""

    def __init__(self, workload: Workload, dtype: str) -> None:
        self.env = text_env(workload)
        self.model = PPO(
            "MlpPolicy",
            self.env,
            learning_rate=bare.LEARNING_RATE,
            n_steps=steps_per_row(workload),
            batch_size=64,
            n_epochs=workload.n_epochs,
            gamma=1.0,
            policy_kwargs={
                "features_extractor_class": LMExtractor,
                "features_extractor_kwargs": {"workload": workload},
                "net_arch": [],
            },
            device="cpu",
        )

    def run(self, report: Report) -> None:
        """Do iterations."""
        tokens = self.env.num_envs * self.model.n_steps
        while True:
            start = time.perf_counter()
            self.model.learn(tokens, reset_num_timesteps=False)
            report(Timing(tokens, time.perf_counter() - start, nan, nan))


class LMExtractor(BaseFeaturesExtractor):
    """The last hidden state of a language model, computed anew for each observation."""

    def __init__(self, observation_space: gym.Space, workload: Workload) -> None:
        lm = workload.model()
        super().__init__(observation_space, lm.config.hidden_size)
        self.body = lm.base_model

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Map ids (n, L) to features (n, H)."""
        ids = observations.long()
        last = (ids >= 0).sum(dim=1) - 1
        hidden = self.body(input_ids=ids.clamp(min=0), use_cache=False).last_hidden_state
        return hidden[th.arange(len(ids)), last]


class TRL:
    """A trainer of TRL: "GRPO" or "RLOO", 8 completions a prompt, on the same number of rows."""

    def __init__(self, workload: Workload, dtype: str, name: str) -> None:
        self.workload, self.dtype, self.name = workload, dtype, name
        self.ends = th.tensor(workload.eos_token_ids, dtype=th.long)

    def run(self, report: Report) -> None:
        """Do iterations, until the trainer's callback raises `Stop`."""
        import trl
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback

        tokens, asked = 0, nan
        start = time.perf_counter()

        def counted(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
            nonlocal tokens, asked
            asked = time.perf_counter()
            rows = [np.asarray(row) for row in completion_ids]
            tokens = sum(count_tokens(th.as_tensor(row)[None], self.ends) for row in rows)
            return reward(prompts, completions)

        class AfterIteration(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                nonlocal start
                start = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                nonlocal start
                if state.global_step % epochs == 0:
                    report(Timing(tokens, time.perf_counter() - start, asked - start, nan))
                    start = time.perf_counter()

        epochs, tokenizer = self.workload.n_epochs, self.workload.tokenizer()
        if tokenizer.eos_token is None:  # one that a random model hardly ever samples
            tokenizer.eos_token = tokenizer.pad_token = "w0"
        config = getattr(trl, f"{self.name}Config")
        with tempfile.TemporaryDirectory() as folder:
            arguments = config(
                output_dir=folder,
                per_device_train_batch_size=self.workload.n_prompts,
                num_generations=8,
                max_completion_length=self.workload.max_new_tokens,
                num_iterations=epochs,
                beta=bare.KL_COEF,
                learning_rate=bare.LEARNING_RATE,
                max_steps=10**6,
                bf16=self.dtype == "bfloat16",
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                generation_kwargs={"eos_token_id": self.ends.tolist()} if len(self.ends) else None,
            )
            model = f"{folder}/model"  # the trainers load the reference by the model's name
            self.workload.model().save_pretrained(model)
            trainer = getattr(trl, f"{self.name}Trainer")(
                model=model,
                reward_funcs=[counted],
                args=arguments,
                train_dataset=Dataset.from_dict({"prompt": self.workload.prompts()}),
                processing_class=tokenizer,
                callbacks=[AfterIteration()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()


class TRLPPO:
    """The PPO trainer of TRL, as its last release with one (1.12, experimental) has it.

    It wants models for value and reward: the value model is another of the policy's size, as that
    trainer's users have it; the reward model is as good as free.
    """

    def __init__(self, workload: Workload, dtype: str) -> None:
        self.workload, self.dtype = workload, dtype

    def run(self, report: Report) -> None:
        """Do iterations, until the trainer's callback raises `Stop`."""
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification, TrainerCallback
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        start, asked = time.perf_counter(), nan
        tokens = self.workload.n_prompts * self.workload.max_new_tokens

        class FreeReward(th.nn.Module):
            base_model_prefix = "backbone"

            def backbone(self, input_ids: th.Tensor, **kwargs: Any) -> Any:
                nonlocal asked
                asked = time.perf_counter()
                return SimpleNamespace(hidden_states=[input_ids.float()[..., None]])

            def score(self, hidden: th.Tensor) -> th.Tensor:
                return hidden % 997 / 997

        class AfterIteration(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                nonlocal start
                report(Timing(tokens, time.perf_counter() - start, asked - start, nan))
                start = time.perf_counter()

        tokenizer = self.workload.tokenizer()
        if tokenizer.pad_token is None:
            tokenizer.eos_token = tokenizer.pad_token = "w0"
        lm = self.workload.model()
        config = deepcopy(lm.config)
        config.num_labels = 1
        value = AutoModelForSequenceClassification.from_config(config)
        prompts = Dataset.from_dict(dict(tokenizer(self.workload.prompts())))
        with tempfile.TemporaryDirectory() as folder:
            trainer = PPOTrainer(
                args=PPOConfig(
                    output_dir=folder,
                    per_device_train_batch_size=self.workload.n_prompts,
                    gradient_accumulation_steps=1,
                    num_ppo_epochs=self.workload.n_epochs,
                    response_length=self.workload.max_new_tokens,
                    total_episodes=10**6,
                    temperature=1.0,
                    kl_coef=bare.KL_COEF,
                    vf_coef=bare.VF_COEF,
                    learning_rate=bare.LEARNING_RATE,
                    bf16=self.dtype == "bfloat16",
                    use_cpu=True,
                    gradient_checkpointing=False,
                    num_sample_generations=0,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                ),
                processing_class=tokenizer,
                model=lm,
                ref_model=None,
                reward_model=FreeReward(),
                value_model=value,
                train_dataset=prompts,
                eval_dataset=prompts,
                callbacks=[AfterIteration()],
            )
            with redirect_stdout(StringIO()):  # it prints its metrics
                trainer.train()


PEERS: dict[str, Callable[[Workload], Any]] = {
    "bare loop": lambda w: Bare(w, "float32"),
    "bare loop, bf16": lambda w: Bare(w, "bfloat16"),
    "TokenPPO": lambda w: Ours(w, "float32"),
    "TokenPPO, bf16": lambda w: Ours(w, "bfloat16"),
    "TokenPPO, cut episodes": lambda w: Ours(w, "float32", cut=True),
    "TokenPPO, cut episodes, bf16": lambda w: Ours(w, "bfloat16", cut=True),
    "generate": lambda w: Generate(w, "float32"),
    "stock SB3 PPO": lambda w: StockSB3(w, "float32"),
    "TRL GRPO": lambda w: TRL(w, "float32", "GRPO"),
    "TRL RLOO": lambda w: TRL(w, "float32", "RLOO"),
    "TRL PPO": lambda w: TRLPPO(w, "float32"),
}


def text_env(workload: Workload, autoreset: bool = True) -> TextVecEnv:
    """Return the workload's environment."""
    return TextVecEnv(
        num_envs=workload.n_prompts,
        autoreset=autoreset,
        tokenizer=workload.tokenizer(),
        prompts=workload.prompts(),
        reward_fn=reward,
        max_new_tokens=workload.max_new_tokens,
        eos_token_ids=workload.eos_token_ids,
    )


def steps_per_row(workload: Workload) -> int:
    """Return the mean length of a completion: what a padded loop gets out of one row."""
    p, longest = workload.eos_share, workload.max_new_tokens
    return longest if p == 0 else round((1 - (1 - p) ** longest) / p)


def count_tokens(completions: th.Tensor, ends: th.Tensor) -> int:
    """Count the tokens of completions (B, T), each up to its first end token."""
    ended = th.isin(completions, ends).long().cumsum(dim=1)
    return int(((ended - th.isin(completions, ends).long()) == 0).sum())
