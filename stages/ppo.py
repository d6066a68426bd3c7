"""The policy is trained on the reward model's scores."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.settings import PPO, Common
from stages.card import RESTRICTED, card_of, write_card
from stages.data import data
from stages.models import digest_of
from stages.process import device_of, dtype_of, process_number, say
from stages.resume import appending, remember_settings, to_go_on_from
from stages.rewards import digest_of_reward, reward_function
from stages.run_folder import folder_of, left_by, read_lines, stage
from stages.writing import tokens_of, user_of, written_with

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
    from transformers import PreTrainedTokenizerBase

    from agents import TokenPPO
    from reward_models import LearnedRewardModel
    from text_env import TextVecEnv


def ppo(common: Common, settings: PPO) -> None:
    """Train the policy on the reward model's scores; leaves policy, metrics and samples."""
    from agents import ranks

    if process_number() == 0 and settings.prompts is None:
        data(common)  # made by one, read by all
    ranks.connect(common.device)  # others than the first wait here for the stages before
    common.run = ranks.gather([common.run])[0]
    train_policy(common, settings)
    ranks.disconnect()
    if settings.resume is not None and (settings.resume / "report.md").exists():
        say(
            f"{settings.resume}/report.md is of the policy before: python train.py evaluate "
            f"--run {settings.resume} --overwrite true"
        )


def train_policy(common: Common, settings: PPO) -> None:
    """Do what stage ppo does, in each of the processes that have been connected."""
    from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat

    from agents import (
        CheckpointFolderCallback,
        DoctorCallback,
        SampleTextCallback,
        SavePretrainedCallback,
        TokenPPO,
        ranks,
    )
    from agents.checkpoint_callback import cut_back
    from reward_models import LearnedRewardModel
    from text_env.vocabulary import fingerprint, load_tokenizer

    if settings.shard and settings.lora_rank is not None:
        raise ValueError("expected shard or lora_rank, got both: adapters have little to split")
    n_processes, first = ranks.world_size(), ranks.rank() == 0
    if settings.resume is not None and n_processes > 1:
        raise ValueError(
            f"expected one process with resume, got {n_processes}: only one process's generators, "
            "environments and rollout are in a checkpoint; resume without torchrun, or begin anew "
            "with --policy and --reference (docs/guarantees.md)"
        )
    checkpoint = None if settings.resume is None else to_go_on_from(settings.resume, settings)
    if settings.n_envs % n_processes:
        raise ValueError(
            f"expected n_envs divisible by the number of processes, got {settings.n_envs} rows for "
            f"{n_processes}"
        )
    folder = folder_of(common)
    with stage(common, "ppo", go_on=checkpoint is not None) as (facts, made):
        policy = settings.policy or str(left_by("sft", folder / "sft"))
        tokenizer = load_tokenizer(policy)
        facts["reward"] = settings.reward
        facts["prompts"] = settings.prompts and str(settings.prompts)
        vocabulary = settings.vocabulary
        if vocabulary is None and settings.prompts is None:
            vocabulary = data(common) / "language.jsonl"
        facts["writing"] = written_with(settings, vocabulary)
        prompts = settings.prompts or data(common) / "prompts.jsonl"
        env = training_env(
            common,
            settings,
            tokenizer,
            prompts,
            vocabulary,
            n_processes,
        )
        same = {
            "policy": digest_of(policy),
            "reward model": digest_of_reward(common, settings),
            "tokenizer": fingerprint(tokenizer),
            f"prompts of {Path(prompts).name}": env.task.prompts.fingerprint(),
            "user function": settings.user_fn,
            "judge": digest_of(folder / "judge") if (folder / "judge").exists() else None,
        }
        if checkpoint is None:
            model = ppo_model(common, settings, policy, env)
        else:
            say(f"   from {checkpoint}")
            learning_rate = partial(warm_up_and_decay, settings.learning_rate)
            model = TokenPPO.load(
                checkpoint, env, device_of(common), learning_rate=learning_rate, facts=same
            )
        alone = n_processes == 1  # several make no checkpoints: they could not go on exactly
        if alone:
            remember_settings(common, settings, made / "checkpoints")
        logs = [made / name for name in ("metrics.jsonl", "samples.jsonl", "doctor.jsonl")]
        if first:
            if checkpoint is not None:
                cut_back(checkpoint, logs)
            writers: list[KVWriter] = [
                appending(logs[0]),
                TensorBoardOutputFormat(str(made / "tensorboard")),
            ]
            model.set_logger(Logger(str(made), writers))
        callbacks = [
            SampleTextCallback(logs[1]),
            SavePretrainedCallback(
                made / "policy", tokenizer, settings.save_every, merge=settings.merge_lora
            ),
            DoctorCallback(logs[2], settings.stop_on),  # behind what logs the judge
        ]
        if first and (folder / "judge").exists():
            judge = LearnedRewardModel.load(folder / "judge", device_of(common))
            callbacks.insert(0, judged_rollouts(judge))
        saver = CheckpointFolderCallback(
            made / "checkpoints",
            settings.checkpoint_every,
            settings.checkpoint_keep,
            facts=same,
            logs=logs,
        )
        if model.num_timesteps < settings.total_timesteps or model.rollout_under_way:
            with saver.stops_at_signals() if alone else nullcontext():
                model.learn(
                    settings.total_timesteps,
                    callback=[*callbacks, saver] if alone else callbacks,
                    reset_num_timesteps=checkpoint is None,
                    progress_bar=True,
                )
        model.logger.close()
        saver.store.keep = 1  # of a finished training
        saver.store.prune()
        rows = map(json.loads, read_lines(made / "metrics.jsonl"))
        facts["tokens"] = model.num_timesteps
        if settings.on_nonfinite == "skip":
            facts["nonfinite_skipped"] = model.nonfinite_skipped
        facts["doctor"] = [json.loads(line)["name"] for line in read_lines(logs[2])]
        facts["episodes"] = sum(row.get("rollout/episodes", 0) for row in rows)
        steps = model.policy.guard.n_steps
        if first:
            facts["card"] = card_of(common, settings, policy, model, env)
            if vocabulary:
                facts["card"]["limits"] = [RESTRICTED.format(int(env.allowed_tokens.sum()))]
            if (made / "policy").exists():  # else it is in its place already, with its card
                write_card(made / "policy", facts["card"])
        if first and not (facts["episodes"] and steps):
            raise RuntimeError(
                f"nothing was trained: expected finished episodes and optimizer steps, got "
                f"{facts['episodes']} and {steps} from {facts['tokens']} tokens; raise "
                "total_timesteps, or n_steps to the length of an episode"
            )


def training_env(
    common: Common,
    settings: PPO,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Path,
    vocabulary: Path | None,
    n_processes: int = 1,
) -> "TextVecEnv":
    """Return the environment that PPO trains in, one process's part of it."""
    from reward_models import EachAnswer
    from text_env import TextVecEnv

    skips = settings.on_nonfinite == "skip"
    models = (settings.reward_model, settings.reference)
    reward_fn = reward_function(common, settings.reward, *models, skips)
    return TextVecEnv(
        num_envs=settings.n_envs // n_processes,
        autoreset=settings.n_steps is not None,
        tokenizer=tokenizer,
        prompts=prompts,
        reward_fn=EachAnswer(reward_fn),
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        missing_eos_penalty=settings.missing_eos_penalty,
        allowed_token_ids=tokens_of(vocabulary, tokenizer),
        nonfinite_scores="pass" if skips else "error",
        **user_of(settings),
    )


def ppo_model(common: Common, settings: PPO, policy: str, env: "TextVecEnv") -> "TokenPPO":
    """Return the algorithm with all its settings, before its first token."""
    from agents import TokenPPO

    return TokenPPO(
        "CausalLMPolicy",
        env,
        partial(warm_up_and_decay, settings.learning_rate),
        device=device_of(common),
        n_steps=env.max_new_tokens if settings.n_steps is None else settings.n_steps,
        whole_episodes=settings.n_steps is None,
        batch_size=settings.batch_size,
        n_epochs=settings.n_epochs,
        gae_lambda=settings.gae_lambda,
        vf_coef=settings.vf_coef,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={
            "lm": policy,
            "temperature": settings.temperature,
            "trainable_layers": settings.trainable_layers,
            "lora": lora_of(settings),
            "value_lm": policy if settings.value_network else None,
            "dtype": dtype_of(common),
            "gradient_checkpointing": settings.gradient_checkpointing,
            "micro_batch_size": settings.micro_batch_size,
        },
        value_warmup=settings.value_warmup,
        shard=settings.shard,
        kl_coef=settings.kl_coef,
        ref_lm=settings.reference,
        target_ref_kl=settings.target_ref_kl,
        kl_horizon=settings.kl_horizon,
        on_nonfinite=settings.on_nonfinite,
        stats_window_size=max(100, settings.n_envs),
        seed=common.seed,
    )


def lora_of(settings: PPO) -> dict[str, float] | None:
    """Return the adapters' settings for peft, None where there are to be none."""
    if settings.lora_rank is None:
        return None
    alpha = 2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    return {"r": settings.lora_rank, "lora_alpha": alpha}


def warm_up_and_decay(rate: float, progress: float) -> float:
    """Return the learning rate when `progress` (1 to 0) remains: up over a sixth, down to a tenth.

    SB3 asks after a rollout, so a rate that ended at 0 would waste the last update.
    """
    return rate * min(5 * (1 - progress), 0.1 + 0.9 * progress)


def judged_rollouts(judge: "LearnedRewardModel") -> "BaseCallback":
    """Return a callback that logs the judge's mean of a few episodes of each rollout."""
    from stable_baselines3.common.callbacks import BaseCallback

    from reward_models.conversations import answers_of

    class JudgedRollouts(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            episodes = getattr(self.model, "finished_episodes", [])
            if episodes:
                some = episodes[:: max(1, len(episodes) // 64)]
                answers = answers_of(some)
                ratings = judge.human_scale(answers.prompts, answers.completions)
                self.logger.record("rollout/judge_mean", float(ratings.mean()))

    return JudgedRollouts()
