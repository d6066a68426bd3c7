"""TokenPPO: Stable-Baselines3's PPO with a causal LM as policy and a KL penalty per token.

The loop, the loss and the callbacks are SB3's. What is added is the reference model, the
penalty on its divergence, and what a rollout of text can tell.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from agents import ranks
from agents.buffer import TokenRolloutBuffer
from agents.callbacks import TokenProgressBar
from agents.frozen_layers import frozen_copy
from agents.kl import KLController, kl_estimates
from agents.language_model import LM, Reference, load_lm
from agents.lora import has_adapters
from agents.masks import ActionMasks
from agents.nonfinite import NonFiniteError, checked_choice
from agents.policy import CausalLMPolicy
from agents.resumable import ResumablePPO
from agents.sequences import PAD, TokenBatch

PROBED = 8
"""One sequence of so many is compared with the reference at every token of the vocabulary."""


def probe(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every eighth of the sequences, and the others."""
    return order[::PROBED], np.delete(order, np.s_[::PROBED])


class Evaluation(th.nn.Module):
    """The policy as a module whose forward pass is what the update calls: for DDP."""

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: TokenBatch, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """Return `policy.evaluate(batch, actions)`."""
        return self.policy.evaluate(batch, actions)


class TokenPPO(ResumablePPO):
    """PPO over tokens (Schulman et al. 2017, eq. 7), with advantages by GAE (2016, eq. 16).

    The reward of each token is r_t − β·(log π(a_t) − log π_ref(a_t)), where r_t is the
    environment's (the score at an episode's last token, else 0; or, where the ended episode's
    `info` has `token_scores`, each token's own) and π_ref a frozen copy of the policy as it was at
    the start. Statistics that `Monitor` or our own `TextVecEnv` keep are of
    the environment's reward, before the penalty.

    Attributes:
        finished_episodes: Episodes that ended in the current rollout, in order: the
            environment's `info` and `ref_kl` (nats, summed over the completion, but for tokens of a
            rollout that was broken off; complete when `on_rollout_end` is called).
        kl: The controller of β; `kl.coef` is where to change it (with several processes, on rank
            0, where callbacks run; other settings must be changed on all).
        nonfinite_skipped: Sequences and minibatches left out so far, with `on_nonfinite="skip"`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CausalLMPolicy": CausalLMPolicy}
    policy: CausalLMPolicy
    policy_kwargs: dict[str, Any]
    rollout_buffer: TokenRolloutBuffer
    _current_progress_remaining: float
    _collecting = False
    _alone: ranks.OneForAll | None = None

    def __init__(
        self,
        policy: str | type[CausalLMPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-5,
        n_steps: int = 64,
        batch_size: int = 512,
        n_epochs: int = 2,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        kl_coef: float = 0.05,
        target_ref_kl: float | None = None,
        kl_horizon: float = 10_000,
        ref_lm: LM | None = None,
        whole_episodes: bool = False,
        value_warmup: int = 0,
        shard: bool = False,
        on_nonfinite: str = "raise",
    ) -> None:
        """Set up training; SB3's arguments mean what they mean in SB3, with these differences.

        Args:
            policy: "CausalLMPolicy" or a subclass.
            env: A text environment: ids in, one token per action out.
            learning_rate: As in SB3.
            n_steps: Tokens per row and rollout. An episode cut by the rollout's end goes on in
                the next one; its tail is bootstrapped by the value.
            batch_size: Tokens per minibatch, of all processes together, dealt in whole sequences of
                nearly this many.
            n_epochs: As in SB3.
            gamma: Discount per token.
            gae_lambda: As in SB3.
            clip_range: As in SB3.
            clip_range_vf: As in SB3.
            normalize_advantage: Whiten over the whole rollout (SB3: over each minibatch).
            ent_coef: As in SB3.
            vf_coef: As in SB3.
            max_grad_norm: As in SB3.
            use_sde: Must be False.
            sde_sample_freq: Unused.
            rollout_buffer_class: `TokenRolloutBuffer` or a subclass.
            rollout_buffer_kwargs: Further arguments of the buffer.
            target_kl: SB3's early stop on `approx_kl` to the policy before the update.
            stats_window_size: As in SB3, episodes.
            tensorboard_log: As in SB3.
            policy_kwargs: `CausalLMPolicy`'s arguments; `lm` is required.
            verbose: As in SB3.
            seed: As in SB3.
            device: As in SB3.
            _init_setup_model: As in SB3.
            kl_coef: β, score units per nat; 0 trains without a reference model.
            target_ref_kl: Adapt β so that the KL per completion comes to this (nats).
            kl_horizon: Episodes over which an adaptive β moves.
            ref_lm: The reference model; None: the policy's own at the start.
            whole_episodes: Begin every rollout with fresh episodes. In an environment that holds
                ended rows (`TextVecEnv(autoreset=False)`), a rollout is then one whole episode
                per row, and `n_steps` must be as long as the longest.
            value_warmup: Rollouts at the start from which the value learns alone: the policy, and
                what it shares with the value, stays as it is.
            shard: With several processes, split weights, gradients and optimizer state over them
                (FSDP2) rather than keep a copy in each (DDP).
            on_nonfinite: What NaN and infinity do, before any parameter changes: "raise" an
                error that names source, text and step, or "skip": the episode with such a
                reward or value is left out, or the minibatch with such a loss or gradient, and
                counted in `train/nonfinite_skipped`. Logits that are not finite always raise.

        Raises:
            ValueError: If an argument is out of range, the policy has no `lm`, or the environment
                is a Gymnasium `VectorEnv`.
        """
        if isinstance(env, gym.vector.VectorEnv):
            raise ValueError(
                "expected an environment or an SB3 VecEnv, such as TextVecEnv, got a "
                f"{type(env).__name__}, which is Gymnasium's kind of batch"
            )
        if not (policy_kwargs or {}).get("lm") and _init_setup_model:
            raise ValueError(
                "expected policy_kwargs={'lm': <folder, hub id or model>}, got no language model"
            )
        if value_warmup < 0:
            raise ValueError(f"expected value_warmup >= 0 rollouts, got {value_warmup}")
        ranks.connect(device)
        self.shard = shard
        if shard and ranks.world_size() == 1:
            raise ValueError("expected several processes with shard=True: start them with torchrun")
        self.kl = KLController(kl_coef, target_ref_kl, kl_horizon)
        self.ref_lm = ref_lm
        self.reference: Reference | None = None
        self.whole_episodes = whole_episodes
        self.value_warmup = value_warmup
        self.on_nonfinite = on_nonfinite
        self.nonfinite_skipped = 0
        self.finished_episodes: list[dict[str, Any]] = []
        with warnings.catch_warnings():
            # Whole sequences fill minibatches as well as may be: no size divides them evenly.
            warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
            super().__init__(
                policy,
                env,
                learning_rate=learning_rate,
                n_steps=n_steps,
                batch_size=batch_size,
                n_epochs=n_epochs,
                gamma=gamma,
                gae_lambda=gae_lambda,
                clip_range=clip_range,
                clip_range_vf=clip_range_vf,
                normalize_advantage=False,  # the buffer whitens, over the whole rollout
                ent_coef=ent_coef,
                vf_coef=vf_coef,
                max_grad_norm=max_grad_norm,
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                rollout_buffer_class=rollout_buffer_class or TokenRolloutBuffer,
                rollout_buffer_kwargs={
                    "whiten_advantages": normalize_advantage,
                    **(rollout_buffer_kwargs or {}),
                },
                target_kl=target_kl,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose,
                seed=seed,
                device=device,
                _init_setup_model=_init_setup_model,
            )

    def _setup_model(self) -> None:
        """Build buffer and policy as SB3 does, then the reference."""
        skip = checked_choice(self.on_nonfinite, ranks.world_size()) == "skip"
        super()._setup_model()
        self.shard = self.shard and ranks.world_size() > 1  # saved by several, loaded by one
        ranks.copy_from_first(self.policy)
        if ranks.rank() > 0:
            self.set_logger(Logger(None, []))
        self.rollout_buffer.before_advantages = self._finish_rollout
        self.rollout_buffer.in_step = self.shard
        self.rollout_buffer.skip_nonfinite = self.policy.guard.skip = skip
        if self.env is not None:
            self._allow_tokens_of(self.env)
        if self.kl.coef > 0 or self.ref_lm is not None:
            if self.ref_lm is self.policy.lm:
                raise ValueError(
                    "expected ref_lm to be another model than the policy's, which it would "
                    "freeze; leave it out, and a copy is made"
                )
            if self.ref_lm is None and has_adapters(self.policy.lm):
                lm = self.policy.lm
            elif self.ref_lm is None:
                lm = copy.deepcopy(self.policy.lm) if self.shard else frozen_copy(self.policy.lm)
            else:
                lm = load_lm(self.ref_lm, self.policy.vocab_size)
            self.reference = Reference(lm, self.policy).to(self.device)
        # A live model would be pickled into SB3's zip beside its own weights.
        for name in ("lm", "value_lm"):
            if isinstance(model := self.policy_kwargs.get(name), th.nn.Module):
                self.policy_kwargs = {**self.policy_kwargs, name: model.config}
        if isinstance(self.ref_lm, th.nn.Module):
            self.ref_lm = self.ref_lm.config
        self._open_kl = np.zeros(self.n_envs)
        if ranks.world_size() > 1:
            self._connect_policy()

    def _connect_policy(self) -> None:
        """Let gradients be averaged over the ranks: by FSDP2, or DDP around what is called."""
        if self.shard:
            if has_adapters(self.policy.lm):
                raise ValueError("expected lora or shard, got both: adapters need no sharding")
            self.policy.shard()
            if self.reference is not None:
                self.reference.shard()
            return
        with warnings.catch_warnings():
            # The word that the newest torch wants instead is one that others do not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            evaluation = DistributedDataParallel(
                Evaluation(self.policy),
                broadcast_buffers=False,
                find_unused_parameters=self.policy.value_only,  # most of them
            )
        self.policy.run_through(evaluation.__call__, evaluation.no_sync)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed this rank's generators and environments, each rank's differently."""
        super().set_random_seed(None if seed is None else seed + 1_000_000 * ranks.rank())

    def set_logger(self, logger: Logger) -> None:
        """Log to `logger`; on ranks other than 0, nowhere."""
        super().set_logger(logger if ranks.rank() == 0 else Logger(None, []))

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose tokens, as SB3's `predict`, or as sb3-contrib's with `action_masks`."""
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Collect `n_rollout_steps` tokens per row by SB3's loop; its arguments and result."""
        self._allow_tokens_of(env)
        masks = ActionMasks(env, self.device) if env.has_attr("action_masks") else None
        self.policy.action_masks = self.rollout_buffer.action_masks = masks
        if self.rollout_under_way:
            n_rollout_steps -= self._continue_rollout(masks)
        else:
            self._begin_rollout(env)
        self._set_value_only()
        self.kl.coef = ranks.gather([self.kl.coef])[0]  # a callback of rank 0 may have changed it
        if n_rollout_steps == 0:
            with self._saying_where():
                return self._end_rollout(callback)
        self._collecting = True
        try:
            with self._saying_where(), self.policy.register_forward_pre_hook(self._before_token):
                going_on = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        finally:
            self._collecting = False
        if not going_on:  # a callback's word, upon which SB3's loop leaves the step half done
            self._leave_rollout()
            loop = callback.locals
            self._last_obs, self._last_episode_starts = loop["new_obs"], loop["dones"]
            # Within the rollout, the others' tokens are an estimate.
            self._num_timesteps = ranks.gather([self._num_timesteps])[0]
        self.rollout_under_way = False
        return going_on

    def _begin_rollout(self, env: VecEnv) -> None:
        """Set what is counted from a rollout's start; begin fresh episodes, if it is to be so."""
        self._go_on()
        self.finished_episodes = []
        if self.whole_episodes:
            self._require_long_rollouts(env)
            self._last_obs = env.reset()  # type: ignore[assignment]
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        self._tokens_before = self._num_timesteps
        self._open_kl[self._last_episode_starts] = 0
        self.rollout_under_way, self._step_seen = True, -1

    def _continue_rollout(self, masks: ActionMasks | None) -> int:
        """Take up the rollout that a checkpoint was made in; return how many steps it has."""
        assert self._stored is not None
        state, tensors = self._stored
        self._num_timesteps = state["progress"]["num_timesteps"]
        if masks is not None and "masks" in tensors["rollout"]:
            masks.know(tensors["rollout"]["masks"])
        for obs in self.rollout_buffer.observations():  # until what is cached is the same, to a bit
            self.policy.follow(obs_as_tensor(obs, self.device))
        self._step_seen = -1
        return self.rollout_buffer.pos

    def _end_rollout(self, callback: BaseCallback) -> bool:
        """Do what SB3's loop does after its last step, where a checkpoint was made in that."""
        callback.on_rollout_start()
        self._go_on()
        self.rollout_buffer.drop()
        assert self._last_obs is not None and self._last_episode_starts is not None
        with th.no_grad():
            values = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))
        dones = self._last_episode_starts
        self.rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        callback.update_locals(locals())
        callback.on_rollout_end()
        self.rollout_under_way = False
        return True

    @property  # type: ignore[override]
    def num_timesteps(self) -> int:
        """Tokens written so far, by all ranks. A held row, where SB3 counts a step, writes none.

        Within a rollout the other ranks' tokens are taken to be as many as this one's.
        """
        return self._num_timesteps

    @num_timesteps.setter
    def num_timesteps(self, value: int) -> None:
        if self._collecting and self._last_obs is not None:
            written = value - self._num_timesteps - int((self._last_obs[:, 0] == PAD).sum())
            value = self._num_timesteps + written * ranks.world_size()
        self._num_timesteps = value

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """Set callbacks up as SB3 does, on rank 0, with a progress bar that counts tokens."""
        if progress_bar and ranks.rank() == 0:
            given = callback if isinstance(callback, list) else [callback]
            made = [c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in given]
            callback = [*made, TokenProgressBar()]
        if ranks.world_size() > 1:
            alone = None if ranks.rank() > 0 else super()._init_callback(callback)
            callback = self._alone = ranks.OneForAll(alone)
        return super()._init_callback(callback)

    def train(self) -> None:
        """Update the policy by SB3's `train`, whose explained variance would count held rows."""
        buffer = self.rollout_buffer
        if buffer.segments:
            with self._saying_where():
                super().train()
        self._count_skipped(self.policy.guard.n_skipped)
        self.policy.guard.n_skipped = 0
        if self.on_nonfinite == "skip" and not buffer.segments:
            return
        if self.shard:
            self.policy.gather()
        trained = buffer.lengths > 0
        explained = explained_variance(
            *(
                ranks.gather_tokens(buffer.to_torch(array[trained])).cpu().numpy()
                for array in (buffer.values, buffer.returns)
            )
        )
        self.logger.record("train/explained_variance", explained)

    def _count_skipped(self, n: int) -> None:
        """Add to what was left out so far, and log it: of a rollout with that, not a line later."""
        if self.on_nonfinite == "skip":
            self.nonfinite_skipped += n
            self.logger.record("train/nonfinite_skipped", self.nonfinite_skipped)

    @contextmanager
    def _saying_where(self) -> Iterator[None]:
        """Let errors about numbers that are not finite name the text and the step."""
        try:
            yield
        except NonFiniteError as error:
            text = None
            if error.ids is not None and self.env is not None and self.env.has_attr("tokenizer"):
                text = self.env.get_attr("tokenizer")[0].decode(error.ids)
            error.say_where(text, self.num_timesteps)
            raise

    def _set_value_only(self) -> None:
        """Let the value learn alone in the first updates, if it is to."""
        value_only = self._n_updates < self.value_warmup * self.n_epochs
        if value_only != self.policy.value_only:
            self.policy.value_only = value_only
            if ranks.world_size() > 1 and not self.shard:
                self._connect_policy()

    def _require_long_rollouts(self, env: VecEnv) -> None:
        """Refuse rollouts that would cut episodes, for the next one to throw them away."""
        if not all(env.has_attr(name) for name in ("autoreset", "max_new_tokens")):
            return
        longest = env.get_attr("max_new_tokens")[0]
        if not env.get_attr("autoreset")[0] and self.n_steps < longest:
            raise ValueError(
                f"whole_episodes: expected n_steps of at least {longest}, the environment's "
                f"max_new_tokens, got {self.n_steps}: episodes would be cut and never scored"
            )

    def _allow_tokens_of(self, env: VecEnv) -> None:
        """Let the policy choose the tokens that the environment ever allows, if it says so."""
        if env.has_attr("allowed_tokens"):
            allowed = np.array(env.get_attr("allowed_tokens")[0], dtype=bool)
            self.policy.allowed_tokens.copy_(th.from_numpy(allowed))

    def _update_info_buffer(
        self, infos: list[dict[str, Any]], dones: np.ndarray | None = None
    ) -> None:
        """Keep SB3's statistics, and the episodes that ended at this step."""
        if ranks.world_size() == 1:
            returns = [info.get("episode", {}).get("r", 0.0) for info in infos]
            fine = np.isfinite(returns) | (self.on_nonfinite == "raise")
            known = [info if ok else {} for info, ok in zip(infos, fine, strict=True)]
            super()._update_info_buffer(known, dones)
        for row in np.flatnonzero(dones if dones is not None else []):
            place = {"step": self.rollout_buffer.pos, "row": int(row)}
            self.finished_episodes.append({**infos[row], **place})

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Keep the remaining progress at 0 or above: SB3's schedules would go negative."""
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        self._current_progress_remaining = max(0.0, self._current_progress_remaining)

    def _finish_rollout(self) -> None:
        """Subtract the KL penalty from the rollout's rewards, and log what the rollout shows."""
        self.policy.forget()  # its cache is the largest thing there is, and of no more use
        written = self.rollout_buffer.n_tokens + self.rollout_buffer.n_tokens_left_out
        self._num_timesteps = self._tokens_before + int(ranks.total(written))
        self._count_skipped(self.rollout_buffer.n_left_out)
        if not self.rollout_buffer.segments:
            self.finished_episodes = []
            self._open_kl[:] = 0
            return
        if self.policy.n_frozen:
            self.rollout_buffer.keep_frozen(self.policy.run_frozen, self.batch_size)
        ref_log_probs, exact = self._second_look()
        buffer = self.rollout_buffer
        log_ratio = buffer.log_probs - ref_log_probs
        if not np.isfinite(log_ratio).all():
            step, row = np.argwhere(~np.isfinite(log_ratio))[0]
            segment = next(s for s in buffer.segments if s.row == row and s.start <= step < s.end)
            raise NonFiniteError("reference", float(log_ratio[step, row]), segment.context)
        if self.reference is not None:
            buffer.rewards -= self.kl.coef * log_ratio
            self._sum_per_episode(log_ratio)
        self.finished_episodes = [
            e for e in self.finished_episodes if buffer.lengths[e["step"], e["row"]] > 0
        ]  # but for those left out
        self._spread_scores()
        self._share_episodes()
        self._log_episodes()
        if self.reference is None:
            return
        if exact < -1e-3:
            raise FloatingPointError(
                f"the KL to the reference is {exact:.2e} nats per token, below 0: policy and "
                "reference are not normalised alike"
            )
        n_tokens = ranks.total(buffer.n_tokens)
        for name, value in kl_estimates(log_ratio).items():
            per_token = ranks.total(float(value.sum())) / n_tokens
            self.logger.record(f"rollout/ref_kl_per_token_{name}", per_token)
        self.logger.record("rollout/ref_kl_per_token_exact", exact)
        self.logger.record("train/kl_coef", self.kl.coef)
        if self.finished_episodes:
            ref_kl = float(np.mean([episode["ref_kl"] for episode in self.finished_episodes]))
            self.logger.record("rollout/ref_kl", ref_kl)
            if not self.policy.value_only:
                self.kl.update(ref_kl, len(self.finished_episodes))

    def _spread_scores(self) -> None:
        """Pay each token its own score, where the environment tells (`token_scores` in the info).

        It has paid their sum at the last token. What tokens of an earlier rollout have earned is
        paid at the first one of this.
        """
        ends = {(s.row, s.end - 1): s.start for s in self.rollout_buffer.segments}
        for episode in self.finished_episodes:
            scores = np.asarray(episode.get("token_scores", ()), dtype=np.float32)
            row, last = episode["row"], episode["step"]
            if len(scores) > 1:
                rewards = self.rollout_buffer.rewards[ends[row, last] : last + 1, row]
                earlier, here = np.split(scores, [len(scores) - len(rewards)])
                rewards[-1] -= scores[:-1].sum()
                rewards[:-1] += here[:-1]
                rewards[0] += earlier.sum()

    @th.no_grad()
    def _second_look(self) -> tuple[np.ndarray, float]:
        """Run the rollout's sequences through the reference, and the policy where it is needed.

        In bfloat16 the decoder's rounding differs from that of whole sequences, so the policy's
        log-probabilities are computed anew, as the update will compute them, and replaced.

        Returns:
            The reference's log-probabilities, (T, n_envs) nats, and the mean exact KL per token:
            over the whole rollout in bfloat16, over every eighth sequence by length else, as
            the policy need not be run again there.
        """
        policy, reference, buffer = self.policy, self.reference, self.rollout_buffer
        # Rows are decoded with a rounded copy, or sharded ranks must run the policy equally often.
        anew = policy.dtype != th.float32 or self.shard
        ref_log_probs = np.zeros_like(buffer.log_probs)
        exact: list[th.Tensor] = []
        if reference is None and not anew:
            return ref_log_probs, 0.0
        order = buffer.by_length()
        both, reference_only = (order, order[:0]) if anew else probe(order)
        for part in (both, reference_only):
            for batch, index in buffer.batches(part, self.batch_size):
                at = tuple(index)
                actions = buffer.to_torch(buffer.actions[at]).long()
                log_prob, ref_log_prob = None, None
                if reference is None:
                    _, log_prob, _ = policy.evaluate(batch, actions)
                elif part is both:
                    log_prob, ref_log_prob, kl = policy.compare(batch, actions, reference)
                    exact.append(kl)
                else:
                    hidden = reference.hidden_at(batch)
                    ref_log_prob = reference.token_statistics(batch, hidden, actions).log_prob
                if anew and log_prob is not None:
                    buffer.log_probs[at] = log_prob.cpu().numpy()
                if ref_log_prob is not None:
                    ref_log_probs[at] = ref_log_prob.cpu().numpy()
        if reference is not None and reference.sharded:
            reference.reshard()
        if not exact:
            return ref_log_probs, 0.0
        return ref_log_probs, float(ranks.gather_tokens(th.cat(exact)).mean())

    def _sum_per_episode(self, log_ratio: np.ndarray) -> None:
        """Give each finished episode its `ref_kl`, with what earlier rollouts saw of it."""
        total = np.vstack((np.zeros(self.n_envs), log_ratio.cumsum(axis=0, dtype=np.float64)))
        since = np.zeros(self.n_envs, dtype=int)
        for episode in self.finished_episodes:
            row, end = episode["row"], episode["step"] + 1
            episode["ref_kl"] = float(total[end, row] - total[since[row], row] + self._open_kl[row])
            self._open_kl[row], since[row] = 0, end
        self._open_kl += total[-1] - total[since, np.arange(self.n_envs)]

    def _share_episodes(self) -> None:
        """Let every rank know the episodes that ended on any, rows numbered throughout."""
        if ranks.world_size() == 1:
            return
        first_row = ranks.rank() * self.n_envs
        mine = [
            {**episode, "row": episode["row"] + first_row} for episode in self.finished_episodes
        ]
        self.finished_episodes = ranks.gather(mine)
        ended = sorted(self.finished_episodes, key=lambda e: (e["step"], e["row"]))
        super()._update_info_buffer(ended, np.ones(len(ended), dtype=bool))

    def _log_episodes(self) -> None:
        """Log scores, lengths and ends of the rollout's finished episodes, where told."""
        episodes = self.finished_episodes
        self.logger.record("rollout/episodes", len(episodes))
        for key, name in (("score", "score_mean"), ("n_tokens", "completion_tokens")):
            values = [episode[key] for episode in episodes if key in episode]
            if values:
                self.logger.record(f"rollout/{name}", float(np.mean(values)))
        reasons = [e["finish_reason"] for e in episodes if "finish_reason" in e]
        for reason in ("eos", "stop", "length"):
            if reasons:
                share = reasons.count(reason) / len(reasons)
                self.logger.record(f"rollout/finish_{reason}", share)

    def get_parameters(self) -> dict[str, dict]:
        """Return SB3's state dicts; whole ones of a sharded model, on all ranks at once."""
        return self.gather_parameters() if self.shard else super().get_parameters()

    def gather_parameters(self, lm_only: bool = False, keep: bool = True) -> dict[str, Any]:
        """Bring a sharded model's state together; all ranks must call it.

        Args:
            lm_only: The language model's weights, rather than all of SB3's state dicts.
            keep: Whether this rank wants the result, or only helps.
        """
        if self._alone is not None:
            self._alone.ask_for_help(lm_only)
        state = self.policy.lm.state_dict() if lm_only else super().get_parameters()
        return ranks.whole(state, keep)

    def _set_states(self, states: Any, exact_match: bool, device: th.device | str) -> None:
        """Set SB3's state dicts; whole ones of a sharded model, on all ranks at once."""
        needed = self._get_torch_save_params()[0]
        if not self.shard:
            if isinstance(states, dict) and "reference" in needed and self.reference is not None:
                # A checkpoint's is set by itself.
                states = {"reference": self.reference.state_dict(), **states}
            super()._set_states(states, exact_match, device)
            return
        if not isinstance(states, dict):
            _, states, _ = load_from_zip_file(states, device=self.device, load_data=False)
        if exact_match and set(states) | {"reference"} != {*needed, "reference"}:
            raise ValueError(f"expected parameters of {sorted(needed)}, got {sorted(states)}")
        options = StateDictOptions(full_state_dict=True)
        for name, state in states.items():
            part = recursive_getattr(self, name)
            if isinstance(part, th.optim.Optimizer):
                parameters = [p for group in part.param_groups for p in group["params"]]
                part.load_state_dict(ranks.shard_like(state, parameters))
            else:
                set_model_state_dict(part, state, options=options)
        self.policy.gather()

    def _excluded_save_params(self) -> list[str]:
        """Keep models and text out of SB3's pickled part."""
        return [
            *super()._excluded_save_params(),
            "reference",
            "finished_episodes",
            "_collecting",
            "_alone",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        """Save the reference's weights too, if nothing else could bring them back."""
        names, tensors = super()._get_torch_save_params()
        rebuilt = isinstance(self.ref_lm or self.policy_kwargs["lm"], str | Path)
        if self.reference is not None and not (rebuilt or self.reference.shares_base):
            names = [*names, "reference"]
        return names, tensors
