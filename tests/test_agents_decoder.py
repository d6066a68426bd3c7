"""Cached decoding against full forward passes."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from conftest import tiny_gpt2
from gymnasium import spaces

from agents import CausalLMPolicy
from agents.decoder import CachedDecoder
from agents.heads import Head, compare, sample, token_statistics
from agents.sequences import TokenBatch, one_state_per_row, similar_lengths

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
    decoder, rows = CachedDecoder(make_lm(V)), Rows(4, restart=0.3)
    for _ in range(80):
        ids = rows.tensor()
        decoder.hidden(ids)
        assert decoder._window.end - decoder._window.start == int((ids >= 0).sum(1).max())
        rows.step()


def test_held_rows_cost_no_slots_and_change_nothing(make_lm) -> None:
    lm = make_lm(V)
    policy, rows = make_policy(lm), Rows(8, restart=0.1)
    decoder, held, slots = policy.decoder, th.zeros(8, dtype=th.bool), []
    with th.no_grad():
        for step in range(120):
            if step % 3 == 2:  # one row after another ends; at the end all begin anew
                held[(step // 3) % 8] = True
                if held.all():
                    held[:] = False
            ids = rows.tensor()
            ids[held] = -1
            logits = policy.get_distribution(ids).distribution.logits
            live = ~held
            expected = full_log_probs(lm, ids[live])
            th.testing.assert_close(logits[live], expected, atol=1e-5, rtol=0)
            assert not decoder.hidden(ids)[held].any()
            slots.append(len(decoder._rows))
            assert int(live.sum()) <= slots[-1] <= max(1, int(live.sum()) / 0.75)
            rows.step()
        assert {1, 2, 8} <= set(slots)
        assert not decoder.hidden(th.full((8, L), -1)).any()


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
        policy.lm.base_model.register_forward_hook(lambda *_: calls.append(1))
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


def changed_by_vector(policy: CausalLMPolicy) -> None:
    policy.load_from_vector(policy.parameters_to_vector() * 1.1)


@pytest.mark.parametrize(
    "change", [changed_by_optimizer, changed_by_loading, changed_by_hand, changed_by_vector]
)
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


@pytest.mark.parametrize("entropy", [0, 1])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("per_piece", [7, 50])
def test_statistics_and_their_gradients_equal_autograds(
    monkeypatch, per_piece: int, learns: bool, entropy: int
) -> None:
    th.manual_seed(0)
    hidden, weight, bias = th.randn(50, 8), th.randn(33, 8), th.randn(33)
    tokens, mask_id = th.randint(0, 10, (50,)), th.randint(0, 2, (50,))
    allowed, masks = th.ones(30, dtype=th.bool), th.ones(2, 30, dtype=th.bool)
    allowed[20:25], masks[1, 10:15] = False, False
    monkeypatch.setattr("agents.heads.LOGITS_AT_ONCE", 25 * per_piece)
    layer = th.nn.Linear(8, 33)
    layer.weight, layer.bias = th.nn.Parameter(weight), th.nn.Parameter(bias)
    layer.requires_grad_(learns)
    inputs = [hidden.requires_grad_(), *(layer.parameters() if learns else ())]
    weight, bias = layer.weight, layer.bias
    head = Head.of(layer, allowed, 0.7)
    head = head._replace(masks=masks[:, head.token_ids], mask_id=mask_id)
    found = token_statistics(hidden, tokens, head)

    logits = (hidden @ weight.T + bias)[:, :30] / 0.7
    logits = logits.masked_fill(~(allowed & masks[mask_id]), -1e9)
    distribution = th.distributions.Categorical(logits=logits)
    expected = (distribution.log_prob(tokens), distribution.entropy())
    factors = th.randn(2, 50) * th.tensor([[1], [entropy]])
    for a, b in zip(found, expected, strict=True):
        th.testing.assert_close(a, b)
    for a, b in zip(
        th.autograd.grad((factors * th.stack(found)).sum(), inputs),
        th.autograd.grad((factors * th.stack(expected)).sum(), inputs),
        strict=True,
    ):
        th.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_slope_of_a_near_certain_token_is_right_in_bfloat16() -> None:
    """Where p(a) is 0.998 the gradient is small: rounding p before 1 − p would bury it."""
    th.manual_seed(0)
    layer = th.nn.Linear(16, 12, bias=False).requires_grad_(False)
    hidden = 10 * layer.weight[:5] / layer.weight[:5].norm(dim=1, keepdim=True) ** 2
    tokens, allowed = th.arange(5), th.ones(12, dtype=th.bool)
    slopes = []
    for dtype in (th.float64, th.bfloat16):
        states = hidden.to(th.float64 if dtype == th.float64 else th.float32).requires_grad_()
        if dtype == th.float64:
            log_prob = (states @ layer.weight.double().T).log_softmax(1)[tokens, tokens]
            assert 0.9 < float(log_prob.exp().mean()) < 1
        else:
            head = Head.of(layer, allowed, 1.0)._replace(dtype=dtype)
            log_prob = token_statistics(states, tokens, head).log_prob
        slopes.append(th.autograd.grad(log_prob.sum(), states)[0].double())
    error = (slopes[1] - slopes[0]).norm(dim=1) / slopes[0].norm(dim=1)
    assert float(error.max()) < 0.02


@pytest.mark.parametrize("per_piece", [7, 50])
def test_two_models_are_compared_as_categorical_distributions(monkeypatch, per_piece) -> None:
    th.manual_seed(0)
    monkeypatch.setattr("agents.heads.LOGITS_AT_ONCE", 20 * per_piece)
    hidden, ref_hidden, tokens = th.randn(50, 8), th.randn(50, 8), th.randint(0, 8, (50,))
    masks, mask_id = th.ones(2, 20, dtype=th.bool), th.randint(0, 2, (50,))
    masks[1, 8:12] = False
    layers = th.nn.Linear(8, 20), th.nn.Linear(8, 20)
    heads, expected = [], []
    for layer, states in zip(layers, (hidden, ref_hidden), strict=True):
        head = Head.of(layer, th.ones(20, dtype=th.bool), 0.8)
        heads.append(head._replace(masks=masks, mask_id=mask_id))
        logits = (layer(states) / 0.8).masked_fill(~masks[mask_id], -1e9)
        expected.append(th.distributions.Categorical(logits=logits))
    found = compare(hidden, ref_hidden, tokens, *heads)
    th.testing.assert_close(found.log_prob, expected[0].log_prob(tokens))
    th.testing.assert_close(found.ref_log_prob, expected[1].log_prob(tokens))
    kl = th.distributions.kl_divergence(*expected)
    th.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("least", [1, 40, 10_000])
def test_whole_sequences_give_each_tokens_state(make_lm, monkeypatch, least: int) -> None:
    policy, ids = make_policy(make_lm(V)), Rows(9, longest_prompt=L).tensor()
    monkeypatch.setattr(
        "agents.language_model.similar_lengths", lambda length: similar_lengths(length, least)
    )
    row, position = (ids >= 0).nonzero(as_tuple=True)
    shuffled = th.randperm(len(row))
    batch = TokenBatch(ids, row[shuffled], position[shuffled])
    with th.no_grad():
        found = policy.hidden_at(batch)
        for state, r, c in zip(found, batch.row, batch.position, strict=True):
            alone = policy.lm.base_model(input_ids=ids[r, : c + 1][None]).last_hidden_state[0, -1]
            th.testing.assert_close(state, alone, atol=1e-5, rtol=0)


def test_similar_lengths_take_each_row_once_and_pad_little() -> None:
    length = th.randint(1, 60, (200,))
    groups = similar_lengths(length, 256)
    assert th.cat(groups).sort().values.tolist() == list(range(200))
    assert len(groups) > 7 and min(int(length[g].sum()) for g in groups) > 128
    padded = sum(len(g) * int(length[g].max()) for g in groups)
    assert padded < 1.15 * int(length.sum())


def test_rows_of_one_length_are_one_group() -> None:
    assert len(similar_lengths(th.full((64,), 48), 256)) == 1
    length = th.tensor([48] * 60 + [20] * 60)
    assert len(similar_lengths(length, 256)) == 2


def test_a_policy_that_has_decoded_can_be_copied_and_pickled(make_lm) -> None:
    policy, rows = make_policy(make_lm(V)), Rows(4)
    with th.no_grad():
        expected = policy.predict_values(rows.tensor())
        for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            found = twin.get_distribution(rows.tensor()).distribution.logits
            th.testing.assert_close(
                found, full_log_probs(policy.lm, rows.tensor()), atol=1e-5, rtol=0
            )
            assert twin.decoder.lm is not policy.decoder.lm
            th.testing.assert_close(twin.predict_values(rows.tensor()), expected)
            with th.enable_grad():
                changed_by_optimizer(twin)
            found = twin.get_distribution(rows.tensor()).distribution.logits
            expected_now = full_log_probs(twin.lm, rows.tensor())
            th.testing.assert_close(found, expected_now, atol=1e-5, rtol=0)


def test_a_decoder_that_may_not_pack_any_more_decodes_with_the_model(make_lm, monkeypatch) -> None:
    policy, ids = make_policy(make_lm(V)), Rows(3).tensor()
    with th.no_grad():
        policy.predict_values(ids)
        monkeypatch.setattr("agents.decoder.can_pack", lambda *_: False)
        policy.decoder.forget()
        policy.predict_values(ids)
        assert policy.decoder.lm is policy.lm


def test_an_interrupted_decode_leaves_nothing_half_done(make_lm, monkeypatch) -> None:
    lm = make_lm(V)
    policy, rows = make_policy(lm), Rows(4)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with th.no_grad():
        monkeypatch.setattr(policy.decoder, "_decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            policy.predict_values(rows.tensor())
        monkeypatch.undo()
        ids = rows.tensor()
        ids[2:] = -1
        found = policy.get_distribution(ids).distribution.logits[:2]
        th.testing.assert_close(found, full_log_probs(lm, ids[:2]), atol=1e-5, rtol=0)


def test_observations_as_floats_hold_the_same_ids(make_lm) -> None:
    policy, ids = make_policy(make_lm(V)), Rows(3).tensor()
    with th.no_grad():
        assert policy.predict_values(ids).equal(policy.predict_values(ids.float()))


def test_one_state_per_row_finds_the_last_token() -> None:
    batch = one_state_per_row(th.tensor([[3, 4, -1, -1], [5, -1, -1, -1]]))
    assert batch.ids.tolist() == [[3, 4], [5, -1]]
    assert batch.position.tolist() == [1, 0]


def test_a_batch_of_another_shape_sees_the_weights_as_they_are(make_lm) -> None:
    lm = make_lm(9)
    policy = CausalLMPolicy(
        spaces.Box(-1, 8, (6,), np.int64), spaces.Discrete(9), lambda _: 0.0, lm=lm
    )
    four, one = th.tensor([[1, 2, 3, -1, -1, -1]] * 4), th.tensor([[1, 2, 3, -1, -1, -1]])

    def expected() -> th.Tensor:
        return lm(input_ids=th.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(0)

    def found(obs: th.Tensor) -> th.Tensor:
        return policy.get_distribution(obs).distribution.logits[0]

    with th.no_grad():
        th.testing.assert_close(found(four), expected(), atol=1e-5, rtol=1e-4)
        policy.load_state_dict({k: 1.5 * v for k, v in policy.state_dict().items()}, strict=False)
        for obs in (one, four, one):
            th.testing.assert_close(found(obs), expected(), atol=1e-5, rtol=1e-4)
        policy.temperature = 3.0
        warm = (expected() / 3).log_softmax(0)
        th.testing.assert_close(found(four), warm, atol=1e-5, rtol=1e-4)
