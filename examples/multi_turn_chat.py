"""A conversation in which the second answer is right only if the first one asked.

    python examples/multi_turn_chat.py [--tokens 40000]

Each user keeps a letter. Asked with "?", they tell it; to anything else they say "!". The second
answer is worth a point if it begins with the user's letter. So a policy has to learn to ask,
which nothing rewards at once, and to read what the user said then. What the user says comes from a
callable, text in, text out; its tokens are read, and get no loss, no KL and no reward. A tiny
model, made here, learns it in some ten seconds of one core; who guesses scores at most 0.25.
"""

import argparse
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from agents import TokenPPO
from agents.writing import write_episodes
from text_env import TextVecEnv

LETTERS = "abcd"
MAX_TURNS, MAX_NEW_TOKENS = 2, 2
"""The assistant's turns in a conversation, and the tokens of each."""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per character, with a chat template."""
    tokens = [*LETTERS, "?", "!", "U", "A", "<eos>"]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="!"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    words.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'U' if m.role == 'user' else 'A' }}{{ m.content }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    return tokenizer


def user(conversations: list[list[dict[str, str]]], letter: list[str]) -> list[str | None]:
    """Speak for the users: tell the letter if asked for it.

    Args:
        conversations: B lists of messages, the last one the assistant's answer.
        letter: The prompts' column of this name, B letters.
    """
    asked = [messages[-1]["content"].startswith("?") for messages in conversations]
    return [mine if ask else "!" for mine, ask in zip(letter, asked, strict=True)]


def right_answer(
    prompts: list[Any], completions: list[list[dict[str, str]]], letter: list[str]
) -> list[float]:
    """Score conversations by their last answer; completions are lists of messages, as in TRL."""
    answers = [messages[-1]["content"] for messages in completions]
    return [float(a.startswith(mine)) for a, mine in zip(answers, letter, strict=True)]


class Curve(BaseCallback):
    """Keeps the mean score of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        scores = [episode["score"] for episode in self.model.finished_episodes]  # type: ignore[attr-defined]
        self.scores.append(sum(scores) / len(scores))


def train(n_tokens: int, seed: int = 0) -> tuple[list[float], list[dict[str, Any]]]:
    """Train on so many tokens; return each rollout's mean score, and a talk with each user."""
    tokenizer = chat_tokenizer()
    greeting = [{"role": "user", "content": "!"}]
    how = {
        "autoreset": False,
        "tokenizer": tokenizer,
        "prompts": [{"prompt": greeting, "letter": letter} for letter in LETTERS],
        "reward_fn": right_answer,
        "user_fn": user,
        "max_turns": MAX_TURNS,
        "max_user_tokens": 5,  # <eos>U?<eos>A
        "max_new_tokens": MAX_NEW_TOKENS,
        "allowed_token_ids": tokenizer.convert_tokens_to_ids([*LETTERS, "?"]),
    }
    th.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=32,
        initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    n_envs, n_steps = 128, MAX_TURNS * MAX_NEW_TOKENS
    model = TokenPPO(
        "CausalLMPolicy",
        TextVecEnv(n_envs, **how),
        learning_rate=lambda remaining: 5e-3 * remaining,
        n_steps=n_steps,
        batch_size=256,
        n_epochs=4,
        kl_coef=0.0,
        ent_coef=0.1,
        gae_lambda=1.0,
        whole_episodes=True,
        policy_kwargs={"lm": GPT2LMHeadModel(config)},
        seed=seed,
        device="cpu",
    )
    curve = Curve()
    model.learn(n_tokens, callback=curve)
    shown = TextVecEnv(len(LETTERS), shuffle=False, **how)
    return curve.scores, write_episodes(model.policy, shown, deterministic=True)


def main() -> None:
    """Train; print the curve and a conversation with each user."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=40_000)
    scores, episodes = train(parser.parse_args().tokens)
    for i in range(9, len(scores), 10):
        print(f"update {i + 1:3}: mean score {scores[i]:.2f}", flush=True)
    for episode in episodes:
        print("  ".join(f"{m['role']}: {m['content']}" for m in episode["messages"]))


if __name__ == "__main__":
    main()
