"""PPO on text without a framework: the loop that a practitioner would write in an afternoon.

Batched decoding with transformers' cache, until the last row has ended; one batched forward and
backward pass over the padded batch per epoch; torch's defaults for sampling and AdamW. The same
objective as TokenPPO: a KL penalty per token, GAE, whitened advantages, clipped ratio, value loss.
"""

import time

import torch as th
from transformers import DynamicCache

from benchmarks.timing import Timing
from benchmarks.workloads import Workload, reward

GAMMA, LAMBDA, CLIP, VF_COEF, KL_COEF, LEARNING_RATE, MAX_NORM = (
    1.0,
    0.95,
    0.2,
    0.5,
    0.05,
    1e-5,
    0.5,
)


class BareLoop:
    """One iteration writes a completion per prompt and learns from it."""

    def __init__(self, workload: Workload, dtype: str) -> None:
        self.workload = workload
        self.lm, self.reference = workload.model(), workload.model().requires_grad_(False)
        self.value_head = th.nn.Linear(self.lm.config.hidden_size, 1)
        self.parameters = [*self.lm.parameters(), *self.value_head.parameters()]
        self.optimizer = th.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)
        self.tokenizer, self.texts = workload.tokenizer(), workload.prompts()
        self.prompts = th.tensor(self.tokenizer(self.texts)["input_ids"])
        self.ends = th.tensor(workload.eos_token_ids, dtype=th.long)
        self.autocast = th.autocast("cpu", th.bfloat16, enabled=dtype == "bfloat16")

    def iterate(self) -> Timing:
        """Do one iteration."""
        start = time.perf_counter()
        ids, mask = self.write()
        rollout = time.perf_counter() - start
        n_prompt = self.prompts.shape[1]
        completions = [
            self.tokenizer.decode(row[n_prompt:][keep]) for row, keep in zip(ids, mask, strict=True)
        ]
        scores = th.tensor(reward(self.texts, completions))
        with th.no_grad():
            old_log_probs, values = self.evaluate(self.lm, ids)
            ref_log_probs, _ = self.evaluate(self.reference, ids)
        rewards = -KL_COEF * (old_log_probs - ref_log_probs) * mask
        last = mask.sum(dim=1) - 1
        rewards[th.arange(len(ids)), last] += scores
        advantages = self.gae(rewards, values, mask)
        returns = advantages + values
        inside = advantages[mask]
        advantages = (advantages - inside.mean()) / (inside.std() + 1e-8)
        begin = time.perf_counter()
        for _ in range(self.workload.n_epochs):
            log_probs, new_values = self.evaluate(self.lm, ids)
            ratio = (log_probs - old_log_probs).exp()
            surrogate = th.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            value_loss = (new_values - returns) ** 2
            loss = (VF_COEF * value_loss - surrogate)[mask].mean()
            self.optimizer.zero_grad()
            loss.backward()
            th.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            self.optimizer.step()
        end = time.perf_counter()
        return Timing(int(mask.sum()), end - start, rollout, end - begin)

    @th.no_grad()
    def write(self) -> tuple[th.Tensor, th.Tensor]:
        """Sample a completion per prompt: ids (B, P + T) and which of the T count, (B, T) bool."""
        ids, cache = self.prompts, DynamicCache(config=self.lm.config)
        running, counted = th.ones(len(ids), dtype=th.bool), []
        token = ids
        with self.autocast:  # around the loop: it casts the weights once
            for _ in range(self.workload.max_new_tokens):
                output = self.lm(
                    input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                probabilities = output.logits[:, -1].float().softmax(dim=-1)
                token = th.multinomial(probabilities, 1)
                ids = th.cat((ids, token), dim=1)
                counted.append(running)
                running = running & ~th.isin(token[:, 0], self.ends)
                if not bool(running.any()):
                    break
        return ids, th.stack(counted, dim=1)

    def evaluate(self, lm: th.nn.Module, ids: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Return log-probabilities and values of the completion tokens, (B, T) each."""
        n_prompt = self.prompts.shape[1]
        with self.autocast:
            output = lm(
                input_ids=ids[:, :-1],
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=ids.shape[1] - n_prompt,
            )
        log_probs = output.logits.float().log_softmax(dim=-1)
        chosen = log_probs.gather(2, ids[:, n_prompt:, None])[..., 0]
        hidden = output.hidden_states[-1][:, n_prompt - 1 :].float()
        return chosen, self.value_head(hidden)[..., 0]

    def gae(self, rewards: th.Tensor, values: th.Tensor, mask: th.Tensor) -> th.Tensor:
        """Return advantages (B, T): rewards after a row's end are 0, and so are values there."""
        values = values * mask
        advantages, after = th.zeros_like(rewards), th.zeros(len(rewards))
        for t in reversed(range(rewards.shape[1])):
            following = values[:, t + 1] if t + 1 < rewards.shape[1] else th.zeros(len(rewards))
            delta = rewards[:, t] + GAMMA * following - values[:, t]
            after = (delta + GAMMA * LAMBDA * after) * mask[:, t]
            advantages[:, t] = after
        return advantages
