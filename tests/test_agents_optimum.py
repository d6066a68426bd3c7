"""Learning, measured against a known optimum: every completion of a tiny task is enumerated.

max over π of E_π[r] − β·KL(π‖π_ref) is β·log E_ref[exp(r/β)]. The task: six letters and EOS,
at most 4 tokens; the untouched reference reaches 0 % of the gain by definition.
"""

import itertools

import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2

import text_env
from agents import TokenPPO
from agents.sequences import TokenBatch

LETTERS, LENGTH, BETA = "abcdef", 4, 0.3


def score(completion: str) -> float:
    """What people here like: c's, a d at the end; not a's, nor a letter twice in a row."""
    runs = sum(x == y for x, y in itertools.pairwise(completion))
    liked = completion.count("c") + completion.endswith("d")
    return liked - 0.5 * completion.count("a") - runs


def all_completions(eos: int) -> list[tuple[int, ...]]:
    """Every episode: up to LENGTH letters, ended by EOS or by the budget."""
    letters = range(len(LETTERS))
    ended = [(*word, eos) for n in range(LENGTH) for word in itertools.product(letters, repeat=n)]
    return ended + list(itertools.product(letters, repeat=LENGTH))


def log_probs(model, prompt: int, completions: list[tuple[int, ...]]) -> np.ndarray:
    """Sum each completion's token log-probabilities by a full forward pass: (n,) nats."""
    ids = np.full((len(completions), LENGTH + 1), -1)
    ids[:, 0] = prompt
    for row, completion in zip(ids, completions, strict=True):
        row[1 : 1 + len(completion)] = completion
    row, column = np.nonzero(ids[:, 1:] >= 0)
    batch = TokenBatch(*(th.from_numpy(a) for a in (ids, row, column)))
    with th.no_grad():
        found = model.token_statistics(
            batch, model.hidden_at(batch), th.from_numpy(ids[:, 1:][row, column])
        )
    return np.bincount(row, weights=found.log_prob.numpy(), minlength=len(ids))


def value_of(log_p: np.ndarray, log_q: np.ndarray, scores: np.ndarray) -> float:
    p = np.exp(log_p)
    return float((p * (scores - BETA * (log_p - log_q))).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_token_ppo_closes_the_gap_to_the_exact_optimum(seed: int) -> None:
    tokenizer = letter_tokenizer(LETTERS)
    env = text_env.TextVecEnv(
        num_envs=64,
        tokenizer=tokenizer,
        prompts=[">"],
        reward_fn=lambda prompts, completions: [score(c) for c in completions],
        max_new_tokens=LENGTH,
        allowed_token_ids=range(len(LETTERS)),
    )
    model = TokenPPO(
        "CausalLMPolicy",
        env,
        learning_rate=lambda progress: 1e-3 * progress,
        n_steps=16,
        batch_size=512,
        n_epochs=4,
        kl_coef=BETA,
        policy_kwargs={"lm": tiny_gpt2(len(tokenizer), seed=seed)},
        seed=seed,
        device="cpu",
    )
    completions = all_completions(tokenizer.eos_token_id)
    prompt = tokenizer.convert_tokens_to_ids(">")
    scores = np.array([score(tokenizer.decode(c, skip_special_tokens=True)) for c in completions])
    log_ref = log_probs(model.reference, prompt, completions)
    assert np.exp(log_ref).sum() == pytest.approx(1, abs=1e-4)  # nothing is left out

    reference = float((np.exp(log_ref) * scores).sum())
    optimum = BETA * float(np.log((np.exp(log_ref) * np.exp(scores / BETA)).sum()))
    model.learn(64 * 16 * 60)
    reached = value_of(log_probs(model.policy, prompt, completions), log_ref, scores)
    gain = (reached - reference) / (optimum - reference)
    print(f"{reference:.3f} -> {reached:.3f} of {optimum:.3f}: {gain:.1%}")
    assert 0.95 <= gain <= 1 + 1e-6
