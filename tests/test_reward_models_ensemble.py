"""Ensembles: arithmetic on members of known scores, and life on tiny models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from test_reward_models_learned import comparisons, make_backbone, ratings, sentences

from reward_models import LearnedRewardModel, RewardEnsemble, checked_scores

TEXTS = [text for text, _ in sentences(30)]
PROMPTS = [""] * len(TEXTS)


class Known:
    """A member whose logit of a text is known."""

    def __init__(self, logit: dict[str, float]) -> None:
        self.logit = logit

    def score(self, prompts: list[str], completions: list[str], batch_size: int) -> np.ndarray:
        return np.array([self.logit[text] for text in completions], dtype=np.float32)

    def preference(
        self, prompts: list[str], first: list[str], second: list[str], batch_size: int
    ) -> np.ndarray:
        a, b = (self.score(prompts, side, batch_size) for side in (first, second))
        return expit(a - b)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="module")
def ensemble(bert: Path) -> RewardEnsemble:
    made = RewardEnsemble.from_pretrained(bert, n_members=3, device="cpu")
    made.fit(ratings(60), max_steps=4, learning_rate=3e-3)
    return made


def test_score_and_spread_by_hand() -> None:
    """Scores 1 and 3 of x: mean 2, SD 1; both say 2 of y."""
    members = [Known({"x": 1.0, "y": 2.0}), Known({"x": 3.0, "y": 2.0})]
    made = RewardEnsemble(members, penalty=0.5)
    np.testing.assert_allclose(made.score(["", ""], ["x", "y"]), [1.5, 2.0])
    np.testing.assert_allclose(made.spread(["", ""], ["x", "y"]), [1.0, 0.0])


def test_pair_uncertainty_by_hand() -> None:
    """Sure of opposite sides: 0.5; both sure, by margins of 20 and 40, or of a tie: nothing."""
    members = [
        Known({"a": 90.0, "b": 0.0, "c": 20.0, "d": 0.0}),
        Known({"a": 0.0, "b": 90.0, "c": 40.0, "d": 0.0}),
    ]
    made = RewardEnsemble(members)
    found = made.pair_uncertainty([""] * 3, ["a", "c", "d"], ["b", "d", "d"])
    np.testing.assert_allclose(found, [0.5, 0, 0], atol=1e-6)


def test_it_is_a_reward_function_of_its_members(ensemble: RewardEnsemble) -> None:
    scores = ensemble(prompts=PROMPTS, completions=TEXTS, reference=TEXTS)
    each = np.stack([member.score(PROMPTS, TEXTS) for member in ensemble.members])
    np.testing.assert_allclose(scores, each.mean(axis=0) - each.std(axis=0), atol=1e-6)
    assert checked_scores(scores, TEXTS).shape == (30,) and each.std(axis=0).min() > 0
    first, second = TEXTS[:15], TEXTS[15:]
    uncertain = ensemble.pair_uncertainty(PROMPTS[:15], first, second)
    swapped = ensemble.pair_uncertainty(PROMPTS[:15], second, first)
    np.testing.assert_allclose(uncertain, swapped, atol=1e-6)
    assert uncertain.min() > 0 and uncertain.max() < 0.5


def test_members_learn_apart_and_are_made_comparable(bert: Path) -> None:
    """Held out correlation above 0.8 after each member saw a sample of its own."""
    made = RewardEnsemble.from_pretrained(bert, n_members=2, device="cpu")
    report = made.fit(comparisons(400), ratings(150, seed=9), epochs=5, learning_rate=3e-3, seed=5)
    assert report.held_out is not None and report.held_out.ratings is not None
    assert report.held_out.ratings.pearson > 0.8 and report.spread > 0
    assert all(member.held_out is not None for member in report.members)
    references = [member.normalization.reference for member in made.members]
    assert references[0] == references[1] and "it was fitted on" in references[0]
    json.dumps(dataclasses.asdict(report))
    a, b = made.members
    assert not np.allclose(a.score(PROMPTS, TEXTS), b.score(PROMPTS, TEXTS), atol=0.01)


def test_without_bootstrap_the_members_see_all(bert: Path, monkeypatch) -> None:
    made = RewardEnsemble.from_pretrained(bert, n_members=2, device="cpu")
    fit, seen = LearnedRewardModel.fit, []

    def noted(self: LearnedRewardModel, feedback: list, *args: object, **kwargs: object) -> object:
        seen.append((len(feedback), len(set(feedback)), kwargs["seed"]))
        return fit(self, feedback, *args, **kwargs)

    monkeypatch.setattr(LearnedRewardModel, "fit", noted)
    made.fit(ratings(50), max_steps=1, bootstrap=False, seed=3)
    assert seen == [(50, 50, 3), (50, 50, 4)]
    made.fit(ratings(50), max_steps=1)
    assert all(number == 50 and 25 < distinct < 40 for number, distinct, _ in seen[2:])


def test_save_and_load(ensemble: RewardEnsemble, tmp_path: Path) -> None:
    ensemble.penalty = 0.7
    folder = ensemble.save(tmp_path / "ensemble")
    loaded = RewardEnsemble.load(folder, device="cpu")
    expected = ensemble.score(PROMPTS, TEXTS)
    np.testing.assert_allclose(loaded.score(PROMPTS, TEXTS), expected, atol=1e-5)
    assert loaded.penalty == 0.7
    member = LearnedRewardModel.load(folder / "member-1", device="cpu")
    np.testing.assert_allclose(
        member.score(PROMPTS, TEXTS), ensemble.members[1].score(PROMPTS, TEXTS), atol=1e-5
    )
    with pytest.raises(FileExistsError):
        ensemble.save(folder)


def test_full_disk_while_saving_leaves_the_old_one(
    ensemble: RewardEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensemble.save(tmp_path / "ensemble")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ensemble.members[2].tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match=r"could not write .*ensemble: No space left on device"):
        ensemble.save(folder, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ensemble"]
    assert len(RewardEnsemble.load(folder, device="cpu").members) == 3


def test_faults(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two members, got 1"):
        RewardEnsemble.from_pretrained(bert, n_members=1, device="cpu")
    made = RewardEnsemble.from_pretrained(bert, n_members=2, device="cpu")
    with pytest.raises(ValueError, match="penalty of 0 or more, got -1"):
        RewardEnsemble(made.members, penalty=-1)
    with pytest.raises(ValueError, match="feedback to learn from, got none"):
        made.fit([])
    with pytest.raises(OSError):
        RewardEnsemble.load(tmp_path / "nowhere")
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ensemble.json: expected what RewardEnsemble.save wrote"):
        RewardEnsemble.load(tmp_path)
