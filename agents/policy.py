"""CausalLMPolicy: a causal language model with a value head, as a Stable-Baselines3 policy.

It knows observations (token ids) and tokens, and nothing of prompts, scores or references.
Stock SB3 A2C and PPO run with it as TokenPPO does.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from agents.checkpointing import prepare_checkpointing
from agents.families import decoder_for
from agents.frozen_layers import count_frozen, freeze_below, round_frozen, shard_layers
from agents.heads import log_prob_of, mask_logits_, sample
from agents.language_model import LM, TokenModel, check_positions, load_lm
from agents.lora import add_adapters
from agents.masks import ActionMasks
from agents.micro_batches import Evaluate, evaluate_in_parts
from agents.nonfinite import Guard, require_finite_logits
from agents.ranks import agree_on_parts, gather_tokens
from agents.sequences import (
    PAD,
    TokenBatch,
    count_ids,
    n_minibatches,
    one_state_per_row,
    require_token_actions,
)
from agents.states import find_capping, width
from agents.value_network import ValueNetwork

RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""How far (nats) log-probabilities may lie from themselves, computed in another batch: the
largest error in float32, the mean error in bfloat16, where single ones reach 0.2."""


class CausalLMPolicy(TokenModel, ActorCriticPolicy):
    """An actor-critic over tokens: π(token | ids so far) and V(ids so far).

    Observations are ids (n, L), right-padded with -1 (a float Box holds the same ids). Dropout is
    always off. The temperature divides the logits wherever the policy is used, so that what is
    trained is what is sampled. Log-probabilities are float32 whatever the model's dtype.

    Single tokens are decoded with a key/value cache that finds out by itself which rows go on
    (`agents.decoder`); `evaluate_actions` runs whole sequences.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        lm: LM,
        temperature: float = 1.0,
        trainable_layers: int | None = None,
        lora: Mapping[str, Any] | None = None,
        value_lm: LM | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        micro_batch_size: int | None = None,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
    ) -> None:
        """Build the policy around a language model.

        Args:
            observation_space: A one-dimensional Box of token ids, -1 for padding.
            action_space: Discrete(V): one action per token of the tokenizer.
            lr_schedule: Learning rate as a function of the remaining progress (1 to 0).
            lm: The causal LM, or an encoder-decoder, whose encoder reads the prompt. A live model
                is trained in place.
            temperature: Divides the logits, in sampling and in evaluation alike.
            trainable_layers: How many of the last transformer layers learn, with the final norm
                and the value head; the rest, embeddings included, stays as it is. None: all of
                the model learns.
            lora: Adapters that learn in the place of the model's own weights: arguments of
                `peft.LoraConfig`, such as {"r": 16, "lora_alpha": 32}. With `trainable_layers`,
                only these layers are adapted.
            value_lm: The LM of a value network of its own. None: the value head shares the
                policy's last hidden state. A live model is trained in place.
            dtype: "float32", or "bfloat16": the model is computed in bfloat16 (several times
                faster where the hardware has it), and the matrices that do not learn are kept in
                it. What learns, the head, log-probabilities and values stay float32.
            gradient_checkpointing: Compute each layer's activations again in the backward pass,
                rather than keep them: about a third more time for much less memory.
            micro_batch_size: Tokens of a minibatch whose activations are kept at a time; the
                gradient is that of the whole minibatch, at the price of one more forward pass.
            optimizer_class: As in SB3.
            optimizer_kwargs: Its arguments. AdamW's default is no weight decay, eps 1e-5, fused.
            use_sde: For SB3's call; only False makes sense for tokens.

        Raises:
            ValueError: If the spaces do not fit the model, or an argument is out of range.
        """
        if use_sde:
            raise ValueError("expected use_sde=False: tokens have no state-dependent noise")
        if temperature <= 0:
            raise ValueError(f"expected temperature > 0, got {temperature} (see `deterministic`)")
        if dtype not in RATIO_TOLERANCE:
            raise ValueError(f"expected dtype float32 or bfloat16, got {dtype!r}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"expected micro_batch_size >= 1 token, got {micro_batch_size}")
        if optimizer_kwargs is None and optimizer_class is th.optim.AdamW:
            optimizer_kwargs = {"eps": 1e-5, "weight_decay": 0.0, "fused": True}
        super(ActorCriticPolicy, self).__init__(
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.vocab_size = vocab_size_of(observation_space, action_space)
        self.temperature = temperature
        self.trainable_layers = trainable_layers
        self.lm = load_lm(lm, self.vocab_size)
        check_positions(self.lm, observation_space.shape[0])
        self.lora = None if lora is None else dict(lora)
        if self.lora is None:
            freeze_below(self.lm, trainable_layers)
        else:
            add_adapters(self.lm, self.lora, trainable_layers)
        self.n_frozen = count_frozen(self.lm)
        self.capping = find_capping(self.lm)
        self.micro_batch_size = micro_batch_size
        self.value_network: ValueNetwork | None = None
        if value_lm is not None:
            rounded = getattr(th, dtype)
            self.value_network = ValueNetwork(value_lm, self.vocab_size, trainable_layers, rounded)
            if self.value_network.lm is self.lm:
                raise ValueError("expected value_lm to be another model than lm: give a copy")
            check_positions(self.value_network.lm, observation_space.shape[0])
        self.value_only = False
        self.guard = Guard()
        self.run_through(self.evaluate, nullcontext)
        valued = (self.value_network or self).lm
        self.value_head = nn.Linear(width(valued), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        allowed = th.ones(self.vocab_size, dtype=th.bool)
        self.register_buffer("allowed_tokens", allowed)
        self.action_masks: ActionMasks | None = None
        self.dtype, self.ratio_tolerance = getattr(th, dtype), RATIO_TOLERANCE[dtype]
        self.decoder = decoder_for(self.lm, self.dtype)  # tried in float32
        round_frozen(self.lm, self.dtype)
        self.gradient_checkpointing = gradient_checkpointing
        for model in (self, self.value_network) if gradient_checkpointing else ():
            if model is not None:
                prepare_checkpointing(model.lm)
                model.gradient_checkpointing = True
        self._make_optimizer(lr_schedule(1))

    def _make_optimizer(self, learning_rate: float) -> None:
        """Make an optimizer of what learns."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = self.optimizer_class(  # type: ignore[call-arg]
            trainable, lr=learning_rate, **self.optimizer_kwargs
        )
        self._watch_optimizer()

    def shard(self) -> None:
        """Split weights, gradients and optimizer state over the ranks, by FSDP2.

        Rows are decoded with a whole copy of the weights, in `dtype`, which `gather` brings up to
        date.
        """
        models = [m for m in (self, self.value_network) if m is not None]
        for model in models:
            model.lm.float()  # a group of FSDP2 has one dtype
            model.decoder.prepare_to_gather()
        for model in models:
            shard_layers(model.lm)
            model.sharded, model.n_frozen = True, 0
        fully_shard(self, reshard_after_forward=False)
        for name in ("evaluate", "compare"):
            register_fsdp_forward_method(self, name)
        self._make_optimizer(self.optimizer.param_groups[0]["lr"])
        self.run_through(self.evaluate, nullcontext)  # each part's gradient is averaged

    def gather(self) -> None:
        """Bring what rows are decoded with up to date with sharded weights; by all ranks."""
        self.decoder.gather()
        if self.value_network is not None:
            self.value_network.decoder.gather()

    def _watch_optimizer(self) -> None:
        """Check gradients before each of the optimizer's steps; forget what was decoded after."""
        self.optimizer.register_step_pre_hook(self.guard.before_step)
        self.optimizer.register_step_post_hook(lambda *_: self.forget())

    def forget(self) -> None:
        """Drop what was decoded: the weights have changed, or memory is needed elsewhere."""
        self.decoder.forget()
        if self.value_network is not None:
            self.value_network.decoder.forget()

    @th.no_grad()
    def follow(self, obs: th.Tensor) -> None:
        """Decode observations (n, L) as `forward` does, without choosing tokens: to cache them."""
        self.last_hidden(obs)
        if self.value_network is not None:
            self.value_network.last_hidden(obs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back from a copy or a pickle: optimizers leave their hooks behind there."""
        super().__setstate__(state)
        self._watch_optimizer()

    def load_from_vector(self, vector: np.ndarray) -> None:
        """Load parameters from a flat vector, as in SB3."""
        super().load_from_vector(vector)
        self.forget()

    def train(self, mode: bool = True) -> "CausalLMPolicy":
        """Set SB3's training flag; the language model stays in eval mode, without dropout."""
        super().train(mode)
        self.lm.eval()
        if self.value_network is not None:
            self.value_network.eval()
        return self

    # ------------------------------------------------------------- one token at a time

    def forward(
        self, obs: th.Tensor, deterministic: bool = False
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Choose the next token of each row.

        Args:
            obs: (n, L) ids, right-padded with -1. A row of nothing but -1 is held (its episode
                is over): it gets any token, with value and log-probability 0.
            deterministic: Take the likeliest token instead of sampling.

        Returns:
            Tokens (n,) int64, values (n, 1) and log-probabilities (n,) in nats.
        """
        masks = None if self.action_masks is None else self.action_masks.ask()
        rows, chosen, hidden, logits, places = self._choose(obs, masks, deterministic)
        if self.value_network is not None:
            hidden = self.value_network.last_hidden(obs)[0][rows]
        tokens = rows.new_zeros(len(obs))
        values = th.zeros(len(obs), 1, device=obs.device)
        log_prob = th.zeros(len(obs), device=obs.device)
        tokens[rows], values[rows] = chosen, self._values(hidden)
        log_prob[rows] = log_prob_of(logits, places)
        return tokens, values, log_prob

    def _predict(
        self,
        observation: th.Tensor,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> th.Tensor:
        """Choose the next token (n,) of each row, without a value; any token for held rows."""
        masks = None
        if action_masks is not None:
            masks = th.as_tensor(action_masks, dtype=th.bool, device=observation.device)
            masks = masks.reshape(-1, self.vocab_size).expand(len(observation), -1)
        rows, chosen, *_ = self._choose(observation, masks, deterministic)
        tokens = rows.new_zeros(len(observation))
        tokens[rows] = chosen
        return tokens

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose tokens for NumPy observations, as SB3's `predict` does.

        Args:
            observation: (L,) or (n, L) ids, right-padded with -1.
            state: Passed through; the decoder's cache is not an argument.
            episode_start: Not needed: the observations tell.
            deterministic: Take the likeliest token instead of sampling.
            action_masks: (V,) or (n, V) bool, tokens allowed now; the tokens that are never
                allowed are known without it.

        Returns:
            Tokens, () or (n,) int64, and `state`.
        """
        if action_masks is None:
            return super().predict(observation, state, episode_start, deterministic)
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        with th.no_grad():
            tokens = self._predict(obs, deterministic, action_masks).cpu().numpy()
        return (tokens if vectorized else tokens[0]), state

    def predict_values(self, obs: th.Tensor) -> th.Tensor:
        """Return V of each row: (n, L) ids to (n, 1)."""
        hidden, _ = (self.value_network or self).last_hidden(obs)
        return self._values(hidden) * (obs[:, :1] != PAD)

    def get_distribution(self, obs: th.Tensor) -> CategoricalDistribution:
        """Return SB3's distribution over the next token of each row, not differentiable."""
        hidden, lm = self.last_hidden(obs)
        head = self.decoding_head(lm)
        logits = hidden.new_full(
            (len(hidden), self.vocab_size), th.finfo(th.float32).min, dtype=th.float32
        )
        logits[:, head.token_ids] = head.logits(hidden)
        distribution = CategoricalDistribution(self.vocab_size)
        return distribution.proba_distribution(action_logits=logits)

    # ------------------------------------------------------------------ whole sequences

    def evaluate_actions(
        self, obs: th.Tensor | TokenBatch, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return what the update needs: values, log-probabilities and entropies.

        Args:
            obs: Whole sequences from `TokenRolloutBuffer`, or one observation (N, L) per token
                from a stock SB3 buffer.
            actions: (N,) tokens.

        Returns:
            Values (N, 1), log-probabilities (N,) and entropies (N,) in nats: of all ranks'
            tokens, where there are several.

        Raises:
            NonFiniteError: If one of them is not finite.
            FloatingPointError: If the first minibatch after a rollout does not give the
                log-probabilities that were sampled.
        """
        batch = obs if isinstance(obs, TokenBatch) else one_state_per_row(obs)
        actions = actions.long()
        n_parts = n_minibatches(len(actions), self.micro_batch_size or len(actions))
        n_parts = agree_on_parts(n_parts, len(batch.ids))
        values, log_prob, entropy = evaluate_in_parts(
            self._evaluate, batch, actions, n_parts, self._unsynchronised
        )
        self.guard.watch(batch, value=values, log_prob=log_prob, entropy=entropy)
        if batch.old_log_prob is not None:
            self._check_ratio(log_prob.detach(), batch.old_log_prob)
        return gather_tokens(values), gather_tokens(log_prob), gather_tokens(entropy)

    def run_through(
        self, evaluate: Evaluate, unsynchronised: Callable[[], AbstractContextManager]
    ) -> None:
        """Let the update run through something that averages gradients over several processes.

        Args:
            evaluate: Gives what `evaluate` does.
            unsynchronised: Makes a context in which gradients are not averaged yet.
        """
        self._evaluate, self._unsynchronised = evaluate, unsynchronised

    def evaluate(
        self, batch: TokenBatch, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return values (N, 1), log-probabilities (N,) and entropies (N,) of N tokens, unchecked.

        While `value_only`, the values alone are differentiable, and the LM below a shared value
        head stays as it is.
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.value_only):
            hidden = self.hidden_at(batch)
            found = self.token_statistics(batch, hidden, actions)
        if self.value_network is not None:
            hidden = self.value_network.hidden_at(batch)
        return self._values(hidden), found.log_prob, found.entropy

    # --------------------------------------------------------------------------- inside

    def _choose(
        self, obs: th.Tensor, masks: th.Tensor | None, deterministic: bool
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Choose the next token of each row that is not held, k of n.

        Args:
            obs: (n, L) ids.
            masks: (n, V) bool, or None.
            deterministic: Take the likeliest token instead of sampling.

        Returns:
            The rows, their tokens, states (k, H), masked logits (k, A) and chosen places among
            these; all else (k,) int64.
        """
        hidden, lm = self.last_hidden(obs)
        rows = (obs[:, 0] != PAD).nonzero()[:, 0]
        hidden, head = hidden[rows], self.decoding_head(lm)
        logits = head.logits(hidden)
        if masks is not None:
            mask_logits_(logits, head.places_in(masks[rows]))
        require_finite_logits(logits, obs[rows])
        places = logits.argmax(dim=1) if deterministic else sample(logits)
        return rows, head.token_ids[places], hidden, logits, places

    def _values(self, hidden: th.Tensor) -> th.Tensor:
        """Map states (N, H) to values (N, 1)."""
        return self.value_head(hidden.float())

    def _check_ratio(self, log_prob: th.Tensor, old_log_prob: th.Tensor) -> None:
        """Require that no update has happened between sampling and the first minibatch."""
        errors = (log_prob - old_log_prob).abs()
        error = float(errors.max() if self.dtype == th.float32 else errors.mean())
        if error > self.ratio_tolerance:
            raise FloatingPointError(
                f"the first minibatch's log-probabilities differ from the sampled ones by "
                f"{error:.2e} nats (tolerance {self.ratio_tolerance:.0e}): rollout and update do "
                "not see the same policy; no parameter was changed"
            )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Return what rebuilds this policy before its weights are loaded."""
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "lm": self.lm.config,
            "temperature": self.temperature,
            "trainable_layers": self.trainable_layers,
            "lora": self.lora,
            "value_lm": None if self.value_network is None else self.value_network.lm.config,
            "gradient_checkpointing": self.gradient_checkpointing,
            "micro_batch_size": self.micro_batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def vocab_size_of(observation_space: spaces.Space, action_space: spaces.Space) -> int:
    """Return V, after checking that the spaces are those of token ids.

    Raises:
        ValueError: If they are not.
    """
    n_tokens = count_ids(observation_space)
    require_token_actions(action_space, n_tokens)
    return n_tokens
