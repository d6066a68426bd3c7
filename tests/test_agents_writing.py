"""`write_episodes`: a policy writes in environments other than the one that it was made for."""

import pytest
from conftest import letter_tokenizer, tiny_llama

from agents import CausalLMPolicy
from agents.language_model import Reference
from agents.writing import write_episodes
from text_env import TextVecEnv


def env_of(prompts: list[str]) -> TextVecEnv:
    env = TextVecEnv(
        num_envs=len(prompts),
        autoreset=False,
        tokenizer=letter_tokenizer(),
        prompts=prompts,
        shuffle=False,
        reward_fn=lambda prompts, completions, **_: [float(len(c)) for c in completions],
        max_new_tokens=5,
    )
    env.seed(0)
    return env


def policy_of(env: TextVecEnv) -> CausalLMPolicy:
    lm = tiny_llama(int(env.action_space.n))
    return CausalLMPolicy(env.observation_space, env.action_space, lambda _: 0.0, lm=lm)


@pytest.mark.parametrize("made_for", [["a>"], ["abcdefabcdef>"]], ids=["shorter", "longer"])
def test_the_prompts_may_have_other_lengths_than_the_training_s(made_for) -> None:
    env = env_of(["abc>", "fedcb>", "ab>"])
    written = []
    for policy in (policy_of(env_of(made_for)), policy_of(env)):
        reference = Reference(tiny_llama(int(env.action_space.n), seed=1), policy)
        env.seed(0)
        written.append(write_episodes(policy, env, reference, deterministic=True))
    for got, expected in zip(*written, strict=True):
        assert got["completion"] == expected["completion"]
        assert got["ref_kl"] == pytest.approx(expected["ref_kl"], abs=1e-5)


def test_sequences_beyond_the_models_positions_are_refused() -> None:
    policy = policy_of(env_of(["a>"]))
    with pytest.raises(ValueError, match="at most 128 tokens"):
        write_episodes(policy, env_of(["a" * 130 + ">"]))
