"""A reward that raises, hangs, or answers something else: one error with prompt and cause."""

import threading
import time

import numpy as np
import pytest
from conftest import letter_tokenizer

import text_env
from reward_models import TimeLimitedReward, checked_scores
from text_env.scoring import RewardError


def env_with(reward_fn) -> text_env.TextVecEnv:
    env = text_env.TextVecEnv(
        num_envs=2,
        tokenizer=letter_tokenizer(),
        prompts=[">a", ">b"],
        reward_fn=reward_fn,
        max_new_tokens=1,
        shuffle=False,
    )
    env.reset()
    return env


def raises(**_):
    raise KeyError("no such word")


def test_a_reward_that_raises_is_named_with_prompt_and_cause() -> None:
    env = env_with(raises)
    with pytest.raises(
        RewardError, match=r"raises raised KeyError: 'no such word' \(first of 2 prompts '>a'\)"
    ) as raised:
        env.step(np.array([0, 0]))
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "expected 2 scores, one per completion, got 1"),
        ([1.0, 2.0, 3.0], "got 3"),
        (
            ["1.0", "2.0"],
            r"expected a finite number, got '1.0' for the completion 'a' of the prompt",
        ),
        ("12", "expected a sequence of 2 numbers, got str"),
        (b"12", "expected a sequence of 2 numbers, got bytes"),
        (None, "got NoneType"),
        ([None, 1.0], "expected a finite number, got None"),
        ([[1.0], [2.0]], r"expected a finite number, got \[1.0\]"),
        ([1.0, float("nan")], "expected a finite number, got nan"),
        ([1.0, 1e39], r"expected a finite number, got 1e\+39"),  # infinite in float32
        ([1.0, 10**400], "expected a finite number, got 1000"),
        ([1j, 1.0], "expected a finite number"),
        (np.array([1.0, np.inf]), "expected a finite number, got inf"),
    ],
)
def test_a_wrong_answer_is_named_with_the_prompt(answer, message: str) -> None:
    env = env_with(lambda **_: answer)
    with pytest.raises(ValueError, match=message) as raised:
        env.step(np.array([0, 0]))
    assert "'>a'" in str(raised.value) or "'>b'" in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "scores", [["1.0", "2.0"], [None, 1.0], [10**400, 1], ["a", "b"], {"a": 1}, "12", [1j, 2j]]
)
def test_checked_scores_takes_numbers_only(scores) -> None:
    with pytest.raises(ValueError, match="expected numbers"):
        checked_scores(scores, ["a", "b"])


def test_a_reward_that_hangs_is_an_error_in_time() -> None:
    go_on = threading.Event()

    def hangs(prompts, **_):
        go_on.wait(30)
        return [0.0] * len(prompts)

    limited = TimeLimitedReward(hangs, seconds=0.2)
    env = env_with(limited)
    start = time.monotonic()
    with pytest.raises(
        RewardError, match=r"hangs raised TimeoutError: .*2 scores within 0\.2 s.*prompts '>a'"
    ) as raised:
        env.step(np.array([0, 0]))
    assert time.monotonic() - start < 5
    assert isinstance(raised.value.__cause__, TimeoutError)
    with pytest.raises(TimeoutError, match="an earlier call still hangs"):
        limited(prompts=["a"], completions=["b"])
    go_on.set()
    deadline = time.monotonic() + 10
    while limited._left.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(limited(prompts=["a"], completions=["b"])) == [0.0]


def test_a_time_limit_hands_answers_and_errors_on() -> None:
    limited = TimeLimitedReward(lambda completions, **_: [float(len(c)) for c in completions], 30)
    assert limited(prompts=["", ""], completions=["a", "bc"]) == [1.0, 2.0]
    with pytest.raises(KeyError, match="no such word"):
        TimeLimitedReward(raises, 30)(prompts=[""], completions=[""])
    with pytest.raises(ValueError, match="seconds > 0"):
        TimeLimitedReward(raises, 0)
