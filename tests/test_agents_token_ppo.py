"""TokenPPO against stock SB3, against numbers worked by hand, and with SB3's own tools."""

import copy
import json

import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecMonitor
from transformers import AutoModelForCausalLM, AutoTokenizer

import text_env
from agents import SampleTextCallback, SavePretrainedCallback, TokenPPO
from agents.language_model import Reference
from agents.writing import write_episodes

LETTERS = "abcdef"


def count_a(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """Random letters score about 0.8 of 6; EOS comes after 7 letters on average."""
    return [float(c.count("a")) for c in completions]


def arguments(**changes) -> dict:
    return {
        "tokenizer": letter_tokenizer(LETTERS),
        "prompts": [">", ">>", ">a>", ">bb>"],
        "reward_fn": count_a,
        "max_new_tokens": 6,
        **changes,
    }


def make_env(num_envs: int = 4, **changes) -> text_env.TextVecEnv:
    return text_env.TextVecEnv(num_envs=num_envs, **arguments(**changes))


def make_model(env=None, lm=None, algorithm=TokenPPO, **changes):
    env = env if env is not None else make_env()
    policy_kwargs = {"lm": lm or tiny_gpt2(9), **changes.pop("policy_kwargs", {})}
    settings = {
        "learning_rate": 1e-3,
        "n_steps": 16,
        "seed": 0,
        "device": "cpu",
        **({"batch_size": 32} if algorithm is not A2C else {}),
        **changes,
    }
    return algorithm("CausalLMPolicy", env, policy_kwargs=policy_kwargs, **settings)


class AtRolloutEnd(BaseCallback):
    """Calls a function with the model when a rollout is complete."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.function(self.model)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("optimizer", [th.optim.AdamW, th.optim.SGD])
def test_one_whole_rollout_minibatch_takes_stock_ppos_step(optimizer) -> None:
    settings = dict(
        n_steps=16, batch_size=64, n_epochs=2, gamma=0.9, gae_lambda=0.8, ent_coef=0.01, seed=3
    )
    kwargs = {"optimizer_class": optimizer}
    lm = tiny_gpt2(9)
    ours = make_model(lm=copy.deepcopy(lm), kl_coef=0, policy_kwargs=kwargs, **settings)
    before = [p.clone() for p in ours.policy.parameters()]
    ours.learn(64)
    stock = make_model(lm=copy.deepcopy(lm), algorithm=PPO, policy_kwargs=kwargs, **settings)
    stock.policy.allowed_tokens.copy_(ours.policy.allowed_tokens)
    stock.learn(64)
    moved = 0.0
    for old, a, b in zip(before, ours.policy.parameters(), stock.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        moved = max(moved, float((a - old).abs().max()))
    assert moved > 1e-4


def test_a_hand_computed_rollout() -> None:
    """Score on the last token, KL per token, GAE, returns and whitening, a second way."""
    model = make_model(
        env=make_env(2), n_steps=9, gamma=0.9, gae_lambda=0.8, kl_coef=0.3, n_epochs=1
    )
    with th.no_grad():  # the policy moves away from its reference, and values are not zero
        for p in model.policy.lm.parameters():
            p.add_(0.02 * th.randn_like(p))
        model.policy.value_head.weight.normal_()
    seen = {}

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            rows = seen.setdefault("steps", [])
            rows.append({k: copy.deepcopy(self.locals[k]) for k in ("rewards", "dones", "infos")})
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer
            for name in ("rewards", "values", "advantages", "returns", "log_probs", "segments"):
                seen[name] = copy.deepcopy(getattr(buffer, name))
            seen["actions"] = buffer.actions.copy()
            seen["episodes"] = copy.deepcopy(self.model.finished_episodes)
            with th.no_grad():
                obs = th.from_numpy(self.model._last_obs)
                seen["last_values"] = self.model.policy.predict_values(obs)[:, 0].numpy()

    model.learn(18, callback=Watch())
    steps, T, B = seen["steps"], 9, 2
    # The reference's log-probabilities, one token and one forward pass at a time.
    log_ref = np.zeros((T, B))
    for segment in seen["segments"]:
        ids = list(segment.context)
        for t in range(segment.start, segment.end):
            token = seen["actions"][t, segment.row]
            with th.no_grad():
                logits = model.reference.lm(input_ids=th.tensor([ids]).long()).logits[0, -1]
            logits[~model.policy.allowed_tokens] = -th.inf
            log_ref[t, segment.row] = logits.log_softmax(0)[token]
            ids.append(token)
    env_rewards = np.array([s["rewards"] for s in steps])
    dones = np.array([s["dones"] for s in steps])
    for s in steps:
        for reward, done, info in zip(s["rewards"], s["dones"], s["infos"], strict=True):
            assert reward == (info["score"] if done else 0)
    penalty = 0.3 * (seen["log_probs"] - log_ref)
    assert np.abs(penalty).max() > 1e-3
    np.testing.assert_allclose(seen["rewards"], env_rewards - penalty, atol=1e-5)

    advantages = np.zeros((T, B))
    for b in range(B):
        following, next_value = 0.0, seen["last_values"][b]
        for t in reversed(range(T)):
            alive = 0.0 if dones[t, b] else 1.0
            delta = seen["rewards"][t, b] + 0.9 * alive * next_value - seen["values"][t, b]
            following = delta + 0.9 * 0.8 * alive * following
            advantages[t, b] = following
            next_value = seen["values"][t, b]
    np.testing.assert_allclose(seen["returns"], advantages + seen["values"], atol=1e-5)
    white = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(seen["advantages"], white, atol=1e-4)
    assert not dones[-1].all(), "the test wants a cut episode"

    for episode in seen["episodes"]:
        start = episode["step"] + 1 - episode["n_tokens"]
        log_ratio = (seen["log_probs"] - log_ref)[start : episode["step"] + 1, episode["row"]]
        assert episode["ref_kl"] == pytest.approx(log_ratio.sum(), abs=1e-4)


def test_no_value_is_bootstrapped_past_the_token_budget_but_past_the_rollouts_end() -> None:
    model = make_model(
        env=make_env(3, prompts=[">"], min_new_tokens=6),
        n_steps=9,
        kl_coef=0,
        normalize_advantage=False,
        gae_lambda=0.0,
    )
    th.nn.init.constant_(model.policy.value_head.bias, 5.0)
    kept = {}

    def check(model) -> None:
        buffer = model.rollout_buffer
        kept["returns"] = buffer.returns.copy()
        kept["rewards"] = buffer.rewards.copy()

    model.learn(27, callback=AtRolloutEnd(check))
    # Each episode has exactly 6 tokens. The last one gets its score only;
    np.testing.assert_allclose(kept["returns"][5], kept["rewards"][5])
    np.testing.assert_allclose(kept["returns"][[0, 4]], 5.0)  # one within, the next value;
    np.testing.assert_allclose(kept["returns"][8], 5.0)  # one cut in mid-episode, too.


def test_an_episode_cut_by_the_rollout_goes_on_and_its_ref_kl_is_whole() -> None:
    model = make_model(env=make_env(2, prompts=[">"], min_new_tokens=6), n_steps=4, n_epochs=1)
    with th.no_grad():
        for p in model.policy.lm.parameters():
            p.add_(0.02 * th.randn_like(p))
    per_token, episodes = [], []

    def keep(model) -> None:
        buffer = model.rollout_buffer
        per_token.append(buffer.log_probs - model._second_look()[0])
        episodes.extend(model.finished_episodes)

    model.learn(2 * 12, callback=AtRolloutEnd(keep))
    log_ratio = np.concatenate(per_token)  # (12, 2): two episodes of 6 tokens a row
    assert len(episodes) == 4
    for k, episode in enumerate(episodes):
        span = slice(0, 6) if k < 2 else slice(6, 12)
        assert episode["n_tokens"] == 6
        assert episode["ref_kl"] == pytest.approx(log_ratio[span, episode["row"]].sum(), abs=1e-5)


def test_the_first_minibatchs_ratio_is_one_and_a_stale_rollout_is_refused() -> None:
    errors = []

    def compare(model) -> None:
        buffer = model.rollout_buffer
        batch = next(buffer.get(10_000))
        buffer._first_minibatch = True
        with th.no_grad():
            _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        errors.append(float((log_prob - batch.old_log_prob).abs().max()))

    make_model().learn(64 * 3, callback=AtRolloutEnd(compare))
    assert len(errors) == 3 and max(errors) < 1e-5

    def disturb(model) -> None:
        with th.no_grad():
            model.policy.lm.get_input_embeddings().weight.mul_(1.5)

    with pytest.raises(FloatingPointError, match="differ from the sampled ones"):
        make_model().learn(64, callback=AtRolloutEnd(disturb))


def test_a_reward_that_breaks_the_loss_changes_no_parameter() -> None:
    model = make_model(kl_coef=0)
    before = {name: p.clone() for name, p in model.policy.named_parameters()}

    def poison(model) -> None:
        model.rollout_buffer.advantages[3, 1] = np.nan

    with pytest.raises(FloatingPointError, match="slope of the loss in log_prob"):
        model.learn(64, callback=AtRolloutEnd(poison))
    for name, value in model.policy.named_parameters():
        assert value.equal(before[name]), name


def test_bfloat16_starts_the_update_from_what_it_will_compute() -> None:
    errors = []

    def compare(model) -> None:
        batch = next(model.rollout_buffer.get(10_000))
        model.rollout_buffer._first_minibatch = True
        with th.no_grad():
            _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        errors.append(float((log_prob - batch.old_log_prob).abs().max()))

    model = make_model(policy_kwargs={"dtype": "bfloat16", "trainable_layers": 1})
    frozen = model.policy.lm.get_input_embeddings().weight.clone()
    model.learn(128, callback=AtRolloutEnd(compare))
    assert max(errors) < 0.05
    assert model.policy.lm.get_input_embeddings().weight.equal(frozen)
    assert all(p.dtype == th.float32 for p in model.policy.parameters() if p.requires_grad)
    shared = {p.data_ptr() for p in model.reference.parameters()}
    assert model.policy.lm.get_input_embeddings().weight.data_ptr() in shared


def test_minibatches_deal_each_token_once_in_whole_sequences() -> None:
    model = make_model(kl_coef=0)
    counts = []

    def check(model) -> None:
        buffer = model.rollout_buffer
        for batch_size, n in ((64, 1), (32, 2), (10, 7)):
            batches = list(buffer.get(batch_size))
            assert len(batches) <= n
            old = np.sort(np.concatenate([b.old_log_prob for b in batches]))
            np.testing.assert_array_equal(old, np.sort(buffer.log_probs.ravel()))
            counts.extend(len(b.actions) for b in batches if batch_size == 10)

    model.learn(64, callback=AtRolloutEnd(check))
    assert max(counts) <= 10 + 6


def test_same_seed_same_run_and_another_seed_another() -> None:
    def run(seed: int) -> tuple[list, dict]:
        text = []
        model = make_model(seed=seed)
        model.learn(
            64 * 3,
            callback=AtRolloutEnd(
                lambda m: text.extend((e["prompt"], e["completion"]) for e in m.finished_episodes)
            ),
        )
        return text, model.policy.state_dict()

    (text, weights), (again, same), (other, _) = run(1), run(1), run(2)
    assert text == again and text != other
    assert all(weights[name].equal(same[name]) for name in weights)


# ----------------------------------------------------------------- learning


@pytest.mark.parametrize("algorithm", [TokenPPO, PPO, A2C])
def test_learns_to_write_a(algorithm) -> None:
    """A random policy scores about 0.8 of 6."""
    settings = {"kl_coef": 0.0} if algorithm is TokenPPO else {"gamma": 1.0}
    if algorithm is A2C:
        settings |= {"n_steps": 8, "learning_rate": 3e-3}
    else:
        settings |= {"n_epochs": 4, "batch_size": 64}
    model = make_model(env=make_env(16), algorithm=algorithm, **settings)
    model.learn(16 * 16 * 25)
    assert np.mean([e["r"] for e in model.ep_info_buffer]) > 4


def test_the_ref_kl_of_a_broken_off_episode_is_not_carried_into_the_next_learn() -> None:
    model = make_model(n_steps=4, n_epochs=1, env=make_env(4, prompts=[">"]))
    model.learn(16)
    assert np.abs(model._open_kl).max() >= 0
    model._open_kl[:] = 100.0
    kept = []
    model.learn(
        32, callback=AtRolloutEnd(lambda m: kept.extend(e["ref_kl"] for e in m.finished_episodes))
    )
    assert kept and max(np.abs(kept)) < 50


def test_written_episodes_have_the_kl_of_what_was_allowed() -> None:
    """Policy and reference differ in EOS only, which is masked throughout: their KL is 0."""
    lm = tiny_gpt2(9)
    env = text_env.TextVecEnv(
        num_envs=8, autoreset=False, **arguments(min_new_tokens=6, max_new_tokens=6)
    )
    model = make_model(env=make_env(8), lm=lm)
    model.policy.allowed_tokens.copy_(th.from_numpy(np.array(env.allowed_tokens)))
    other = tiny_gpt2(9)
    with th.no_grad():
        other.lm_head.weight = th.nn.Parameter(lm.lm_head.weight.clone())
        other.lm_head.weight[7] *= -30
    for greedy in (False, True):
        for ref, least, most in ((other, -1e-4, 1e-4), (tiny_gpt2(9, seed=5), 1e-2, 100)):
            reference = Reference(ref, model.policy)
            episodes = write_episodes(model.policy, env, reference, deterministic=greedy)
            assert len(episodes) == 8 and {e["n_tokens"] for e in episodes} == {6}
            if greedy:
                assert all(0 < e["ref_kl"] < 6 * np.log(9) * 2 for e in episodes)
            else:
                assert all(least <= e["ref_kl"] <= most for e in episodes)


def test_the_vocabulary_restriction_survives_saving(tmp_path) -> None:
    model = make_model(env=make_env(4, allowed_token_ids=[0, 1]))
    model.learn(64)
    model.save(tmp_path / "model")
    loaded = TokenPPO.load(tmp_path / "model", device="cpu")
    obs = np.tile(model._last_obs[:1], (300, 1))
    assert set(loaded.predict(obs)[0].tolist()) <= {0, 1, 7}
    model.set_env(make_env(4, allowed_token_ids=[2, 3]))
    model.learn(64)
    assert set(model.predict(obs)[0].tolist()) <= {2, 3, 7}


def test_a_live_reference_model_is_not_pickled_nor_frozen_by_mistake(tmp_path) -> None:
    model = make_model(ref_lm=tiny_gpt2(9, seed=4))
    assert not isinstance(model.ref_lm, th.nn.Module)
    lm = tiny_gpt2(9)
    with pytest.raises(ValueError, match="another model than the policy's"):
        make_model(lm=lm, ref_lm=lm)


def test_an_environment_that_holds_rows_needs_whole_episodes() -> None:
    env = text_env.TextVecEnv(num_envs=2, autoreset=False, **arguments())
    with pytest.raises(ValueError, match="whole_episodes=True"):
        make_model(env=env, n_steps=8).learn(64)


def test_min_new_tokens_is_obeyed_in_sampling_and_update() -> None:
    model = make_model(env=make_env(4, min_new_tokens=3))
    lengths = []
    model.learn(
        64 * 4,
        callback=AtRolloutEnd(lambda m: lengths.extend(e["n_tokens"] for e in m.finished_episodes)),
    )
    assert min(lengths) > 3
    assert model.rollout_buffer.action_masks.table().shape == (2, 9)


# ------------------------------------------------------------ SB3's own tools


@pytest.mark.parametrize("kind", ["own", "make_vec_env", "VecMonitor"])
def test_monitor_statistics_and_logger_fill(kind: str, tmp_path) -> None:
    if kind == "make_vec_env":
        env = make_vec_env("TextEnvironment-v0", n_envs=4, env_kwargs=arguments())
    else:
        env = make_env() if kind == "own" else VecMonitor(make_env())
    model = make_model(env=env)
    model.set_logger(configure(str(tmp_path), ["json", "csv", "tensorboard"]))
    model.learn(64 * 2, progress_bar=False)
    lines = [json.loads(line) for line in (tmp_path / "progress.json").open()]
    assert len(lines) == 2
    expected = (
        "rollout/ep_rew_mean rollout/ep_len_mean rollout/score_mean rollout/ref_kl "
        "rollout/completion_tokens rollout/finish_eos train/approx_kl train/explained_variance "
        "train/kl_coef rollout/ref_kl_per_token_exact"
    )
    for key in expected.split():
        assert np.isfinite(lines[-1][key]), key
    assert lines[0]["rollout/ref_kl"] == pytest.approx(0, abs=1e-5)
    assert model.num_timesteps == 128
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_sb3s_callbacks_fire(tmp_path) -> None:
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1)  # met at the first evaluation
    evaluate = EvalCallback(
        make_env(2),
        eval_freq=24,
        n_eval_episodes=3,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path / "log"),
        callback_after_eval=None,
        verbose=0,
    )
    checkpoint = CheckpointCallback(save_freq=32, save_path=str(tmp_path / "checkpoints"))
    ticks = []
    every = EveryNTimesteps(64, AtStep(lambda: ticks.append(1)))
    make_model().learn(256, callback=CallbackList([evaluate, checkpoint, every]))
    assert len(ticks) == 4
    assert (tmp_path / "best" / "best_model" / "manifest.json").exists()
    assert len(list((tmp_path / "checkpoints").glob("*/manifest.json"))) == 2
    assert np.load(tmp_path / "log" / "evaluations.npz")["results"].shape == (2, 3)

    model = make_model()
    model.learn(640, callback=EvalCallback(make_env(2), callback_on_new_best=stop, eval_freq=4))
    assert model.num_timesteps == 16
    model = make_model()
    model.learn(640, callback=StopTrainingOnMaxEpisodes(max_episodes=5))
    assert model.num_timesteps < 640


class AtStep(BaseCallback):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        self.function()
        return True


def test_evaluation_in_mid_rollout_leaves_the_rollout_as_it_would_have_been() -> None:
    """An EvalCallback uses the same decoder; deterministic choices draw no random numbers."""

    def final(callback) -> dict:
        model = make_model()
        model.learn(128, callback=callback)
        return model.policy.state_dict()

    plain = final(None)
    watched = final(EvalCallback(make_env(3), eval_freq=5, n_eval_episodes=2, verbose=0))
    for name, value in plain.items():
        th.testing.assert_close(value, watched[name], atol=1e-6, rtol=1e-5)


def test_evaluate_policy_and_predict() -> None:
    model = make_model(env=make_env(16), kl_coef=0, n_epochs=4, batch_size=64)
    before, _ = evaluate_policy(model, make_env(4), n_eval_episodes=40, deterministic=False)
    model.learn(16 * 16 * 20)
    after, _ = evaluate_policy(model, make_env(4), n_eval_episodes=40, deterministic=True)
    assert after > before + 2
    env = text_env.TextEnvironment(**arguments())
    obs, _ = env.reset(seed=0)
    token, state = model.predict(obs, deterministic=True)
    assert np.ndim(token) == 0 and state is None
    only_f = np.zeros(9, dtype=bool)
    only_f[5] = True
    assert model.predict(obs, action_masks=only_f)[0] == 5


def test_progress_bar(capsys) -> None:
    make_model().learn(64, progress_bar=True)


def test_sb3_zip_round_trip_keeps_policy_and_reference(tmp_path) -> None:
    model = make_model()
    model.learn(64)
    model.save(tmp_path / "model")
    assert not isinstance(model.policy_kwargs["lm"], th.nn.Module)
    loaded = TokenPPO.load(tmp_path / "model", env=make_env(), device="cpu")
    for part in ("policy", "reference"):
        a, b = getattr(model, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(a[name].equal(b[name]) for name in a), part
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 128


def test_learning_rate_never_goes_below_zero() -> None:
    rates = []
    model = make_model(learning_rate=lambda progress: progress * 1e-3)
    model.learn(
        100, callback=AtRolloutEnd(lambda m: rates.append(m.policy.optimizer.param_groups[0]["lr"]))
    )
    assert model.num_timesteps == 128
    assert model.policy.optimizer.param_groups[0]["lr"] == 0


# ----------------------------------------------------------------- callbacks


def test_sample_text_and_save_pretrained(tmp_path) -> None:
    path, folder = tmp_path / "samples.jsonl", tmp_path / "policy"
    model = make_model(tensorboard_log=str(tmp_path / "tb"))
    tokenizer = letter_tokenizer(LETTERS)
    model.learn(
        64 * 3,
        callback=[
            SampleTextCallback(path, n_samples=2, every=2),
            SavePretrainedCallback(folder, tokenizer, every=1),
        ],
    )
    lines = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert [line["num_timesteps"] for line in lines] == [64, 64, 192, 192]
    assert set(lines[0]) == {"num_timesteps", "prompt", "completion", "score", "ref_kl"}
    assert abs(lines[0]["ref_kl"]) < 1e-5 < abs(lines[-1]["ref_kl"])
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    for a, b in zip(saved.parameters(), model.policy.lm.parameters(), strict=True):
        assert a.equal(b)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_full_disk_while_saving_leaves_the_old_folder(tmp_path, monkeypatch) -> None:
    model, folder = make_model(), tmp_path / "policy"
    model.learn(64, callback=SavePretrainedCallback(folder))
    before = (folder / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.policy.lm), "save_pretrained", full)
    with pytest.raises(OSError, match=r"could not save .*policy.*No space left"):
        model.learn(64, callback=SavePretrainedCallback(folder))
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy"]


# ----------------------------------------------------------------- bad input


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no language model"):
        TokenPPO("CausalLMPolicy", make_env())
    with pytest.raises(ValueError, match="folder or hub id of a causal LM, got 'nowhere/at-all'"):
        make_model(lm="nowhere/at-all")
    with pytest.raises(ValueError, match="tokenizer has 9 tokens and the model 5"):
        make_model(lm=tiny_gpt2(5))
    with pytest.raises(ValueError, match="kl_coef >= 0, got -1"):
        make_model(kl_coef=-1)
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        make_model(policy_kwargs={"temperature": 0})
    with pytest.raises(ValueError, match="one-dimensional Box of token ids"):
        TokenPPO("CausalLMPolicy", "CartPole-v1", policy_kwargs={"lm": tiny_gpt2(9)})


def test_an_environment_that_does_not_append_the_action_is_refused() -> None:
    env = make_env()
    step = env.step_wait

    def shifted():
        obs, *rest = step()
        return np.where(obs >= 0, (obs + 1) % 9, -1), *rest

    env.step_wait = shifted
    with pytest.raises(ValueError, match="append each action to the observation"):
        make_model(env=env).learn(64)
