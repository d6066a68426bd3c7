"""A conversation with a policy, at the terminal."""

from collections.abc import Callable, Iterator

from configs.settings import Chat, Common, Writing
from stages.process import set_up
from stages.run_folder import left_by
from stages.writing import as_in_ppo, tokens_of, writer


def chat(common: Common, settings: Chat) -> None:
    """Talk with a run's policy at the terminal; it writes as it was trained to.

    With a chat template in its tokenizer it is given the conversation, and without one each text of
    yours, to go on from.
    """
    from agents.chat import converse
    from reward_models.feedback.terminal import visible

    if settings.user_fn is not None:
        raise ValueError(f"expected no user_fn, as you are the user, got {settings.user_fn}")
    set_up(common)
    folder = settings.run_folder
    settings = as_in_ppo(folder, settings)
    policy = settings.policy or str(left_by("ppo", folder / "policy"))
    write, templated = replies(common, settings, policy)
    converse(write, templated, visible)


def replies(
    common: Common, settings: Writing, lm: str
) -> tuple[Callable[[str | list[dict[str, str]]], Iterator[str]], bool]:
    """Return what writes after a text or conversation, as it grows, and if it takes the latter."""
    import numpy as np

    from agents.language_model import load_named, most_positions
    from text_env import TextVecEnv
    from text_env.vocabulary import load_tokenizer

    assert settings.max_new_tokens is not None
    tokenizer, model = load_tokenizer(lm), load_named(lm)
    templated = getattr(tokenizer, "chat_template", None) is not None
    positions = most_positions(model) or LONGEST_CHAT
    env = TextVecEnv(
        num_envs=1,
        autoreset=False,
        tokenizer=tokenizer,
        prompts=[[{"role": "user", "content": "?"}]] if templated else ["?"],
        reward_fn=lambda prompts, completions, **_: [0.0],
        max_prompt_tokens=min(positions, LONGEST_CHAT) - settings.max_new_tokens,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        allowed_token_ids=tokens_of(settings.vocabulary, tokenizer),
    )
    policy = writer(common, settings, env, model)

    def write(prompt: str | list[dict[str, str]]) -> Iterator[str]:
        env.set_options({"prompt": prompt})
        obs, done, info = env.reset(), False, {}
        n_prompt = int((obs[0] >= 0).sum())
        while not done:
            token, _ = policy.predict(obs, action_masks=np.array(env.action_masks()))
            obs, _, dones, infos = env.step(token)
            done, info = bool(dones[0]), infos[0]
            if not done:
                ids = obs[0][obs[0] >= 0]
                yield env.task.vocabulary.completion_text(ids[:n_prompt], ids[n_prompt:])
        yield info["completion"]

    return write, templated


LONGEST_CHAT = 2048
"""Tokens of a conversation that are looked at, at most."""
