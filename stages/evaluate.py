"""Policy and warm start, or another reference, are compared on test prompts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from configs.settings import Common, Evaluate
from stages.card import complete_card
from stages.data import data, source_of
from stages.process import device_of, dtype_of, give_back_memory, progress, say
from stages.report import POLICY, name_of, summary, write_report
from stages.rewards import reward_function
from stages.run_folder import folder_of, left_by, stage
from stages.writing import Episodes, as_in_ppo, writer, writing_env

if TYPE_CHECKING:
    import numpy as np

    from agents import CausalLMPolicy


def evaluate(common: Common, settings: Evaluate) -> None:
    """Compare policy and warm start, or reference, on test prompts; leaves report.md and more."""
    from agents.language_model import load_named
    from agents.likelihood import LogLikelihood
    from reward_models import EachAnswer, LearnedRewardModel, LexiconSentiment
    from reward_models.assets import sentiment_lexicon
    from reward_models.contract import asked_for
    from reward_models.evaluation import mean_interval
    from reward_models.measures import LIKELIHOOD, measures
    from text_env.prompts import load_prompts
    from text_env.vocabulary import load_tokenizer

    folder = folder_of(common)
    with stage(common, "evaluate") as (facts, made):
        settings = as_in_ppo(folder, settings)
        reference = settings.reference or str(left_by("sft", folder / "sft"))
        policy = settings.policy or str(left_by("ppo", folder / "policy"))
        prompts = load_prompts(settings.prompts or data(common) / "test_prompts.jsonl")
        facts["prompts"] = settings.prompts and str(settings.prompts)
        prompts = prompts[: settings.n_prompts]
        models = (settings.reward_model, settings.reference)
        rewarder = reward_function(common, settings.reward, *models)
        facts["reward"], facts["reference"] = settings.reward, name_of(reference)
        scorers: dict[str, Callable[..., Any]] = {"score": rewarder}
        for name in settings.metrics:
            scorers[name] = reward_function(common, name, *models)
        if settings.judge or (folder / "judge").exists():
            judge = LearnedRewardModel.load(settings.judge or folder / "judge", device_of(common))
            scorers["judge"] = lambda prompts, completions, **_: judge.human_scale(
                prompts, completions
            )
            facts["judge_scale"] = judge.scale
        if settings.prompts is None and source_of(common) == "movies":  # the lexicon is English
            scorers["lexicon"] = LexiconSentiment(sentiment_lexicon())
        asked = set().union(*map(asked_for, scorers.values()))
        paid = EachAnswer(rewarder, also=asked)
        groups = write_all(common, settings, reference, policy, paid, prompts)
        give_back_memory()
        tokenizer, lm = load_tokenizer(reference), load_named(reference).to(device_of(common))
        has_turns = "turns" in prompts[0] or settings.user_fn is not None
        if tokenizer.eos_token_id is not None and not has_turns:
            scorers[LIKELIHOOD] = LogLikelihood(lm, tokenizer, dtype_of(common))
        columns = sorted(set(prompts[0]) - {"prompt"} | asked)
        scores = {name: scores_of(group, columns, scorers) for name, group in groups.items()}
        facts["measures"] = {name: measures(groups[name], scores[name]) for name in groups}
        facts["gain"] = {
            key: mean_interval(scores[POLICY][key] - scores[facts["reference"]][key])
            for key in scores[POLICY]
        }
        write_report(folder, made, facts, groups, scores, prompts, settings.n_samples)
    if policy == str(folder / "policy"):
        complete_card(folder, facts)
    say(summary(facts))
    say(f"Report: {folder / 'report.md'}")


def scores_of(
    episodes: Episodes, columns: list[str], scorers: dict[str, Callable[..., Any]]
) -> "dict[str, np.ndarray]":
    """Score a writer's texts by all scorers, and by the terms of one that has several."""
    import numpy as np

    from reward_models import WeightedSum
    from reward_models.contract import ask
    from reward_models.conversations import answers_of

    answers = answers_of(episodes, columns)
    given = (answers.prompts, answers.completions, answers.columns)
    found: dict[str, np.ndarray] = {}
    for key, scorer in scorers.items():
        if key in found:  # a metric that is a term of the reward too
            continue
        if isinstance(scorer, WeightedSum):
            parts = [answers.mean(part) for part in scorer.parts(*given)]
            found[key] = scorer.total(parts)
            found |= dict(zip(scorer.names, parts, strict=True))
        else:
            found[key] = answers.mean([x.sum() for x in ask(scorer, *given)])
    return found


def write_all(
    common: Common,
    settings: Evaluate,
    reference: str,
    policy: str,
    rewarder: Callable[..., Any],
    prompts: list[dict[str, Any]],
) -> dict[str, Episodes]:
    """Let policy, reference and baselines each continue every prompt once.

    Returns:
        By writer, an episode per prompt: the environment's final info and `ref_kl`.
    """
    import numpy as np

    from agents.language_model import Reference
    from agents.writing import write_episodes

    env = writing_env(common, settings, policy, prompts, rewarder)

    def write(
        model: "CausalLMPolicy", reference: Reference | None, greedy: bool = False
    ) -> Episodes:
        bar.update()
        give_back_memory()  # an earlier writer's
        env.seed(common.seed)  # begins the prompts' order anew
        return write_episodes(model, env, reference, deterministic=greedy)

    name, model = name_of(reference), writer(common, settings, env, reference)
    frozen = Reference(model.lm, model)
    bar = progress(2 + settings.best_of, "writing")
    samples = [write(model, None) for _ in range(settings.best_of)]
    groups = {
        name: [{**e, "ref_kl": 0.0} for e in samples[0]],
        POLICY: write(writer(common, settings, env, policy), frozen),
        f"{name}, greedy": write(model, frozen, greedy=True),
    }
    if settings.best_of > 1:
        best = [max(row, key=lambda e: e["score"]) for row in zip(*samples, strict=True)]
        # The KL of best-of-n is at most log n - (n - 1)/n (Beirami et al. 2024), whatever the text.
        bound = float(np.log(settings.best_of) - (settings.best_of - 1) / settings.best_of)
        groups[f"best of {settings.best_of}"] = [{**e, "ref_kl": bound} for e in best]
    bar.close()
    return groups
