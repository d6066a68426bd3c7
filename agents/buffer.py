"""TokenRolloutBuffer: a rollout's tokens, each stored once, given out as whole sequences."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torch.nn.utils.rnn import pad_sequence

from agents import ranks
from agents.masks import ActionMasks
from agents.nonfinite import LARGEST, NonFiniteError
from agents.sequences import PAD, TokenBatch, deal, n_minibatches, pad_right

STORED = ("actions", "rewards", "episode_starts", "values", "log_probs", "lengths", "mask_ids")
"""What a step stores, (n_steps, n_envs) each; the rest is made when a rollout is full."""


class TokenRolloutSamples(NamedTuple):
    """A minibatch in the form that SB3's `PPO.train` reads: N packed completion tokens."""

    observations: TokenBatch
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


class Segment(NamedTuple):
    """A run of steps [start, end) of one row that belong to one episode.

    Attributes:
        row: The row of the environment.
        start: First step.
        end: One past the last step.
        context: (C,) int32, the ids seen at the first step: the prompt, and what an earlier
            rollout added to it.
        inserted: What the environment said in between, a user's turn say: steps, in order, each
            with the ids that its observation has behind the token of the step before.
    """

    row: int
    start: int
    end: int
    context: np.ndarray
    inserted: tuple[tuple[int, np.ndarray], ...] = ()

    @property
    def n_tokens(self) -> int:
        """The number of tokens trained on."""
        return self.end - self.start


class TokenRolloutBuffer(RolloutBuffer):
    """An SB3 rollout buffer for token environments.

    SB3 keeps one observation per step; here a step keeps its token, and an observation is kept
    only where a segment begins, since each further one is the last plus a token, and plus what the
    environment says then (a user's turn), which is kept and not trained on. `get` yields whole
    sequences, so that one forward pass serves all their tokens, with everything per token packed to
    (N,): neither padding nor what others said ever reaches a loss.

    `before_advantages` is called when the rollout is full, before advantages are computed: the
    place to change `rewards`.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
        whiten_advantages: bool = False,
    ) -> None:
        """Take SB3's arguments, and whether advantages are whitened over the whole rollout."""
        self.whiten_advantages = whiten_advantages
        self.before_advantages: Callable[[], None] = lambda: None
        self.action_masks: ActionMasks | None = None
        self.skip_nonfinite = False  # leave such sequences out, rather than raise
        self._goes_on = False
        self.in_step = False  # as many batches on each rank: sharded models run together
        super().__init__(
            buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs
        )

    def reset(self) -> None:
        """Empty the buffer; one that `set_state` has filled goes on once."""
        if self._goes_on:
            self._goes_on = False
            return
        shape = (self.buffer_size, self.n_envs)
        self.actions = np.zeros(shape, dtype=np.int32)
        self.mask_ids = np.zeros(shape, dtype=np.int32)
        self.lengths = np.zeros(shape, dtype=np.int32)  # tokens in the observation; 0: held row
        for name in ("rewards", "returns", "episode_starts", "values", "log_probs", "advantages"):
            setattr(self, name, np.zeros(shape, dtype=np.float32))
        # by row and step, what no action explains: an observation where a segment begins, later
        # the ids that are inserted
        self._contexts: dict[tuple[int, int], np.ndarray] = {}
        self.segments: list[Segment] = []
        self._frozen: list[th.Tensor] = []
        self._first_minibatch = True
        self.n_left_out, self.n_tokens_left_out = 0, 0  # sequences, tokens
        self.pos = 0
        self.full = False

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor,
        log_prob: th.Tensor,
    ) -> None:
        """Store one step of all rows.

        Args:
            obs: (n_envs, L) ids, right-padded with -1. A row of nothing but -1 is held: its
                episode is over and the environment waits; it is not trained on.
            action: (n_envs, 1) or (n_envs,) tokens.
            reward: (n_envs,).
            episode_start: (n_envs,), 1 where `obs` is an episode's first.
            value: (n_envs, 1).
            log_prob: (n_envs,) nats.

        Raises:
            ValueError: If a row's observation does not go on where its last one and the token
                chosen end.
        """
        step, obs = self.pos, np.asarray(obs)
        length = (obs != PAD).sum(axis=1)
        begins = np.asarray(episode_start, dtype=bool) | (step == 0)
        known = np.where(begins, 0, self.lengths[step - 1] + 1)  # tokens that were seen before
        self._check_continuity(obs, length, known)
        for row in np.flatnonzero(length > known).tolist():
            self._contexts[row, step] = obs[row, known[row] : length[row]].astype(np.int32)
        self.actions[step] = np.asarray(action).reshape(-1)
        self.rewards[step] = reward
        self.episode_starts[step] = episode_start
        self.values[step] = value.detach().cpu().numpy().reshape(-1)
        self.log_probs[step] = log_prob.detach().cpu().numpy().reshape(-1)
        self.lengths[step] = length
        if self.action_masks is not None:
            self.mask_ids[step] = self.action_masks.mask_id
        self._fill_to(self.pos + 1)

    def get_state(self) -> dict[str, th.Tensor]:
        """Return what has been stored of a rollout under way, up to the last step."""
        state = {name: th.from_numpy(getattr(self, name)[: self.pos].copy()) for name in STORED}
        contexts = [th.from_numpy(ids) for ids in self._contexts.values()]
        state["context_places"] = th.tensor(list(self._contexts), dtype=th.int32).reshape(-1, 2)
        state["context_lengths"] = th.tensor([len(ids) for ids in contexts], dtype=th.int32)
        state["context_ids"] = th.cat([th.zeros(0, dtype=th.int32), *contexts])
        return state

    def set_state(self, state: Mapping[str, th.Tensor]) -> None:
        """Go on from `get_state`: the next `reset` leaves what is stored.

        Raises:
            ValueError: If the rollout has other rows, or more steps than this buffer.
        """
        n_steps, n_envs = state["actions"].shape
        if n_envs != self.n_envs or n_steps > self.buffer_size:
            raise ValueError(
                f"expected a rollout of {self.n_envs} rows and at most {self.buffer_size} steps, "
                f"got {n_envs} rows and {n_steps} steps"
            )
        self._goes_on = False
        self.reset()
        for name in STORED:
            getattr(self, name)[:n_steps] = state[name].numpy()
        parts = state["context_ids"].split(state["context_lengths"].tolist())
        for (row, step), ids in zip(state["context_places"].tolist(), parts, strict=True):
            self._contexts[row, step] = ids.numpy().copy()
        self._fill_to(n_steps)
        self._goes_on = True

    def observations(self) -> Iterator[np.ndarray]:
        """Yield what was seen at each stored step, (n_envs, L) ids, from the first to the last."""
        obs = np.full((self.n_envs, *self.obs_shape), PAD, dtype=np.int64)
        for step in range(self.pos):
            length = self.lengths[step]
            begins = (self.episode_starts[step] > 0) | (step == 0) | (length == 0)
            obs[begins] = PAD
            known = np.where(begins, 0, self.lengths[step - 1] + 1)
            gone_on = np.flatnonzero(~begins)
            obs[gone_on, known[gone_on] - 1] = self.actions[step - 1, gone_on]
            for row in np.flatnonzero(length > known).tolist():
                obs[row, known[row] : length[row]] = self._contexts[row, step]
            yield obs.copy()

    def drop(self) -> None:
        """Let the next `reset` empty the buffer, whatever `set_state` has put there."""
        self._goes_on = False

    def take_back(self) -> None:
        """Forget the step stored last."""
        step = self.pos - 1
        for row in range(self.n_envs):
            self._contexts.pop((row, step), None)
        self._fill_to(step)

    def _fill_to(self, n_steps: int) -> None:
        self.pos, self.full = n_steps, n_steps == self.buffer_size
        self.segments = self._cut() if self.full else []

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Compute returns and advantages, after `before_advantages`.

        Whitening takes mean and (unbiased) standard deviation over all tokens of the rollout,
        those of other ranks included.

        Raises:
            NonFiniteError: If a reward, value or log-probability is not finite, and its sequence
                is not to be left out.
            ValueError: If there is nothing to learn from.
        """
        if self.n_tokens == 0:
            raise ValueError(
                "expected tokens to learn from, got none: all rows were held from the start; an "
                "environment that holds ended rows needs whole_episodes=True"
            )
        last = np.where(dones, 0, last_values.detach().cpu().numpy().reshape(-1))
        self._leave_out_nonfinite(last)
        self.before_advantages()
        self.estimate_advantages(self.to_torch(np.where(self.lengths[-1] > 0, last, 0)), dones)
        trained = self.lengths > 0
        everywhere = ranks.gather_tokens(self.to_torch(self.advantages[trained])).cpu().numpy()
        if self.whiten_advantages and len(everywhere) > 1:
            mean, deviation = everywhere.mean(), everywhere.std(ddof=1)
            self.advantages[trained] = (self.advantages[trained] - mean) / (deviation + 1e-8)

    def estimate_advantages(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Fill `returns` and `advantages` by SB3's recursion (GAE)."""
        super().compute_returns_and_advantage(last_values, dones)

    def _leave_out_nonfinite(self, last_values: np.ndarray) -> None:
        """Leave out what was sampled with numbers that are not finite, or raise.

        Args:
            last_values: (n_envs,), what follows the rollout's last step; 0 where nothing does.
        """
        last = np.zeros_like(self.values)
        last[-1] = last_values
        numbers = {"reward": self.rewards, "value": self.values, "value of the rest": last}
        numbers["log_prob"] = self.log_probs
        bad = {name: ~(np.abs(array) <= LARGEST) for name, array in numbers.items()}
        any_bad = np.any(list(bad.values()), axis=0) & (self.lengths > 0)
        if not any_bad.any():
            return
        found = [s for s in self.segments if any_bad[s.start : s.end, s.row].any()]
        if not self.skip_nonfinite:
            step, row = np.argwhere(any_bad)[0]
            source = next(name for name, at in bad.items() if at[step, row])
            segment = next(s for s in found if s.row == row and s.start <= step < s.end)
            ids = self._ids(segment._replace(end=step + 1)).astype(np.int64)
            raise NonFiniteError(source, float(numbers[source][step, row]), ids)
        self._leave_out(found)

    def _leave_out(self, segments: list[Segment]) -> None:
        """Treat the steps of these segments as a held row's: nobody learns from them."""
        places = {(s.row, s.start) for s in segments}
        for s in segments:
            for array in (self.rewards, self.values, self.log_probs, self.lengths):
                array[s.start : s.end, s.row] = 0
        self.segments = [s for s in self.segments if (s.row, s.start) not in places]
        self.n_left_out += len(segments)
        self.n_tokens_left_out += sum(s.n_tokens for s in segments)

    @property
    def n_tokens(self) -> int:
        """Tokens of the rollout that are trained on."""
        return int((self.lengths > 0).sum())

    def get(self, batch_size: int | None = None) -> Iterator[TokenRolloutSamples]:  # type: ignore[override]
        """Yield the rollout once, in random minibatches of about `batch_size` tokens.

        With several ranks a minibatch is one of all of them: sequences and actions are this
        rank's, everything else (old values, log-probabilities, advantages, returns) is gathered.

        The first minibatch after a rollout carries the old log-probabilities in its `TokenBatch`
        too, for the policy to check.
        """
        assert self.full, "the rollout is not complete"
        order = np.random.permutation(len(self.segments))
        n_tokens = int(ranks.total(self.n_tokens))
        n_parts = n_minibatches(n_tokens, batch_size or n_tokens)
        for batch, index in self._batches(order, ranks.agree_on_parts(n_parts, len(order))):
            at = tuple(index)
            packed = [
                self.to_torch(array[at])
                for array in (self.values, self.log_probs, self.advantages, self.returns)
            ]
            if self._first_minibatch:
                batch = batch._replace(old_log_prob=packed[1])
                self._first_minibatch = False
            actions = self.to_torch(self.actions[at]).long()
            yield TokenRolloutSamples(batch, actions, *map(ranks.gather_tokens, packed))

    def batches(
        self, order: np.ndarray, batch_size: int
    ) -> Iterator[tuple[TokenBatch, np.ndarray]]:
        """Yield the segments in the given order, as sequences of about `batch_size` tokens.

        Returns:
            Batches, each with the places of its packed tokens in the buffer's arrays: (2, N)
            int, steps and rows.
        """
        n_tokens = sum(self.segments[i].n_tokens for i in order)
        n = n_minibatches(n_tokens, batch_size)
        if self.in_step:
            n = ranks.agree_on_parts(n, len(order))
        yield from self._batches(order, n)

    def _batches(self, order: np.ndarray, n: int) -> Iterator[tuple[TokenBatch, np.ndarray]]:
        masks = None if self.action_masks is None else self.action_masks.table()
        for part in self._deal(order, n):
            yield self._batch(part, masks)

    def keep_frozen(self, run: Callable[[TokenBatch], list[th.Tensor]], batch_size: int) -> None:
        """Run each sequence through layers that do not learn; batches bring the states from now.

        Args:
            run: Gives the states (length, H) of each sequence of a batch.
            batch_size: Tokens to run at a time, about.
        """
        states: dict[int, th.Tensor] = {}
        for part in self._deal(self.by_length(), n_minibatches(self.n_tokens, batch_size)):
            batch, _ = self._batch(part, None)
            states.update(zip(part.tolist(), run(batch), strict=True))
        self._frozen = [states[i] for i in range(len(self.segments))]

    def _deal(self, order: np.ndarray, n: int) -> list[np.ndarray]:
        return deal(order, np.array([segment.n_tokens for segment in self.segments]), n)

    def by_length(self) -> np.ndarray:
        """Return the order of the segments from the shortest sequence to the longest."""
        last = [self.lengths[s.end - 1, s.row] for s in self.segments]
        return np.argsort(last, kind="stable")

    def _batch(self, part: np.ndarray, masks: th.Tensor | None) -> tuple[TokenBatch, np.ndarray]:
        segments = [self.segments[i] for i in part]
        ids = [self._ids(segment) for segment in segments]
        n_tokens = [s.n_tokens for s in segments]
        row = np.repeat(np.arange(len(segments)), n_tokens)
        position = np.concatenate([self.lengths[s.start : s.end, s.row] for s in segments]) - 1
        index = np.stack(
            (
                np.concatenate([np.arange(s.start, s.end) for s in segments]),
                np.repeat([s.row for s in segments], n_tokens),
            )
        )
        batch = TokenBatch(
            ids=self.to_torch(pad_right(ids)),
            row=self.to_torch(row),
            position=self.to_torch(position),
            mask_id=None if masks is None else self.to_torch(self.mask_ids[tuple(index)]).long(),
            masks=masks,
        )
        if self._frozen:
            states = [self._frozen[i] for i in part]
            batch = batch._replace(frozen=pad_sequence(states, batch_first=True))
        return batch, index

    def _ids(self, segment: Segment) -> np.ndarray:
        """What was seen at a segment's last step, (C,) int32."""
        _, start, end, context, inserted = segment
        parts = [context]
        for step, ids in inserted:
            if step < end:
                parts += [self.actions[start:step, segment.row], ids]
                start = step
        return np.concatenate((*parts, self.actions[start : end - 1, segment.row]))

    def _cut(self) -> list[Segment]:
        """Cut the rows' steps into segments, in the order of rows, then steps."""
        segments = []
        for row in range(self.n_envs):
            stops = [step for step in range(self.buffer_size) if self._ends_segment(row, step)]
            given = sorted(step for r, step in self._contexts if r == row)
            for start in (step for step in given if step == 0 or self.episode_starts[step, row]):
                end = next(stop for stop in stops if stop >= start) + 1
                inserted = ((step, self._contexts[row, step]) for step in given)
                within = tuple(item for item in inserted if start < item[0] < end)
                segments.append(Segment(row, start, end, self._contexts[row, start], within))
        return segments

    def _ends_segment(self, row: int, step: int) -> bool:
        """Say whether a row's episode, or the rollout, ends with this step."""
        last = step == self.buffer_size - 1
        return last or bool(self.episode_starts[step + 1, row])

    def _check_continuity(self, obs: np.ndarray, length: np.ndarray, known: np.ndarray) -> None:
        """Require that rows in mid-episode go on where they ended; `known` is 0 for others."""
        rows = np.flatnonzero((known > 0) & (length > 0))
        grown = (length[rows] >= known[rows]) & (known[rows] > 1)  # 1: it was held
        token = obs[rows, known[rows] - 1] == self.actions[self.pos - 1, rows]
        if not (grown & token).all():
            row = rows[np.flatnonzero(~(grown & token))[0]]
            raise ValueError(
                f"expected row {row}'s observation to be its last one plus the token "
                f"{self.actions[self.pos - 1, row]}, got another: this buffer is for environments "
                "that append each action to the observation, such as TextEnvironment-v0"
            )
