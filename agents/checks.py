"""Does a language model keep what training relies on? Each check looks, and says so in a sentence.

A check never raises because of what it finds: `attempt` turns an error into a verdict, too. The
reward is checked in `agents.reward_checks`; speed and memory are in `agents.forecast`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.decoder import CachedDecoder
from agents.policy import CausalLMPolicy
from agents.sequences import PAD, TokenBatch, pad_right
from agents.states import run, sequence_states

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""How far (nats) log-probabilities may lie from those of a plain forward pass: the largest error in
float32, where rounding makes 1e-4 in SmolLM2's 30 layers, and left padding without position ids 34
in GPT-2; the mean in bfloat16, where the decoder's head rounds a logit of 16 to 1/8."""

Level = Literal["ok", "look", "wrong"]
"""`look`: training works, but a person should know. `wrong`: it will not do what it should."""


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        name: What was looked at.
        level: `ok`, `look` or `wrong`.
        said: The finding in a sentence, with its numbers and what to do.
        figures: The numbers by name.
    """

    name: str
    level: Level
    said: str
    figures: dict[str, float] = field(default_factory=dict)


def attempt(name: str, check: Callable[..., Verdict], *arguments: Any) -> Verdict:
    """Return a check's verdict; one that fails is wrong, with the error as its reason."""
    try:
        return check(*arguments)
    except Exception as error:  # whatever a user's model or reward does
        logger.debug("check %s", name, exc_info=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        return Verdict(name, "wrong", f"the check failed with {type(error).__name__}: {reason}")


# ------------------------------------------------------------------- model and tokenizer


def check_vocabulary(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """Every token of the tokenizer needs a row in the model's embedding and in its head."""
    n_tokens = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    head = lm.get_output_embeddings()
    n_in = lm.get_input_embeddings().weight.shape[0]
    n_out = n_in if head is None else head.weight.shape[0]
    rows = min(n_in, n_out)
    figures = {"tokenizer": float(n_tokens), "embedding": float(n_in), "head": float(n_out)}
    if n_tokens > rows:
        said = (
            f"the tokenizer has {n_tokens} tokens, the model {rows}: load both from one folder, or "
            "resize the model's embeddings and train them"
        )
        return Verdict("vocabulary", "wrong", said, figures)
    unused = rows - n_tokens
    if unused > 0.1 * rows:
        said = (
            f"the model has {rows} tokens, the tokenizer only {n_tokens}: is it the model's own? "
            "The others are never chosen"
        )
        return Verdict("vocabulary", "look", said, figures)
    said = f"{n_tokens} tokens" + (f", and {unused} rows that are never chosen" if unused else "")
    return Verdict("vocabulary", "ok", said, figures)


def check_end_token(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """The tokenizer's EOS is what ends a completion; the model should think so too."""
    eos, name = tokenizer.eos_token_id, "end token"
    if eos is None:
        said = (
            "the tokenizer has no EOS: every completion will run to max_new_tokens. Set "
            "tokenizer.eos_token to what ended the model's training texts"
        )
        return Verdict(name, "wrong", said)
    ends: set[int] = set()
    for config in (lm.config.get_text_config(), lm.generation_config):
        value = getattr(config, "eos_token_id", None)
        ends |= set() if value is None else set(value if isinstance(value, list) else [value])
    told = f"EOS is {tokenizer.eos_token!r} ({eos})"
    if ends and eos not in ends:
        said = (
            f"{told}, but the model's config ends texts with {sorted(ends)}: pass these as "
            "eos_token_ids, or set tokenizer.eos_token"
        )
        return Verdict(name, "look", said)
    if others := sorted(ends - {eos}):
        said = f"{told}; the model ends texts with {others} too: eos_token_ids takes several"
        return Verdict(name, "look", said)
    return Verdict(name, "ok", told)


def check_padding_token(tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """Padding that looks like EOS hides the end of text from most trainers' losses."""
    pad, eos, name = tokenizer.pad_token_id, tokenizer.eos_token_id, "padding token"
    if pad is not None and pad == eos:
        said = (
            f"padding is EOS ({tokenizer.pad_token!r}): no matter here, where -1 is padding, but a "
            "warm start by a trainer that masks padding never learns to end; see that it ended"
        )
        return Verdict(name, "look", said)
    if pad is None:
        return Verdict(name, "ok", "there is none, and none is needed: -1 is padding here")
    return Verdict(name, "ok", f"{tokenizer.pad_token!r} ({pad}), which is not EOS; never chosen")


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """Without a chat template, prompts have to be plain texts."""
    there = bool(getattr(tokenizer, "chat_template", None))
    said = "there is one" if there else "there is none: prompts are plain texts, not conversations"
    return Verdict("chat template", "ok", said)


# --------------------------------------------------------------------- the invariants


class Walked(NamedTuple):
    """A sequence that the policy wrote token by token.

    Attributes:
        ids: (L,) int64, prompt and completion.
        n_prompt: Tokens of the prompt.
        log_probs: (L - n_prompt,), as they were when the tokens were chosen, nats.
    """

    ids: np.ndarray
    n_prompt: int
    log_probs: np.ndarray


@th.no_grad()
def walk(policy: CausalLMPolicy, prompts: Sequence[np.ndarray], n_tokens: int) -> list[Walked]:
    """Let the policy write, one row per prompt, as in a rollout with continuous batching.

    Half of the rows begin anew on the way, each at another step and with the next row's prompt,
    so that some are prefilled beside others that go on.

    Args:
        policy: Who writes.
        prompts: Ids of each row's prompt, of several lengths.
        n_tokens: Steps.

    Returns:
        All sequences, those that were broken off too. Nothing ends at EOS.
    """
    width = policy.observation_space.shape[0]
    rows = [Walked(prompt, len(prompt), np.zeros(0)) for prompt in prompts]
    anew = {2 + row % max(1, n_tokens - 3): row for row in range(0, len(rows), 2)}
    done = []
    policy.forget()
    for step in range(n_tokens):
        if step in anew and len(rows) > 1:
            row = anew[step]
            done.append(rows[row])
            prompt = prompts[(row + 1) % len(prompts)]
            rows[row] = Walked(prompt, len(prompt), np.zeros(0))
        obs = np.full((len(rows), width), PAD, dtype=np.int64)
        for row, walked in enumerate(rows):
            obs[row, : len(walked.ids)] = walked.ids
        tokens, _, log_prob = policy.forward(th.as_tensor(obs, device=policy.device))
        rows = [
            Walked(np.append(w.ids, int(token)), w.n_prompt, np.append(w.log_probs, float(p)))
            for w, token, p in zip(rows, tokens, log_prob, strict=True)
        ]
    policy.forget()
    return [walked for walked in [*done, *rows] if len(walked.log_probs)]


@th.no_grad()
def plain_log_probs(policy: CausalLMPolicy, ids: np.ndarray) -> th.Tensor:
    """Return log π of all tokens after each of the ids, (L, V): no cache, no padding, no batch.

    Written as simply as can be, to be compared with. Where an encoder reads the prompt, nothing
    follows its tokens but the last.
    """
    tokens = th.as_tensor(ids, device=policy.device)[None].long()
    with policy.autocast():
        hidden = sequence_states(policy.lm, tokens)[0]
    products = policy.lm.get_output_embeddings()(hidden.float()).float()
    logits = policy.capping(products)[:, : policy.vocab_size]
    logits = (logits / policy.temperature).masked_fill(~policy.allowed_tokens, -th.inf)
    return logits.log_softmax(dim=1)


def chosen(walked: Walked, log_probs: th.Tensor) -> np.ndarray:
    """Return the log-probabilities of a sequence's own tokens, out of (L, V)."""
    tokens = th.as_tensor(walked.ids[walked.n_prompt :], device=log_probs.device)
    states = log_probs[walked.n_prompt - 1 : len(walked.ids) - 1]
    return states.gather(1, tokens[:, None])[:, 0].cpu().numpy()


def distance(policy: CausalLMPolicy, errors: Sequence[np.ndarray]) -> tuple[float, str]:
    """Return what counts of some errors (nats): the largest in float32, the mean in bfloat16."""
    together = np.abs(np.concatenate(errors))
    if policy.dtype == th.float32:
        return float(together.max()), "at most"
    return float(together.mean()), "on average"


def tolerance_of(policy: CausalLMPolicy) -> float:
    """Return the `TOLERANCE` of a policy."""
    return TOLERANCE[str(policy.dtype).removeprefix("torch.")]


def check_cache(policy: CausalLMPolicy, walked: Sequence[Walked]) -> Verdict:
    """Log-probabilities from cached decoding are those of a full forward pass."""
    errors = [w.log_probs - chosen(w, plain_log_probs(policy, w.ids)) for w in walked]
    error, which = distance(policy, errors)
    tolerance = tolerance_of(policy)
    n_tokens = sum(len(e) for e in errors)
    figures = {"error": error, "tolerance": tolerance, "tokens": float(n_tokens)}
    told = f"{which} {error:.1e} nats over {n_tokens} tokens (tolerance {tolerance:.0e})"
    if error <= tolerance and policy.decoder.why_uncached:
        said = (
            f"{type(policy.lm).__name__} cannot be cached ({policy.decoder.why_uncached}): each "
            f"token is computed from its whole sequence, which is slow and right: {told}"
        )
        return Verdict("cache", "look", said, figures)
    if error <= tolerance:  # NaN is not
        return Verdict(
            "cache", "ok", f"cached decoding equals a full forward pass: {told}", figures
        )
    said = (
        f"cached decoding differs from a full forward pass by {told}: the model does not use "
        "position_ids, attention_mask or its cache as transformers' models do, so what is trained "
        "would not be what is sampled"
    )
    return Verdict("cache", "wrong", said, figures)


@th.no_grad()
def check_padding(policy: CausalLMPolicy, walked: Sequence[Walked]) -> Verdict:
    """Sequences give the same padded in a batch, on either side, as they give alone."""
    batch, actions = whole_batch(policy, walked)
    found = policy.token_statistics(batch, policy.hidden_at(batch), actions).log_prob.cpu().numpy()
    plain = np.concatenate([chosen(w, plain_log_probs(policy, w.ids)) for w in walked])
    right, which = distance(policy, [found - plain])
    tolerance = tolerance_of(policy)
    figures = {"right": right, "tolerance": tolerance}
    if not right <= tolerance:
        said = (
            f"sequences padded to the right differ by {which} {right:.1e} nats from each alone "
            f"(tolerance {tolerance:.0e}): the model looks ahead, so it is not causal"
        )
        return Verdict("padding", "wrong", said, figures)
    if type(policy.decoder) is not CachedDecoder:
        said = f"sequences padded to the right give what each gives alone ({right:.0e})"
        return Verdict("padding", "ok", f"{said}; no others are used with this model", figures)
    left, without = left_padded(policy, [w.ids for w in walked])
    figures |= {"left": left, "left_without_positions": without}
    if not left <= tolerance:
        said = (
            f"sequences padded to the left, with mask and position ids, differ by {which} "
            f"{left:.1e} nats from each alone (tolerance {tolerance:.0e}): the model ignores "
            "its attention_mask or position_ids, which decoding needs"
        )
        return Verdict("padding", "wrong", said, figures)
    said = f"right and left padding give what each sequence gives alone ({right:.0e}, {left:.0e})"
    if without > 10 * tolerance:
        said += f"; left without position ids would be off by {without:.1g} nats"
    return Verdict("padding", "ok", said, figures)


@th.no_grad()
def left_padded(policy: CausalLMPolicy, sequences: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the errors (nats) of left padding, with position ids and without.

    Of the likeliest token after each sequence, as `distance` counts errors.
    """
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :], mask[row, longest - len(sequence) :] = sequence, 1
    alone = [plain_log_probs(policy, sequence)[-1].max(dim=0) for sequence in sequences]
    tokens, attention = (th.as_tensor(x, device=policy.device) for x in (ids, mask))
    errors = []
    for positions in ({"position_ids": (attention.cumsum(1) - 1).clamp(min=0)}, {}):
        with policy.autocast():
            inputs = {"input_ids": tokens, "attention_mask": attention, **positions}
            hidden = run(policy.lm, **inputs, use_cache=False)[:, -1]
        head = policy.head()
        log_p = head.logits(hidden.float()).log_softmax(dim=1)
        found = [
            float(row[head.place_of[best.indices]] - best.values)
            for row, best in zip(log_p, alone, strict=True)
        ]
        errors.append(distance(policy, [np.array(found)])[0])
    return errors[0], errors[1]


def whole_batch(policy: CausalLMPolicy, walked: Sequence[Walked]) -> tuple[TokenBatch, th.Tensor]:
    """Return sequences as the update sees them, right-padded, and their tokens (N,)."""
    counts = [len(w.log_probs) for w in walked]
    row = np.repeat(np.arange(len(walked)), counts)
    position = np.concatenate(
        [w.n_prompt - 1 + np.arange(n) for w, n in zip(walked, counts, strict=True)]
    )
    tokens = np.concatenate([w.ids[w.n_prompt :] for w in walked])
    arrays = (pad_right([w.ids[:-1] for w in walked]), row, position, tokens)
    ids, rows, positions, actions = (th.as_tensor(x, device=policy.device) for x in arrays)
    return TokenBatch(ids, rows, positions), actions.long()


@th.no_grad()
def check_temperature(
    policy: CausalLMPolicy, prompt: np.ndarray, n_draws: int = 2048, n_rows: int = 64
) -> Verdict:
    """Tokens are drawn from the distribution that they are evaluated with.

    If tokens come from p, the mean of log p(token) is -H(p), and its standard error is known.
    """
    log_p = plain_log_probs(policy, prompt)[-1]
    p = log_p.exp()
    surprise = th.where(p > 0, -log_p, 0.0)
    entropy = float((p * surprise).sum())
    variance = float((p * surprise**2).sum()) - entropy**2
    obs = np.full((n_rows, policy.observation_space.shape[0]), PAD, dtype=np.int64)
    obs[:, : len(prompt)] = prompt
    observed = th.as_tensor(obs, device=policy.device)
    draws = [policy.forward(observed) for _ in range(-(-n_draws // n_rows))]
    tokens = th.cat([tokens for tokens, _, _ in draws])
    log_prob = th.cat([log_prob for _, _, log_prob in draws])
    policy.forget()
    error, which = distance(policy, [(log_prob - log_p[tokens]).cpu().numpy()])
    tolerance = tolerance_of(policy)
    mean = float(log_p[tokens].mean())
    # Where the policy is almost sure, rounding is more than chance.
    z = (mean + entropy) / max(np.sqrt(max(variance, 0) / len(tokens)), 0.2 * tolerance)
    figures = {"temperature": policy.temperature, "entropy": entropy, "z": z, "error": error}
    if not (error <= tolerance and abs(z) <= 5):
        said = (
            f"tokens are not drawn from the distribution they are evaluated with: over "
            f"{len(tokens)} draws log p is {mean:.3f} on average, and -{entropy:.3f} was expected "
            f"({abs(z):.0f} standard errors); log-probabilities differ by {which} {error:.1e} nats"
        )
        return Verdict("temperature", "wrong", said, figures)
    said = (
        f"{policy.temperature:g} in sampling and evaluation alike: {len(tokens)} draws have an "
        f"entropy of {-mean:.2f} nats, {entropy:.2f} computed"
    )
    return Verdict("temperature", "ok", said, figures)


def check_ends(
    policy: CausalLMPolicy,
    walked: Sequence[Walked],
    end_ids: Sequence[int],
    finish_reasons: Sequence[str],
    min_new_tokens: int,
    max_new_tokens: int,
) -> Verdict:
    """Completions can end, and do.

    Args:
        policy: Who writes.
        walked: Sequences for the probability of EOS.
        end_ids: Tokens that end a completion.
        finish_reasons: How sampled completions ended: eos, stop or length.
        min_new_tokens: Tokens before EOS is allowed.
        max_new_tokens: Longest completion.
    """
    name, ends = "ending", th.as_tensor(list(end_ids), device=policy.device).long()
    known = ends[ends < policy.vocab_size]
    stopped = "stop" in finish_reasons
    forbidden = not bool(policy.allowed_tokens[known].any()) or min_new_tokens >= max_new_tokens
    if forbidden and not stopped:
        why = (
            f"min_new_tokens ({min_new_tokens}) leaves no place for it in max_new_tokens "
            f"({max_new_tokens})"
            if min_new_tokens >= max_new_tokens
            else "no end token is among the tokens that may be chosen"
        )
        return Verdict(name, "wrong", f"EOS is never allowed: {why}; every completion runs out")
    shares = [
        plain_log_probs(policy, w.ids)[w.n_prompt - 1 :, known].exp().sum(dim=1).mean()
        for w in walked
    ]
    probability = float(th.stack(shares).mean()) if shares else 0.0
    ended = sum(reason != "length" for reason in finish_reasons)
    n = len(finish_reasons)
    figures = {"ended": ended / max(n, 1), "probability": probability}
    if ended == 0:
        said = (
            f"none of {n} completions ended within {max_new_tokens} tokens; EOS has a probability "
            f"of {probability:.1e} per token: warm-start on texts that end with it, raise "
            "max_new_tokens, or set missing_eos_penalty"
        )
        return Verdict(name, "look", said, figures)
    said = (
        f"{ended} of {n} completions ended within {max_new_tokens} tokens; EOS has a probability "
        f"of {probability:.2g} per token"
    )
    return Verdict(name, "ok", said, figures)
