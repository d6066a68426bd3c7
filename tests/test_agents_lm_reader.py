"""A reader in conversations: a user's turn comes in one step, several tokens at once."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from test_agents_families import silent_but_for, tiny  # noqa: F401
from test_agents_turns import ASSISTANT, CHATS, VOCABULARY, chat_tokenizer, count_a, make_env

from agents import LMFeatures, LMReader, TopKActions, VecLMFeatures, VecTopKActions

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@th.no_grad()
def whole(lm, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Last states and log-probabilities by the model's own pass over each row: (n, H), (n, V)."""
    states, log_probs = [], []
    layer = lm.get_output_embeddings()
    handle = layer.register_forward_pre_hook(lambda _, given: states.append(given[0][0, -1]))
    for row in obs:
        ids = th.from_numpy(row[row >= 0])[None]
        log_probs.append(lm(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(0))
    handle.remove()
    return th.stack(states).numpy(), th.stack(log_probs).numpy()


@pytest.mark.parametrize(
    ("family", "autoreset"),
    [("gpt2", True), ("gpt2", False), ("gemma2", True), ("mamba", False), ("rwkv", True)],
)
def test_a_reader_reads_through_users_turns(family: str, autoreset: bool) -> None:
    """Rows of several lengths and turns, some held; asked again, aside and with masks."""
    env, lm = make_env(5, autoreset=autoreset), tiny(family, VOCABULARY)
    reader, rng = LMReader(lm, VOCABULARY, "cpu"), np.random.default_rng(0)
    env.seed(0)
    obs, n_inserted, n_held = env.reset(), 0, 0
    for _ in range(18):
        live = obs[:, 0] >= 0
        if not live.any():
            obs = env.reset()
            continue
        states, log_probs = whole(lm, obs[live])
        for found in (reader.read(obs), reader.read_aside(obs[::-1])[::-1], reader.read(obs)):
            np.testing.assert_allclose(found[live], states, atol=1e-4 * np.abs(states).max())
            assert not found[~live].any()
        np.testing.assert_allclose(reader.log_probs(obs)[live], log_probs, **CLOSE)
        masks = np.array(env.action_masks())
        expected = np.where(masks[live], log_probs, -np.inf)
        expected -= np.logaddexp.reduce(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(reader.log_probs(obs, masks)[live], expected, **CLOSE)
        best = np.argsort(-expected, axis=1)[:, :3]
        np.testing.assert_array_equal(reader.likeliest(obs, 3, masks)[live], best)
        before = (obs >= 0).sum(axis=1)
        obs, _, dones, _ = env.step(rng.choice(np.flatnonzero(env.allowed_tokens), 5))
        n_inserted += int((~dones & ((obs >= 0).sum(axis=1) > before + 1)).sum())
        n_held += int((~live).sum())
    assert n_inserted >= 5 and (n_held > 0) != autoreset


def test_wrappers_read_through_users_turns_one_environment_and_many() -> None:
    lm = tiny("llama", VOCABULARY)
    readers = [LMReader(lm, VOCABULARY, "cpu") for _ in range(4)]
    plain = make_env()
    many = VecLMFeatures(VecTopKActions(make_env(), readers[3], k=4), readers[3])
    how = {"tokenizer": chat_tokenizer(), "prompts": CHATS, "reward_fn": count_a}
    how |= {"max_new_tokens": 4, "allowed_token_ids": range(len(ASSISTANT))}
    ones = [
        LMFeatures(TopKActions(gym.make("TextEnvironment-v0", **how), reader, k=4), reader)
        for reader in readers[:3]
    ]
    plain.seed(0), many.seed(0)
    obs, seen = plain.reset(), many.reset()
    alone = [env.reset(seed=i)[0] for i, env in enumerate(ones)]
    rng, n_inserted, n_ended = np.random.default_rng(0), 0, 0
    for _ in range(18):
        states, log_probs = whole(lm, obs)
        np.testing.assert_allclose(seen, states, atol=1e-4)
        np.testing.assert_allclose(np.stack(alone), states, atol=1e-4)
        masks = np.array(plain.action_masks())
        ranks = rng.integers(0, 4, 3)
        tokens = np.argsort(-np.where(masks, log_probs, -np.inf), axis=1)[range(3), ranks]
        before = (obs >= 0).sum(axis=1)
        obs, rewards, dones, infos = plain.step(tokens)
        seen, ours, ends, told = many.step(ranks)
        np.testing.assert_array_equal((rewards, dones), (ours, ends))
        for i, env in enumerate(ones):
            alone[i], reward, ended, _, _ = env.step(int(ranks[i]))
            assert (reward, ended) == (rewards[i], dones[i])
            if ended:
                last = infos[i]["terminal_observation"]
                expected = whole(lm, last[None])[0][0]
                np.testing.assert_allclose(told[i]["terminal_observation"], expected, atol=1e-4)
                np.testing.assert_allclose(alone[i], expected, atol=1e-4)
                alone[i] = env.reset()[0]
                n_ended += 1
        n_inserted += int((~dones & ((obs >= 0).sum(axis=1) > before + 1)).sum())
    assert n_inserted >= 5 and n_ended >= 5
