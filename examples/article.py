"""The article task, step by step: prompts about artificial intelligence, ratings from 1 to 5, PPO.

    python examples/article.py [--ask] [--model gpt2] [--total_timesteps 8000]

The listing that this project grew from had these steps: data, generation, human scores, an
environment `gym.make("TextEnvironment", texts=…, rewards=…)` whose reward is the score divided by
5, PPO, the mean reward on a test set. Here they are, in that order, as they have to be to work;
what had to be corrected is said at each step, and together in docs/article.md. With `--ask` you
give the scores; without it they come from article_ratings.csv, which we wrote and rated ourselves.
Three minutes on 2 cores; models are fetched once (180 MB).
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import text_env
from agents import CausalLMPolicy, SampleTextCallback, TokenPPO
from agents.writing import write_episodes
from reward_models import LearnedRewardModel, Rating, assets

RATINGS = Path(__file__).with_name("article_ratings.csv")
TEST_PROMPTS = (
    "The first thinking machine",
    "People trust AI",
    "An algorithm can",
    "Robots and humans",
    "Writing with AI",
    "The history of AI",
    "Smart assistants",
    "Deep learning",
)
"""Beginnings that nobody rated a text of, and that PPO is not trained on."""
BUDGET: dict[str, Any] = {
    "max_prompt_tokens": 32,
    "max_new_tokens": 32,
    "min_new_tokens": 6,
    "stop": ("\n",),
}


def load_ratings(path: Path) -> tuple[list[str], list[str], list[float]]:
    """Step 1, data: prompts, completions, and human scores from 1 to 5."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [[row[name] for row in rows] for name in ("prompt", "completion", "rating")]
    return columns[0], columns[1], [float(rating) for rating in columns[2]]


def generate(lm: str, prompts: Sequence[str], n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Step 2, generation: n completions of each prompt, sampled from the untrained model."""
    env = text_env.TextVecEnv(
        num_envs=n * len(prompts),
        group_size=n,
        autoreset=False,
        shuffle=False,
        tokenizer=lm,
        prompts=list(prompts),
        reward_fn=lambda prompts, completions, **_: [0.0] * len(completions),
        **BUDGET,
    )
    env.seed(seed)
    spaces = env.observation_space, env.action_space
    return write_episodes(CausalLMPolicy(*spaces, lambda _: 0.0, lm=lm, temperature=0.7), env)


def ask(episodes: Sequence[dict[str, Any]], answer: Callable[[str], str] = input) -> list[float]:
    """Step 3, human scores: a number from 1 to 5 for each text."""
    scores = []
    for episode in episodes:
        print(f"\n{episode['prompt']}{episode['completion']}")
        while (given := answer("1 (bad) to 5 (good): ").strip()) not in ("1", "2", "3", "4", "5"):
            print("a number from 1 to 5, please")
        scores.append(float(given))
    return scores


class FitReward:
    """Step 4, reward: a model of the scores, as the texts to come are none that people rated."""

    def __init__(self, encoder: str, epochs: float = 20) -> None:
        self.encoder, self.epochs = encoder, epochs

    def __call__(self, texts: Sequence[str], rewards: Sequence[float]) -> Callable[..., np.ndarray]:
        """Learn rewards in (0, 1], and return the function that predicts them for new texts."""
        model = LearnedRewardModel.from_pretrained(self.encoder)
        ratings = [Rating("", t, r, (0.0, 1.0)) for t, r in zip(texts, rewards, strict=True)]
        report = model.fit(ratings, 0.2, epochs=self.epochs, batch_size=8, learning_rate=2e-4)
        assert report.held_out is not None and report.held_out.ratings is not None
        held_out = report.held_out.ratings
        print(f"reward model: r = {held_out.pearson:.2f} on {held_out.n} texts held out")
        return lambda prompts, completions, **_: model.human_scale(prompts, completions)


def mean_reward(
    policy: CausalLMPolicy, task: dict[str, Any], repeats: int = 8
) -> tuple[float, list[dict[str, Any]]]:
    """Step 7, evaluation: the mean reward on the test prompts, and the texts."""
    env = text_env.TextVecEnv(
        num_envs=repeats * len(TEST_PROMPTS), group_size=repeats, autoreset=False, **task
    )
    env.seed(0)
    episodes = write_episodes(policy, env)
    return float(np.mean([episode["score"] for episode in episodes])), episodes


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Do all steps; return the mean reward on the test prompts before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", help="the language model: a folder or hub id; SmolLM2 if none")
    parser.add_argument("--encoder", help="where the reward model starts from; MiniLM if none")
    parser.add_argument("--ask", action="store_true", help="rate 24 texts yourself")
    parser.add_argument("--total_timesteps", type=int, default=8_000, help="tokens")
    parser.add_argument("--n_envs", type=int, default=64, help="texts written side by side")
    parser.add_argument("--samples", type=Path, default=Path("runs/article/samples.jsonl"))
    chosen = parser.parse_args(arguments)
    lm = chosen.model or str(assets.smollm2())
    encoder = chosen.encoder or str(assets.minilm())

    prompts, completions, scores = load_ratings(RATINGS)
    if chosen.ask:
        episodes = generate(lm, list(dict.fromkeys(prompts)), n=2)
        prompts = [episode["prompt"] for episode in episodes]
        completions = [episode["completion"] for episode in episodes]
        scores = ask(episodes)
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    rewards = [score / 5 for score in scores]

    # Step 5, the environment, as in the listing but for `fit_reward`: it is what answers for texts
    # that nobody has rated, which is to say for all that a policy writes.
    env = gym.make(
        "TextEnvironment",
        tokenizer=lm,
        texts=texts,
        rewards=rewards,
        fit_reward=FitReward(encoder),
        **BUDGET,
    )
    obs, _ = env.reset(seed=0)
    reward_fn = env.unwrapped.task.reward_fn  # type: ignore[attr-defined]
    print(f"an observation is {obs.shape[0]} ids, an action one of {env.action_space.n} tokens")

    # Step 6, PPO: the same task, many rows at a time; a language model as its policy.
    task = {"tokenizer": lm, "reward_fn": reward_fn, **BUDGET}
    rows = text_env.TextVecEnv(
        num_envs=chosen.n_envs, autoreset=False, prompts=list(dict.fromkeys(prompts)), **task
    )
    model = TokenPPO(
        "CausalLMPolicy",
        rows,
        learning_rate=5e-4,
        n_steps=BUDGET["max_new_tokens"],
        whole_episodes=True,
        batch_size=512,
        n_epochs=2,
        kl_coef=0.005,  # rewards are between 0.2 and 1 here
        policy_kwargs={"lm": lm, "temperature": 0.7, "trainable_layers": 6},
        seed=0,
    )
    test = {**task, "prompts": list(TEST_PROMPTS)}
    before, _ = mean_reward(model.policy, test)
    chosen.samples.parent.mkdir(parents=True, exist_ok=True)
    model.learn(
        chosen.total_timesteps, callback=SampleTextCallback(chosen.samples), progress_bar=True
    )
    after, episodes = mean_reward(model.policy, test)
    print(f"mean reward on {len(TEST_PROMPTS)} test prompts: {before:.2f} -> {after:.2f}")
    for episode in episodes[:: len(episodes) // len(TEST_PROMPTS)]:
        print(f"  {episode['score']:.2f}  {episode['prompt']}{episode['completion']!r}")
    return before, after


if __name__ == "__main__":
    main()
