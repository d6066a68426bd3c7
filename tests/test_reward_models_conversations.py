"""Reward functions of texts, of each answer in a conversation."""

import numpy as np
import pytest

from reward_models import EachAnswer
from reward_models.conversations import answers_of, as_texts, readable


def said(*texts: str) -> list[dict]:
    """Messages of user and assistant in turn, after the system's."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


CHATS = [said("be kind", "a", "bb", "c", "dddd"), said("be kind", "e", "f")]


class Recorded:
    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, *, prompts, completions, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return [float(len(text)) for text in completions]


def test_the_mean_over_answers_each_behind_what_was_said_before() -> None:
    inner = Recorded()
    scores = EachAnswer(inner)(
        prompts=[chat[:2] for chat in CHATS],
        completions=[chat[2:] for chat in CHATS],
        reference=["x", "y"],
    )
    assert scores.tolist() == [3.0, 1.0]
    assert inner.calls == [
        {
            "prompts": ["a\n", "a\nbb\nc\n", "e\n"],
            "completions": ["bb", "dddd", "f"],
            "reference": ["x", "x", "y"],
        }
    ]


def test_texts_are_handed_on_as_they_are() -> None:
    inner = Recorded()
    reward = EachAnswer(inner)
    assert reward(prompts=["p"], completions=["cc"], x=[1]) == [2.0]
    assert inner.calls == [{"prompts": ["p"], "completions": ["cc"], "x": [1]}]
    assert reward.asks_for == set() and reward.__name__ == "Recorded"


def test_episodes_of_one_turn_and_of_several() -> None:
    info = {"prompt": "<template>", "completion": "bb\ndddd", "messages": CHATS[0], "n_turns": 2}
    answers = answers_of([{"prompt": "p", "completion": "c", "k": 1}, {**info, "k": 2}], ["k"])
    assert answers.prompts == ["p", "a\n", "a\nbb\nc\n"]
    assert answers.completions == ["c", "bb", "dddd"] and answers.columns == {"k": [1, 2, 2]}
    np.testing.assert_allclose(answers.mean([1, 2, 4]), [1, 3])
    shown = readable(info)
    assert (shown["prompt"], shown["completion"]) == ("a", "bb\n**user:** c\n**assistant:** dddd")
    plain = {"prompt": "p", "completion": "c"}
    assert readable(plain) == plain == readable(plain, "p")
    assert readable({"prompt": "<|user|>a", "completion": "c"}, said("be kind", "a")) == {
        "prompt": "a", "completion": "c"
    }  # fmt: skip


def test_a_conversation_is_learned_from_as_its_last_answer_is_scored() -> None:
    for chat, n_turns in zip(CHATS, (2, 1), strict=True):
        info = {"prompt": "<template>", "completion": "c", "messages": chat, "n_turns": n_turns}
        answers = answers_of([info])
        assert "".join(as_texts(info)) == answers.prompts[-1] + answers.completions[-1]
        assert as_texts(info)[0] == answers.prompts[0]
    assert as_texts({"prompt": "p", "completion": "c", "messages": "a column"}) == ("p", "c")


def test_wrong_numbers_of_scores_are_refused() -> None:
    reward = EachAnswer(lambda prompts, completions: [1.0])
    with pytest.raises(ValueError, match="expected 3 scores, one per answer, got"):
        reward(prompts=[c[:2] for c in CHATS], completions=[c[2:] for c in CHATS])
