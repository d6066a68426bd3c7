"""The learned reward model, on tiny models built from a configuration."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch as th
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from reward_models import Comparison, Feedback, Label, LearnedRewardModel, Rating
from reward_models.batches import SimilarLength
from reward_models.fitting import split
from reward_models.loss import feedback_loss

GOOD = ["good", "great", "fine", "lovely"]
BAD = ["bad", "dull", "poor", "awful"]
FILLER = ["the", "film", "was", "a", "very", "story", "and", "its", "plot", "is"]


def make_backbone(path: Path, kind: str) -> Path:
    """A random model of two layers with a tokenizer of whole words."""
    special = ["[PAD]", "[UNK]", "[EOS]"]
    vocab = {word: i for i, word in enumerate(special + GOOD + BAD + FILLER)}
    words = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "[EOS]"}
    if kind != "gpt2":
        names["pad_token"] = "[PAD]"  # GPT-2 has none
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 2}
    th.manual_seed(0)
    model = {
        "bert": lambda: BertModel(BertConfig(vocab_size=len(vocab), intermediate_size=64, **sizes)),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=len(vocab), intermediate_size=64, **sizes, **ends)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=len(vocab), n_embd=32, n_layer=2, n_head=4, **ends)
        ),
    }[kind]()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["bert", "llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("models") / "bert", "bert")


def sentences(n: int, seed: int = 0) -> list[tuple[str, int]]:
    """Different texts, each with the number of its good words less that of its bad words."""
    rng = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < n:
        words = rng.choices(FILLER, k=rng.randint(1, 12)) + rng.choices(
            rng.choice([GOOD, BAD]), k=rng.randint(0, 3)
        )
        rng.shuffle(words)
        found[" ".join(words)] = sum(w in GOOD for w in words) - sum(w in BAD for w in words)
    return list(found.items())


def ratings(n: int, seed: int = 0) -> list[Rating]:
    return [Rating("", text, balance, (-4, 4)) for text, balance in sentences(n, seed)]


def comparisons(n: int, seed: int = 0) -> list[Comparison]:
    texts = sentences(2 * n, seed)
    pairs = zip(texts[:n], texts[n:], strict=True)
    return [Comparison("", *((a, b) if x >= y else (b, a)), tie=x == y) for (a, x), (b, y) in pairs]


def labels(n: int, seed: int = 0) -> list[Label]:
    return [Label("", text, balance > 0) for text, balance in sentences(n, seed) if balance]


# Contract


def test_it_is_a_reward_function(backbone: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(backbone, device="cpu")
    prompts, completions = ["the film", "", "a story"], [" was good", "", " was very dull"]
    scores = reward_model(prompts=prompts, completions=completions, reference=["x"] * 3)
    assert scores.shape == (3,) and scores.dtype == np.float32
    joined = reward_model.score([""] * 3, ["the film was good", "", "a story was very dull"])
    np.testing.assert_array_equal(scores, joined)
    assert reward_model.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="as many prompts as completions, got 1 and 2"):
        reward_model.score(["a"], ["b", "c"])


def test_batch_scores_equal_single_scores(backbone: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(backbone, device="cpu")
    texts = [text for text, _ in sentences(50)] + ["", "good", " ".join(["the"] * 200)]
    together = reward_model.score([""] * len(texts), texts, batch_size=16)
    alone = [reward_model.score([""], [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-3


def test_long_text_loses_its_beginning(bert: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu", max_length=4)
    scores = reward_model.score(["bad dull awful ", ""], ["the film was good"] * 2)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    with pytest.raises(ValueError, match="max_length from 1 to 64 tokens, got 65"):
        LearnedRewardModel.from_pretrained(bert, max_length=65)


def test_scoring_is_deterministic_and_without_gradient(bert: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    first = reward_model.score(["a"], [" film"])
    assert (first == reward_model.score(["a"], [" film"])).all()
    assert not reward_model.model.training
    assert all(parameter.grad is None for parameter in reward_model.model.parameters())


# Numbers


def test_loss_by_hand() -> None:
    """A rating, a comparison, a tie and two labels, over six texts."""
    logits = th.tensor([1.0, 2.0, -1.0, 0.5, 0.25, 3.0], dtype=th.float64)
    loss = feedback_loss(
        logits,
        first=th.tensor([0, 1, 3, 4, 5]),
        second=th.tensor([6, 2, 4, 6, 6]),
        target=th.tensor([-0.5, 1.0, 0.5, 1.0, 0.0], dtype=th.float64),
        is_rating=th.tensor([True, False, False, False, False]),
    )

    def log_sigmoid(x: float) -> float:
        return float(-np.log(1 + np.exp(-x)))

    expected = [
        1.5**2 / 2,
        -log_sigmoid(3.0),
        -(log_sigmoid(0.25) + log_sigmoid(-0.25)) / 2,
        -log_sigmoid(0.25),
        -log_sigmoid(-3.0),
    ]
    assert loss.item() == pytest.approx(np.mean(expected))


def test_scale_other_than_the_logits(bert: Path) -> None:
    """On a scale from 1 to 5 the logits -4, 0 and 4 are the ratings 1, 3 and 5."""
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    logits = reward_model.human_scale(["a"], [" film"])
    reward_model.scale = (1.0, 5.0)
    np.testing.assert_allclose(reward_model.human_scale(["a"], [" film"]), 3 + logits / 2)


def test_normalization(bert: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    texts = [text for text, _ in sentences(40)]
    before = reward_model.score([""] * 40, texts)
    normalization = reward_model.normalize([""] * 40, texts, "forty sentences")
    after = reward_model.score([""] * 40, texts)
    assert (normalization.n, normalization.reference) == (40, "forty sentences")
    assert after.mean() == pytest.approx(0, abs=1e-3) and after.std() == pytest.approx(1, abs=1e-3)
    np.testing.assert_array_equal(reward_model.human_scale([""] * 40, texts), before)
    with pytest.raises(ValueError, match="different scores, got 1 texts"):
        reward_model.normalize([""], ["a"], "one")


def test_batches_have_similar_lengths_and_every_record_once() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 50) for _ in range(103)]
    order = list(SimilarLength(lengths, 8))
    assert sorted(order) == list(range(103))
    spreads = [np.ptp([lengths[i] for i in order[k : k + 8]]) for k in range(0, 96, 8)]
    assert np.mean(spreads) < 8  # 44 if drawn at random


def test_split_has_no_text_in_two_parts() -> None:
    records = [Comparison("p", str(i), str((i + 1) % 40)) for i in range(40)]
    for held_out_part in (0.2, records[:8]):
        train, held_out = split(records, held_out_part, seed=0)
        assert len(held_out) == 8 and train
        seen = {text for record in held_out for text in record.texts}
        assert all(seen.isdisjoint(record.texts) for record in train)


# Learning


@pytest.mark.parametrize("kind", ["ratings", "comparisons", "labels", "mixture"])
def test_learns_to_tell_good_from_bad(bert: Path, kind: str) -> None:
    """Of a good and a bad text, the good one scores higher in 95 % of the held-out pairs.

    An unfitted model has it right in 50 ± 20 %.
    """
    feedback: Sequence[Feedback] = {
        "ratings": ratings(600),
        "comparisons": comparisons(600),
        "labels": labels(600),
        "mixture": [*ratings(200), *comparisons(200, seed=1), *labels(200, seed=2)],
    }[kind]
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    test = [Rating("", text, np.sign(x), (-4, 4)) for text, x in sentences(200, seed=9) if x]
    chance = reward_model.evaluate(test).ratings
    assert chance is not None and chance.pairwise_accuracy == pytest.approx(0.5, abs=0.2)
    reward_model.fit(feedback, test, epochs=6, learning_rate=3e-3, bf16=False)
    report = reward_model.evaluate(test).ratings
    assert report is not None and report.pairwise_accuracy > 0.95


def test_learns_with_a_decoder(backbone: Path) -> None:
    """Correlation with the truth above 0.9; an unfitted model is within 0.3 of 0."""
    reward_model = LearnedRewardModel.from_pretrained(backbone, device="cpu")
    report = reward_model.fit(ratings(600), 0.2, epochs=6, learning_rate=3e-3, bf16=False)
    assert report.held_out is not None and report.held_out.ratings is not None
    assert report.records + report.held_out.ratings.n == 600
    assert report.held_out.ratings.pearson > 0.9


def test_report_is_ready_for_json(bert: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    log: list[dict[str, float]] = []
    feedback = [*ratings(20), *comparisons(20), *labels(20)]
    report = reward_model.fit(feedback, 0.5, max_steps=3, on_log=log.append)
    part = report.held_out
    assert part is not None and part.ratings and part.comparisons and part.labels
    assert report.steps == 3 and report.seconds > 0
    assert [entry["step"] for entry in log] == [1, 2, 3]
    json.dumps(dataclasses.asdict(report))


def test_ratings_of_several_people_are_averaged_before_comparing(bert: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    apart = [Rating("a", " film", r, (-4, 4)) for r in (4, 1)] + [
        Rating("the", " plot", 0, (-4, 4))
    ]
    together = [Rating("a", " film", 2.5, (-4, 4)), Rating("the", " plot", 0, (-4, 4))]
    assert reward_model.evaluate(apart) == reward_model.evaluate(together)


# Life


def test_same_seed_same_weights_and_the_callers_random_numbers_stay(bert: Path) -> None:
    def expected_next() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), th.rand(1).item()

    def seed_all() -> None:
        random.seed(5), np.random.seed(5), th.manual_seed(5)

    seed_all()
    expected = expected_next()
    weights = []
    for _ in range(2):
        seed_all()
        reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu", seed=3)
        reward_model.fit(ratings(40), 0.25, max_steps=3, seed=3)
        assert expected_next() == expected
        weights.append(reward_model.model.state_dict())
    assert all(th.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_save_and_load(backbone: Path, tmp_path: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(backbone, device="cpu", max_length=30)
    feedback = [dataclasses.replace(r, rating=3 + r.rating / 2, scale=(1, 5)) for r in ratings(40)]
    reward_model.fit(feedback, max_steps=2)
    texts = [text for text, _ in sentences(20)] + [" ".join(["film"] * 40)]
    prompts = [""] * len(texts)
    reward_model.normalize(prompts, texts, "all")
    loaded = LearnedRewardModel.load(reward_model.save(tmp_path / "rm"), device="cpu")
    for name in ("score", "human_scale"):
        before = getattr(reward_model, name)(prompts, texts)
        np.testing.assert_allclose(before, getattr(loaded, name)(prompts, texts), atol=1e-5)
    assert loaded.normalization == reward_model.normalization
    assert (loaded.scale, loaded.max_length) == ((1.0, 5.0), 30)
    with pytest.raises(FileExistsError):
        reward_model.save(tmp_path / "rm")


def test_transformers_loads_the_saved_folder(backbone: Path, tmp_path: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(backbone, device="cpu")
    folder = reward_model.save(tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["the film was good", "a dull story"]
    with th.no_grad():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert logits.shape == (2, 1)
    np.testing.assert_allclose(logits[:, 0], reward_model.score([""] * 2, texts), atol=1e-5)


def test_a_plain_classifier_is_loaded_as_it_is(bert: Path, tmp_path: Path) -> None:
    folder = LearnedRewardModel.from_pretrained(bert, device="cpu").save(tmp_path / "rm")
    (folder / "reward_model.json").unlink()
    loaded = LearnedRewardModel.load(folder, device="cpu")
    assert (loaded.normalization.sd, loaded.scale) == (1.0, None)


# Faults


def test_a_backbone_is_not_a_saved_reward_model(bert: Path) -> None:
    with pytest.raises(ValueError, match=r"no head .* use from_pretrained and fit"):
        LearnedRewardModel.load(bert, device="cpu")


def test_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        LearnedRewardModel.from_pretrained(tmp_path / "nowhere")


def test_broken_side_file_is_named(bert: Path, tmp_path: Path) -> None:
    folder = LearnedRewardModel.from_pretrained(bert, device="cpu").save(tmp_path / "rm")
    (folder / "reward_model.json").write_text("{")
    with pytest.raises(ValueError, match=r"reward_model.json: expected what .*save wrote"):
        LearnedRewardModel.load(folder)


def test_nothing_or_unusable_to_learn_from(bert: Path) -> None:
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    with pytest.raises(ValueError, match="feedback to learn from, got none"):
        reward_model.fit([])
    with pytest.raises(ValueError, match="fraction between 0 and 1, got 2"):
        reward_model.fit(ratings(4), 2)
    mixed = [Rating("", "a", 1, (-4, 4)), Rating("", "b", 1, (1, 5))]
    with pytest.raises(ValueError, match="ratings on one scale, got"):
        reward_model.fit(mixed)
    with pytest.raises(ValueError, match="finite loss"):
        reward_model.fit(ratings(64), max_steps=4, learning_rate=1e30, bf16=False)


def test_full_disk_while_saving(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward_model = LearnedRewardModel.from_pretrained(bert, device="cpu")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reward_model.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match=r"could not write .*rm: No space left on device"):
        reward_model.save(tmp_path / "rm")
    assert list(tmp_path.iterdir()) == []
