"""What every stage of train.py can be told: fields with their defaults and a sentence each.

The command line and the YAML files beside this one are made of these; nothing heavy is imported,
so that `--help` is instant. What the settings do is in stages/.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

Terms = dict[str, Any] | str | None
"""What settings say of a reward: terms by name, one name, or nothing, which is `learned`."""

FindingName = Literal[
    "first_ratio",
    "negative_kl",
    "kl_runaway",
    "clip_fraction_high",
    "clip_fraction_zero",
    "entropy_collapse",
    "repetition",
    "duplicates",
    "eos_gone",
    "length_drift",
    "explained_variance",
    "judge_falls",
    "constant_score",
]
"""What the doctor knows, `agents.findings.CHECKS`: a misspelt one is refused before the start."""


@dataclass
class Common:
    """What every stage is told."""

    run: Path | None = None
    """Run folder. `run` makes a new one, runs/<date>-<time>, if none is given."""
    seed: int = 0
    """Of every random choice; the same seed on the same machine gives the same run."""
    threads: int | None = None
    """CPU threads; None leaves the choice to torch."""
    device: str = "auto"
    """Where models compute: auto, cpu, cuda, mps."""
    dtype: str = "auto"
    """What the LM computes in: float32, bfloat16, or auto (bfloat16 where the hardware has it).
    What learns, the head and log-probabilities are float32 either way."""
    overwrite: bool = False
    """Replace results of an earlier run of the stage."""
    data: Literal["movies", "chinese-reviews"] = "movies"
    """Where a new run takes what it is not given from: movie sentences rated by people, or Chinese
    reviews labelled good or bad; either is fetched once."""


@dataclass
class SFT:
    """Supervised warm start: the language model learns the kind of text it is to write."""

    model: str = "smollm2"
    """The causal LM to start from: a folder, a hub id, or smollm2 (SmolLM2-135M, fetched once); or
    a model's config (.json), to begin with random weights and a tokenizer learned from the texts,
    of at most as many tokens as the config's vocabulary has."""
    texts: Path | None = None
    """Texts to learn from, one per line (.txt), or with a key or column `text` (.jsonl, .csv); or
    with `prompt` and `completion`, or `prompt` and `reference`, where the prompt is only read; or
    conversations, with `messages` (.jsonl), of which the answers are learned."""
    max_tokens: int = 48
    """Longer texts, with their prompts, are cut there."""
    epochs: float = 1.0
    """Passes over the texts."""
    max_steps: int | None = 64
    """Updates at most; None: as many as the epochs have."""
    batch_size: int = 16
    """Texts per update."""
    learning_rate: float = 5e-4
    """Highest learning rate; it rises over the first tenth and falls linearly to 0."""
    trainable_layers: int | None = 12
    """How many of the last transformer layers learn; None: all of the model and its embeddings."""


@dataclass
class Reward:
    """Reward model and judge, each learned from its own part of the human feedback."""

    model: str = "minilm"
    """What both start from: a folder, a hub id, minilm (MiniLM-L6, fetched once), or sft, the run's
    own warm start."""
    members: int = 1
    """More than one: the reward is an ensemble of so many models, their mean less their spread."""
    ties: Literal["half", "rao-kupper"] = "half"
    """A tie is half a win for each side, or the likelier the less the two differ."""
    margin: float = 0.0
    """How far the logit of the chosen side has to be above the other's."""
    label_smoothing: float = 0.0
    """Share of the choices that are expected to be the wrong way round."""
    weigh_annotators: bool = False
    """Count people's answers by how well they agree with the others'."""
    feedback: Path | None = None
    """Feedback to learn the reward from (.jsonl: ratings, comparisons, labels)."""
    judge_feedback: Path | None = None
    """Feedback for the judge, which is never a reward. Without it, and with own `feedback`, there
    is no judge."""
    held_out: float = 0.1
    """Share of the texts that the report is measured on."""
    epochs: float = 2.5
    """Passes over the feedback."""
    batch_size: int = 32
    """Records per update."""
    learning_rate: float = 2e-4
    """Highest learning rate."""


@dataclass
class PPO:
    """Token-level PPO against the reward model, held to the warm start by a KL penalty."""

    policy: str | None = None
    """The LM to train: a folder or hub id. None: the run's sft/."""
    reference: str | None = None
    """The LM that the policy is held to. None: the policy as it is at the start."""
    reward_model: str | None = None
    """A folder or hub id of a sequence classifier with one label. None: the run's."""
    reward: Terms = None
    """What is paid, if not the reward model's score alone: terms with their weights, such as
    {learned: 0.5, rougeL: 1, length: {weight: 0.1, high: 30}} (docs/recipes.md lists them), or one
    term; a function of your own is module:name."""
    prompts: Path | None = None
    """Training prompts (.txt, .jsonl, .csv), or conversations (.jsonl, with `messages`), of which
    the user's turns are taken. None: the run's."""
    user_fn: str | None = None
    """Who speaks for the user in chats of several turns whose prompts have no such turns: a
    function, as module:name (docs/recipes.md)."""
    max_turns: int | None = None
    """Answers in a conversation, at most; needed with user_fn."""
    max_user_tokens: int | None = None
    """Longest turn of the user, tokens, with what the chat template puts around it; needed with
    user_fn."""
    vocabulary: Path | None = None
    """Texts (.txt, .jsonl, .csv) whose tokens are all that the policy may write with. None: the
    run's language.jsonl, or, with own `prompts`, the whole vocabulary."""
    total_timesteps: int = 15_000
    """Tokens to generate; the last rollout is finished."""
    n_envs: int = 128
    """Rows that write side by side, on all processes together."""
    n_steps: int | None = None
    """Tokens per row between updates. None: one whole episode per row, whatever its length."""
    batch_size: int = 768
    """Tokens per minibatch."""
    n_epochs: int = 2
    """Passes over each rollout."""
    learning_rate: float = 7e-4
    """Times min(5·(1 − p), 0.1 + 0.9·p), where p goes from 1 to 0: a short rise, a linear fall."""
    trainable_layers: int | None = 6
    """How many of the last transformer layers learn; None: all of the model."""
    lora_rank: int | None = None
    """Learn low-rank adapters of this rank, in the layers that learn, instead of their weights."""
    lora_alpha: float | None = None
    """Scale of the adapters, times 1 / rank. None: twice the rank."""
    merge_lora: bool = True
    """Save the policy with its adapters merged in; false: the adapters alone, as peft does, which
    point at the model that they belong to, the run's sft/ say, by its path."""
    value_network: bool = False
    """Read the values from a second copy of the LM rather than from the policy's own states."""
    value_warmup: int = 0
    """Rollouts at the start from which the value learns alone."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass: less memory, more time."""
    shard: bool = False
    """With torchrun: split the weights over the processes (FSDP2), not a copy in each (DDP); not
    with lora_rank."""
    micro_batch_size: int | None = None
    """Tokens of a minibatch whose activations are held at a time; the gradient stays the same."""
    max_new_tokens: int = 32
    """Longest completion, or turn of a conversation, tokens."""
    min_new_tokens: int = 6
    """Tokens before a completion may end."""
    temperature: float = 0.7
    """Divides the logits, in training and evaluation."""
    kl_coef: float = 0.02
    """Weight of the KL penalty at the start, score units per nat."""
    target_ref_kl: float | None = None
    """Adapt the weight so that the KL comes to this, nats per completion."""
    kl_horizon: float = 1000.0
    """Episodes over which an adaptive weight moves."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a completion that ran out of tokens."""
    gae_lambda: float = 1.0
    """λ of the advantage estimate; 1 leans on the score rather than on a value not yet learned."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this norm."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """NaN or infinity in a reward, value, loss or gradient: stop with an error before any
    parameter changes, or leave the episode or minibatch out and count it."""
    save_every: int | None = None
    """Rollouts between saves of the policy; it is always saved at the end."""
    stop_on: list[FindingName] = field(default_factory=list)
    """Findings of the doctor (docs/doctor.md) that stop the run, such as [kl_runaway]."""
    resume: Path | None = None
    """Go on with the PPO of this run folder, from its newest whole checkpoint and with the settings
    that it began with; only total_timesteps, stop_on and what is saved when may be others."""
    checkpoint_every: int | None = 4
    """Rollouts from one checkpoint to the next; null: only when stopped (SIGTERM, Ctrl-C) and at
    the end."""
    checkpoint_keep: int = 2
    """So many of the last checkpoints are kept, and the best; one of a finished training."""


@dataclass(kw_only=True)
class Writing:
    """How completions are written; what is not given is as the policy was trained."""

    vocabulary: Path | None = None
    """Texts whose tokens are all that may be written with."""
    max_new_tokens: int | None = None
    """Longest completion, tokens."""
    min_new_tokens: int | None = None
    """Tokens before a completion may end."""
    temperature: float | None = None
    """Divides the logits."""
    user_fn: str | None = None
    """Who speaks for the user in chats of several turns: a function, as module:name. Prompts with
    `turns` need none."""
    max_turns: int | None = None
    """Answers in a conversation, at most."""
    max_user_tokens: int | None = None
    """Longest turn of the user, tokens, with what the chat template puts around it."""


@dataclass
class Evaluate(Writing):
    """Held-out prompts, before and after: scores, KL, text statistics, samples, a report."""

    prompts: Path | None = None
    """Test prompts. None: the run's."""
    n_prompts: int = 120
    """How many of them are used."""
    policy: str | None = None
    """The trained policy. None: the run's policy/."""
    reference: str | None = None
    """What it is compared with, and the KL is measured to; the report calls it so. None: the run's
    sft/, the warm start."""
    reward_model: str | None = None
    """None: the run's reward_model/."""
    reward: Terms = None
    """As for ppo. None: as the policy was trained."""
    metrics: list[str] = field(default_factory=list)
    """Terms that are measured beside the reward's, such as [exact, chrf]."""
    judge: str | None = None
    """None: the run's judge/, if there is one."""
    best_of: int = 4
    """Samples of the reference per prompt for the best-of-n baseline; 1 leaves it out."""
    n_samples: int = 10
    """Prompts shown side by side."""


@dataclass
class Check:
    """What a run is to be made of."""

    model: str | None = None
    """The causal LM to train: a folder, a hub id, or smollm2. None: the run's sft/."""
    tokenizer: str | None = None
    """Its tokenizer: a folder or hub id. None: the model's own."""
    reward: Terms = None
    """A reward model's folder or hub id, a function as module:name, or terms as for ppo. None: the
    run's reward_model/, if there is one."""
    prompts: Path | None = None
    """Prompts (.txt, .jsonl, .csv). None: a few English ones."""
    vocabulary: Path | None = None
    """Texts whose tokens are all that may be written with. None: the whole vocabulary."""
    max_new_tokens: int = PPO.max_new_tokens
    """Longest completion, tokens."""
    min_new_tokens: int = PPO.min_new_tokens
    """Tokens before a completion may end."""
    temperature: float = PPO.temperature
    """Divides the logits."""
    trainable_layers: int | None = PPO.trainable_layers
    """How many of the last transformer layers are to learn; None: all of the model."""
    n_envs: int = PPO.n_envs
    """Rows that are to write side by side, for the forecast."""
    batch_size: int = PPO.batch_size
    """Tokens per minibatch, for the forecast."""
    n_epochs: int = PPO.n_epochs
    """Passes over each rollout, for the forecast."""
    micro_batch_size: int | None = None
    """Tokens of a minibatch whose activations are held at a time."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass."""
    json: Path | None = None
    """File for all that was found, as JSON."""


@dataclass
class Run:
    """The main job: sft, reward, ppo, evaluate."""

    sft: SFT = field(default_factory=SFT)
    reward: Reward = field(default_factory=Reward)
    ppo: PPO = field(default_factory=PPO)
    evaluate: Evaluate = field(default_factory=Evaluate)


@dataclass
class Annotate(Writing):
    """People say which completions are better: on a page in the browser, or at the terminal."""

    store: Path | None = None
    """Where tasks and answers are kept. None: the run's feedback.sqlite."""
    kind: Literal["comparison", "rating", "label"] | None = None
    """What is asked: which of two is better, how good one is from 1 to 5, or whether it is good.
    None: what the store has tasks of, or else comparisons."""
    tasks: Path | None = None
    """Completions to ask about (.jsonl). None: samples of the policy, if the store has no task, or
    none of that kind."""
    policy: str | None = None
    """Whose samples are asked about. None: the run's policy/, or its sft/."""
    against: str | None = None
    """A second policy, whose samples are set beside those of the first."""
    prompts: Path | None = None
    """Prompts of the samples. None: those that the policy's run was trained on, else the run's."""
    n_prompts: int = 100
    """How many of them are used."""
    samples: int = 2
    """Completions per prompt, of each policy."""
    ensemble: Path | None = None
    """Reward models, as `reward --members` makes them: what they differ on is asked first, of the
    tasks that are there already too."""
    overlap_share: float = 0.1
    """Share of the tasks that several people are asked, to see how far they agree."""
    overlap_annotators: int = 3
    """How many people that is."""
    gold_rate: float = 0.1
    """Share of the questions whose answer is known, while there are such."""
    terminal: bool = False
    """Ask here, not on a page."""
    annotator: str | None = None
    """Who answers at the terminal. None: the user who is logged in."""
    host: str = "127.0.0.1"
    """Address of the page; others than this machine's own are reachable from outside."""
    port: int = 8000
    """Port of the page."""
    names: list[str] = field(default_factory=list)
    """Names by which the page is called up, but for the host: those in the certificate, say."""
    lead: str | None = None
    """Who runs the collection: the dashboard shows them disagreements on all tasks."""
    certificate: Path | None = None
    """TLS certificate of the page; without it passwords cross a network in the clear."""
    key: Path | None = None
    """Its key."""


@dataclass
class SignIn:
    """An account for the page, or a new password for it; the page may be running."""

    name: str
    """To sign in with. Answers know the person by a pseudonym."""
    store: Path | None = None
    """Where it goes. None: the run's feedback.sqlite."""


@dataclass
class Import:
    """Answers that were given elsewhere."""

    file: Path
    """Records (.jsonl), or ratings (.csv with the columns prompt, completion, rating)."""
    scale: tuple[float, float] = (1.0, 5.0)
    """Of the ratings in a .csv that names none."""
    store: Path | None = None
    """Where they go. None: the run's feedback.sqlite."""


@dataclass
class Export:
    """Answers as a file."""

    file: Path
    """Where to: .jsonl, for `reward --feedback` and TRL's trainers, or .csv for ratings alone."""
    kind: Literal["comparison", "rating", "label"] | None = None
    """Answers of one kind only."""
    ties: bool = True
    """Ties too; TRL's trainers would take one for a preference."""
    store: Path | None = None
    """Where they are. None: the run's feedback.sqlite."""


@dataclass
class Forget:
    """One person's answers, name and password are erased."""

    name: str
    """As at sign-in, or the pseudonym."""
    store: Path | None = None
    """Where they are. None: the run's feedback.sqlite."""


@dataclass
class Worth:
    """How good a reward model gets with the number of answers."""

    kind: Literal["comparison", "rating", "label"] | None = None
    """Answers of this kind. None: of which there are most."""
    least_gain: float = 0.01
    """What twice as many answers must bring to be worth it, in accuracy, or in correlation with
    ratings."""
    model: str = Reward.model
    """What every fit starts from: a folder, a hub id, or minilm."""
    held_out: float = 0.2
    """Share of the texts that all fits are measured on."""
    repeats: int = 2
    """Fits for each number of answers."""
    epochs: float = Reward.epochs
    """Passes over the answers."""
    batch_size: int = 16
    """Records per update."""
    learning_rate: float = Reward.learning_rate
    """Highest learning rate."""
    store: Path | None = None
    """Where the answers are. None: the run's feedback.sqlite."""


@dataclass
class Compare(Writing):
    """Two policies on the same prompts: how often is the first one's completion the better?"""

    first: str
    """A policy: folder or hub id."""
    second: str
    """Another one."""
    prompts: Path | None = None
    """Prompts that neither was trained on. None: those that the first one's run was evaluated on,
    else the run's test prompts."""
    n_prompts: int = 100
    """How many of them are used."""
    ask: bool = False
    """Ask people too: the pairs become tasks for `annotate`, and their answers are counted."""
    store: Path | None = None
    """Where these tasks and answers are. None: the run's compare.sqlite."""


@dataclass
class Simulated:
    """People made of a formula, who answer by the reward model of the run's own data."""

    annotators: int = 3
    """How many there are."""
    rationality: float = 2.0
    """How sure they are, per unit of the score; 0 answers at random."""
    tie_band: float = 0.2
    """Log-odds within which they find two completions equally good."""
    position_bias: float = 0.0
    """Log-odds in favour of the completion that is shown first."""
    laziness: float = 0.0
    """Share of the answers given without reading."""


@dataclass
class Loop:
    """Round after round: sample, ask, fit, PPO from the last policy, evaluate."""

    rounds: int = 3
    """How many; more can be added later."""
    comparisons: int = 300
    """Pairs of completions that people are asked about in each round."""
    overlap_share: float = 0.1
    """Share of them that several people are asked, to see how far they agree."""
    overlap_annotators: int = 3
    """How many people that is; of simulated ones all, if there are fewer. A round waits for so many
    answers, and may be told to wait for fewer."""
    people: Literal["real", "simulated"] = "real"
    """Who answers. Real people stop the loop until they have: call it again then."""
    simulated: Simulated = field(default_factory=Simulated)
    judge: Reward = field(default_factory=Reward)
    """The judge of all rounds, and the reward model that simulated people answer by."""
    sft: SFT = field(default_factory=SFT)
    reward: Reward = field(default_factory=partial(Reward, epochs=4, batch_size=16))
    """The reward model of each round, learned from all answers so far."""
    ppo: PPO = field(default_factory=PPO)
    evaluate: Evaluate = field(default_factory=Evaluate)


SPACE = Path(__file__).with_name("tune.yaml")


@dataclass
class Tune:
    """Settings of PPO that do best by the judge within a KL budget."""

    space: Path = SPACE
    """What to search: settings of PPO, with a list of values or {low, high} for each."""
    trials: int = 20
    """Trainings in all, those of earlier calls and of other processes included."""
    kl_budget: float = 8.0
    """KL to the reference that costs nothing, nats per completion."""
    kl_weight: float = 0.2
    """What each nat above that takes from the judge's score."""
    judge: str | None = None
    """None: the run's judge/."""
    n_prompts: int = 128
    """Training prompts that are held out to measure on; at most half of them."""
    evaluations: int = 4
    """Measurements of a training; it may be given up from half of them on."""
    ppo: PPO = field(default_factory=PPO)
    """What is not searched."""


@dataclass
class Chat(Writing):
    """A conversation with a policy, at the terminal."""

    run_folder: Path
    """The run whose policy it is."""
    policy: str | None = None
    """Another model: folder or hub id. None: the run's policy/."""
