"""`group_size`: neighbouring rows get the same prompts, in all ways of seeding."""

import numpy as np
import pytest
from text_env_fixtures import arguments

from text_env import TextVecEnv, TextVectorEnv

PROMPTS = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
EOS = 2


def prompts_of(venv, resets: int = 5) -> np.ndarray:
    """The first ids of each row over some resets, (resets, B, 2)."""
    return np.stack([np.asarray(venv.reset())[:, :2] for _ in range(resets)])


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_of_a_group_share_their_prompts(seed, shuffle) -> None:
    venv = TextVecEnv(6, group_size=3, **arguments(prompts=PROMPTS, shuffle=shuffle))
    if seed is not None:
        assert venv.seed(seed) == [5, 5, 5, 6, 6, 6]
    seen = prompts_of(venv)
    for group in (seen[:, :3], seen[:, 3:]):
        assert (group == group[:, :1]).all()
    assert (seen[:, 0] != seen[:, 3]).any()  # the groups differ, if not at each reset
    assert len({tuple(row) for row in seen[:, 0].tolist()}) == 5  # without replacement


def test_groups_of_one_are_what_there_was() -> None:
    grouped, alone = (TextVecEnv(2, **changes, **arguments(prompts=PROMPTS))
                      for changes in ({"group_size": 1}, {}))  # fmt: skip
    grouped.seed(3), alone.seed(3)
    np.testing.assert_array_equal(prompts_of(grouped), prompts_of(alone))


def test_vector_env_too() -> None:
    envs = TextVectorEnv(4, group_size=2, autoreset_mode="SameStep", **arguments(prompts=PROMPTS))
    obs, _ = envs.reset(seed=1)
    for _ in range(4):
        assert (obs[::2] == obs[1::2]).all()
        obs, *_ = envs.step(np.full(4, EOS))
    other = TextVectorEnv(2, **arguments(prompts=PROMPTS))
    first, _ = other.reset(seed=1)
    np.testing.assert_array_equal(envs.reset(seed=1)[0][::2], first)


@pytest.mark.parametrize("face", [TextVecEnv, TextVectorEnv])
@pytest.mark.parametrize("group_size", [0, 3])
def test_a_group_size_that_does_not_fit(face, group_size) -> None:
    with pytest.raises(ValueError, match=f"group_size: expected a divisor .*4, got {group_size}"):
        face(4, group_size=group_size, **arguments())
