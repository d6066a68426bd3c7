"""`TextEnvironment-v0` under Tianshou, TorchRL, RLlib, skrl and TRL, unmodified.

They are large, and RLlib pins an older Gymnasium: `make test-plug-ins` runs these tests in an
environment of their own.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer
from test_agents_token_ppo import arguments, count_a
from torch import nn

import text_env  # registers the environment
from agents import TokenEmbeddingExtractor

pytestmark = [pytest.mark.plug_ins, pytest.mark.filterwarnings("ignore")]
ID = "TextEnvironment-v0"
V, LENGTH = 9, 10


def make() -> gym.Env:
    return gym.make(ID, **arguments())


def embedded() -> nn.Sequential:
    """Ids (n, 10) to features (n, 64)."""
    extractor = TokenEmbeddingExtractor(make().observation_space, 8)
    return nn.Sequential(extractor, nn.Linear(extractor.features_dim, 64), nn.ReLU())


def assert_trained(before: list[th.Tensor], parameters) -> None:
    after = list(parameters)
    assert all(th.isfinite(p).all() for p in after)
    assert any(not p.equal(b) for p, b in zip(after, before, strict=True))


def copies(module: nn.Module) -> list[th.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_tianshou_ppo_learns() -> None:
    from tianshou.algorithm import PPO
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Batch, Collector, CollectStats, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.trainer import OnPolicyTrainerParams
    from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

    class Body(nn.Module):
        output_dim = 64

        def __init__(self) -> None:
            super().__init__()
            self.body = embedded()

        def forward(self, obs, state=None, info=None):
            return self.body(th.as_tensor(np.asarray(obs))), state

        def get_output_dim(self) -> int:
            return self.output_dim

    th.manual_seed(0)
    envs = DummyVectorEnv([make] * 8)
    envs.seed(0)
    env = make()
    body = Body()
    actor = DiscreteActor(
        preprocess_net=body, action_shape=env.action_space.n, softmax_output=False
    )
    policy = DiscreteActorPolicy(
        actor=actor, action_space=env.action_space, observation_space=env.observation_space
    )
    algorithm = PPO(
        policy=policy,
        critic=DiscreteCritic(preprocess_net=body),
        optim=AdamOptimizerFactory(lr=3e-3),
        gamma=1.0,
        advantage_normalization=True,
    )

    def keep_no_info(action_batch, rollout_batch) -> None:
        """Tianshou takes texts that some steps' infos have, and others' not, for missing values."""
        rollout_batch.info = Batch()

    collector = Collector[CollectStats](
        algorithm, envs, VectorReplayBuffer(2048, 8), on_step_hook=keep_no_info
    )
    before = copies(actor)
    algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=8192,
            collection_step_num_env_steps=512,
            update_step_num_repetitions=4,
            batch_size=128,
            verbose=False,
            show_progress=False,
        )
    )
    assert_trained(before, actor.parameters())
    collector.reset()
    returns = collector.collect(n_episode=50).returns
    assert np.mean(returns) > 2


def test_torchrl_takes_it() -> None:
    from torchrl.envs.libs.gym import GymEnv, GymWrapper
    from torchrl.envs.utils import check_env_specs

    check_env_specs(GymEnv(ID, **arguments()))
    env = GymWrapper(make())
    env.set_seed(0)
    rollout = env.rollout(50, break_when_any_done=False)
    assert rollout["observation"].shape == (50, LENGTH)
    assert rollout["next", "done"].any() and th.isfinite(rollout["next", "reward"]).all()


def test_torchrl_reinforce_learns() -> None:
    """A policy gradient on whole rollouts, actions one-hot as TorchRL has them."""
    from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule
    from tensordict.nn import ProbabilisticTensorDictSequential as Sequential
    from torchrl.envs.libs.gym import GymEnv
    from torchrl.modules import OneHotCategorical

    th.manual_seed(0)
    env = GymEnv(ID, **arguments())
    env.set_seed(0)
    network = nn.Sequential(embedded(), nn.Linear(64, V))
    policy = Sequential(
        TensorDictModule(network, ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"], ["action"], distribution_class=OneHotCategorical, return_log_prob=True
        ),
    )
    optimizer = th.optim.Adam(policy.parameters(), lr=1e-2)
    means = []
    for _ in range(20):
        with th.no_grad():
            rollout = env.rollout(160, policy, break_when_any_done=False)
        reward, done = rollout["next", "reward"][:, 0], rollout["next", "done"][:, 0]
        going, after = 0.0, []
        for r, d in zip(reward.flip(0).tolist(), done.flip(0).tolist(), strict=True):
            going = r if d else going + r
            after.append(going)
        returns = th.tensor(after).flip(0)
        advantages = (returns - returns.mean()) / (returns.std() + 1e-6)
        log_prob = policy.get_dist(rollout).log_prob(rollout["action"])
        optimizer.zero_grad()
        (-(log_prob * advantages).mean()).backward()
        optimizer.step()
        means.append(float(reward[done].mean()))
    assert means[0] < 2 and np.mean(means[-5:]) > 3


def test_rllib_ppo_learns() -> None:
    import ray
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.tune.registry import register_env

    register_env("text", lambda config: gym.make(ID, **arguments(obs_dtype="float32")))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        config = (
            PPOConfig()
            .environment("text")
            .env_runners(num_env_runners=0, num_envs_per_env_runner=8)
            .training(
                train_batch_size_per_learner=512, minibatch_size=128, num_epochs=8, gamma=1.0,
                lr=1e-3, entropy_coeff=0.01,
            )
            .debugging(seed=0)
        )  # fmt: skip
        algorithm = config.build_algo()
        returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(12)]
        algorithm.stop()
    finally:
        ray.shutdown()
    assert np.isfinite(returns).all() and returns[0] < 1.5 and returns[-1] > 2


def test_skrl_ppo_learns(tmp_path) -> None:
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
    from skrl.trainers.torch import SequentialTrainer
    from skrl.utils import set_seed

    class Actor(CategoricalMixin, Model):
        def __init__(self, **spaces) -> None:
            Model.__init__(self, **spaces)
            CategoricalMixin.__init__(self)
            self.net = nn.Sequential(embedded(), nn.Linear(64, V))

        def compute(self, inputs, role=""):
            return self.net(inputs["observations"]), {}

    class Critic(DeterministicMixin, Model):
        def __init__(self, **spaces) -> None:
            Model.__init__(self, **spaces)
            DeterministicMixin.__init__(self)
            self.net = nn.Sequential(embedded(), nn.Linear(64, 1))

        def compute(self, inputs, role=""):
            return self.net(inputs["observations"]), {}

    set_seed(0)
    ended: list[float] = []

    def counted(prompts, completions, **columns):
        scores = count_a(prompts, completions)
        ended.extend(scores)
        return scores

    envs = gym.make_vec(
        ID, num_envs=8, vectorization_mode="vector_entry_point", **arguments(reward_fn=counted)
    )
    env = wrap_env(envs)
    spaces = {
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "device": "cpu",
    }
    actor = Actor(**spaces)
    cfg = PPO_CFG(
        rollouts=64, learning_epochs=4, mini_batches=4, learning_rate=3e-3, discount_factor=1.0
    )
    cfg.experiment.directory = str(tmp_path)
    cfg.experiment.write_interval = cfg.experiment.checkpoint_interval = 0
    agent = PPO(
        models={"policy": actor, "value": Critic(**spaces)},
        memory=RandomMemory(memory_size=64, num_envs=8, device="cpu"),
        cfg=cfg,
        **spaces,
    )
    before = copies(actor)
    trainer = SequentialTrainer(
        env=env,
        agents=agent,
        cfg={"timesteps": 1024, "headless": True, "disable_progressbar": True},
    )
    trainer.train()
    assert_trained(before, actor.parameters())
    assert np.mean(ended[:50]) < 1.5 and np.mean(ended[-50:]) > 2


def test_a_reward_function_of_trl_in_the_environment() -> None:
    """Those that TRL ships want messages; the text is one."""
    from trl.rewards import think_format_reward

    def reward(prompts, completions, **columns):
        messages = [[{"role": "assistant", "content": text}] for text in completions]
        return think_format_reward(completions=messages, **columns)

    texts = ["<think>\nd\n</think>\ne", "abc"]
    assert reward(prompts=["", ""], completions=texts) == [1.0, 0.0]
    env = gym.make(ID, **arguments(reward_fn=reward))
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, score, terminated, _, _ = env.step(0)
    assert score == 0.0


def test_a_learned_reward_model_in_trls_trainer(tmp_path) -> None:
    """GRPO of TRL, two steps: our model is called, the rewards are finite."""
    from conftest import tiny_llama
    from datasets import Dataset
    from test_reward_models_learned import make_backbone
    from trl import GRPOConfig, GRPOTrainer

    from reward_models import LearnedRewardModel

    backbone = make_backbone(tmp_path / "backbone", "bert")
    reward_model, calls = LearnedRewardModel.from_pretrained(str(backbone), seed=0), []

    def counted(prompts, completions, **columns):
        calls.append(len(completions))
        return reward_model(prompts=prompts, completions=completions, **columns)

    tokenizer = letter_tokenizer("abcdef")
    trainer = GRPOTrainer(
        model=tiny_llama(V),
        reward_funcs=[counted],
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, max_steps=2, use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", logging_steps=1, beta=0.0,
        ),
        train_dataset=Dataset.from_dict({"prompt": [">", ">>", ">a>", ">bb>"]}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert calls == [4, 4] and len(rewards) == 2 and np.isfinite(rewards).all()


def test_our_pairwise_loss_is_that_of_trls_reward_trainer(tmp_path) -> None:
    """Same model, same four pairs: the same loss and the same gradient, with margin and without."""
    from datasets import Dataset
    from test_reward_models_learned import make_backbone
    from trl import RewardConfig, RewardTrainer

    from reward_models import Comparison, LearnedRewardModel
    from reward_models.batches import Example, claim, collate
    from reward_models.loss import feedback_loss

    backbone = make_backbone(tmp_path / "backbone", "llama")
    reward_model = LearnedRewardModel.from_pretrained(str(backbone), device="cpu", seed=0)
    model, tokenizer = reward_model.model, reward_model.tokenizer
    th.nn.init.normal_(model.score.weight, generator=th.Generator().manual_seed(0))
    records = [
        Comparison("the film", " was good", " was very dull and poor"),
        Comparison("", "lovely story", "awful"),
        Comparison("a", " plot", " film"),
        Comparison("its story", " is great and fine", " is"),
    ]
    rows = [tokenizer(list(record.texts))["input_ids"] for record in records]

    def gradients() -> list[th.Tensor]:
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    for margin in (0.0, 0.7):
        columns = {"chosen_ids": [a for a, _ in rows], "rejected_ids": [b for _, b in rows]}
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, use_cpu=True,
                bf16=False, report_to="none", remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_dict(columns | {"margin": [margin] * 4}),
            processing_class=tokenizer,
        )  # fmt: skip
        theirs = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
        model.zero_grad()
        theirs.backward()
        their_gradients = gradients()

        batch = collate(
            [Example(ids, claim(record)) for ids, record in zip(rows, records, strict=True)],
            tokenizer.pad_token_id,
        )
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        names = ("first", "second", "target", "is_rating", "weight")
        ours = feedback_loss(logits, *(batch[name] for name in names), margin=margin)
        ours.backward()
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
        assert abs(ours.item() - np.log(2)) > 1e-2  # that of a model that tells nothing apart
        for our_gradient, their_gradient in zip(gradients(), their_gradients, strict=True):
            assert th.allclose(our_gradient, their_gradient, atol=1e-6)


def test_gymnasiums_own_checker_under_the_older_gymnasium() -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(make().unwrapped, skip_render_check=True)
    assert text_env.TextEnvironment is type(make().unwrapped)
