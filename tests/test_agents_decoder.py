"""Cached decoding against full forward passes."""

import copy

import numpy as np
import pytest
import torch as th
from conftest import tiny_gpt2
from gymnasium import spaces

from agents import CausalLMPolicy
from agents.decoder import CachedDecoder
from agents.heads import sample, token_statistics
from agents.sequences import one_state_per_row

V, L = 40, 24


def make_policy(lm, **kwargs) -> CausalLMPolicy:
    box = spaces.Box(-1, V - 1, (L,), dtype=np.int64)
    return CausalLMPolicy(box, spaces.Discrete(V), lambda _: 1e-3, lm=lm, **kwargs)


class Rows:
    """Observations that grow by random tokens and now and then begin anew."""

    def __init__(self, n: int, seed: int = 0, restart: float = 0.08, longest_prompt: int = 12):
        self.rng = np.random.default_rng(seed)
        self.restart, self.longest_prompt = restart, longest_prompt
        self.ids = np.full((n, L), -1)
        for row in range(n):
            self.begin(row)

    def begin(self, row: int) -> None:
        length = self.rng.integers(1, self.longest_prompt + 1)
        self.ids[row] = -1
        self.ids[row, :length] = self.rng.integers(0, V, length)

    def step(self) -> None:
        for row, ids in enumerate(self.ids):
            length = (ids >= 0).sum()
            if length == L or self.rng.random() < self.restart:
                self.begin(row)
            else:
                ids[length] = self.rng.integers(0, V)

    def tensor(self) -> th.Tensor:
        return th.from_numpy(self.ids.copy())


def full_log_probs(lm, ids: th.Tensor) -> th.Tensor:
    """The next token's log-probabilities by one forward pass per row, without any padding."""
    rows = []
    with th.no_grad():
        for row in ids:
            row = row[row >= 0][None]
            rows.append(lm(input_ids=row).logits[0, -1].log_softmax(0))
    return th.stack(rows)


@pytest.mark.parametrize("n", [1, 6])
def test_cached_equals_full_forward_through_random_restarts(make_lm, n: int) -> None:
    lm = make_lm(V)
    policy, rows = make_policy(lm), Rows(n)
    worst = 0.0
    with th.no_grad():
        for _ in range(150):
            ids = rows.tensor()
            logits = policy.get_distribution(ids).distribution.logits
            worst = max(worst, float((logits - full_log_probs(lm, ids)).abs().max()))
            rows.step()
    assert worst <= 1e-5


def test_a_restart_needs_no_more_columns_than_the_longest_row_has_tokens(make_lm) -> None:
    decoder, rows = CachedDecoder(make_lm(V).base_model), Rows(4, restart=0.3)
    for _ in range(80):
        ids = rows.tensor()
        decoder.hidden(ids)
        assert decoder._window.end - decoder._window.start == int((ids >= 0).sum(1).max())
        rows.step()


def test_one_new_prompt_never_changes_another_rows_distribution(make_lm) -> None:
    lm = make_lm(V)
    rows = Rows(5, restart=0)
    calm, disturbed = make_policy(lm), make_policy(copy.deepcopy(lm))
    with th.no_grad():
        for step in range(10):
            ids = rows.tensor()
            other = ids.clone()
            if step % 3 == 2:  # row 2 gets a prompt longer than anything in the cache
                other[2] = -1
                other[2, : L - 1] = step
            a = calm.get_distribution(ids).distribution.probs
            b = disturbed.get_distribution(other).distribution.probs
            keep = [0, 1, 3, 4]
            th.testing.assert_close(a[keep], b[keep], atol=1e-6, rtol=0)
            rows.step()


def test_seeing_the_same_batch_again_costs_nothing_and_changes_nothing(make_lm) -> None:
    policy, ids = make_policy(make_lm(V)), Rows(3).tensor()
    with th.no_grad():
        first = policy.predict_values(ids)
        calls = []
        policy.body.register_forward_hook(lambda *_: calls.append(1))
        assert policy.predict_values(ids).equal(first)
    assert calls == []


def changed_by_optimizer(policy: CausalLMPolicy) -> None:
    values, log_prob, _ = policy.evaluate_actions(Rows(3).tensor(), th.zeros(3, dtype=th.long))
    (values.sum() + log_prob.sum()).backward()
    policy.optimizer.step()


def changed_by_loading(policy: CausalLMPolicy) -> None:
    policy.load_state_dict(make_policy(tiny_gpt2(V, seed=7)).state_dict())


def changed_by_hand(policy: CausalLMPolicy) -> None:
    with th.no_grad():
        policy.lm.get_input_embeddings().weight.mul_(1.5)


@pytest.mark.parametrize("change", [changed_by_optimizer, changed_by_loading, changed_by_hand])
def test_a_weight_update_invalidates_the_cache(change) -> None:
    lm = tiny_gpt2(V)
    policy, rows = make_policy(lm), Rows(3, restart=0)
    with th.no_grad():
        policy.get_distribution(rows.tensor())
    change(policy)
    with th.no_grad():
        for _ in range(3):
            found = policy.get_distribution(rows.tensor()).distribution.logits
            th.testing.assert_close(found, full_log_probs(lm, rows.tensor()), atol=1e-5, rtol=0)
            rows.step()


def test_temperature_and_masks_are_the_same_in_sampling_and_evaluation(make_lm) -> None:
    policy = make_policy(make_lm(V), temperature=0.5)
    policy.allowed_tokens[5:] = False
    ids = Rows(64).tensor()
    with th.no_grad():
        tokens, _, log_prob = policy(ids)
        _, evaluated, entropy = policy.evaluate_actions(ids, tokens)
    assert int(tokens.max()) < 5
    th.testing.assert_close(log_prob, evaluated, atol=1e-5, rtol=0)
    assert float(entropy.max()) <= np.log(5) + 1e-5
    with th.no_grad():
        raw = policy.lm(input_ids=ids[:1, : int((ids[0] >= 0).sum())]).logits[0, -1, :5]
    expected = (raw / 0.5).log_softmax(0)[tokens[0]]
    assert float(log_prob[0]) == pytest.approx(float(expected), abs=1e-5)


def test_dropout_is_off_in_training_mode(make_lm) -> None:
    lm = tiny_gpt2(V)
    lm.config.attn_pdrop = 0.5
    policy, ids = make_policy(lm), Rows(4).tensor()
    policy.set_training_mode(True)
    tokens = th.zeros(4, dtype=th.long)
    assert policy.evaluate_actions(ids, tokens)[1].equal(policy.evaluate_actions(ids, tokens)[1])


def test_sampling_follows_the_probabilities_and_never_draws_a_masked_token() -> None:
    th.manual_seed(0)
    probabilities = th.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    logits = probabilities.log().clamp(min=th.finfo(th.float32).min)
    drawn = sample(logits.expand(40_000, -1))
    share = th.bincount(drawn, minlength=6) / 40_000
    assert (share[probabilities == 0] == 0).all()
    th.testing.assert_close(share, probabilities, atol=0.01, rtol=0)  # 4 SD = 0.01


def test_statistics_in_pieces_equal_those_in_one(monkeypatch) -> None:
    th.manual_seed(0)
    hidden = th.randn(50, 8, requires_grad=True)
    weight, tokens = th.randn(8, 30), th.randint(0, 30, (50,))

    def both() -> tuple[th.Tensor, ...]:
        found = token_statistics(hidden, tokens, lambda h, _: h @ weight, 30)
        (grad,) = th.autograd.grad(found.log_prob.sum() + found.entropy.sum(), hidden)
        return (*found, grad)

    whole = both()
    monkeypatch.setattr("agents.heads.LOGITS_AT_ONCE", 30 * 7)
    for a, b in zip(whole, both(), strict=True):
        th.testing.assert_close(a, b)
    distribution = th.distributions.Categorical(logits=hidden @ weight)
    th.testing.assert_close(whole[0], distribution.log_prob(tokens))
    th.testing.assert_close(whole[1], distribution.entropy())


def test_observations_as_floats_hold_the_same_ids(make_lm) -> None:
    policy, ids = make_policy(make_lm(V)), Rows(3).tensor()
    with th.no_grad():
        assert policy.predict_values(ids).equal(policy.predict_values(ids.float()))


def test_one_state_per_row_finds_the_last_token() -> None:
    batch = one_state_per_row(th.tensor([[3, 4, -1, -1], [5, -1, -1, -1]]))
    assert batch.ids.tolist() == [[3, 4], [5, -1]]
    assert batch.position.tolist() == [1, 0]
