"""Round after round: sample, ask, fit, PPO from the last policy, evaluate."""

import json
import math
import random
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.settings import Common, Loop, Simulated, Writing
from stages.data import data
from stages.evaluate import evaluate
from stages.people import with_uncertainty
from stages.ppo import ppo
from stages.process import device_of, progress, say, set_up
from stages.report import POLICY, reference_in
from stages.resume import as_begun
from stages.reward import reward
from stages.run_folder import folder_of, is_done, read_lines, write_text
from stages.sft import sft
from stages.writing import samples_of, some_prompts

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from reward_models.feedback import FeedbackStore


def loop(common: Common, settings: Loop) -> None:
    """Go round: sample, ask people, fit a reward model, PPO from the last policy, evaluate.

    A round is a folder of the run. What is there is not done again, so a loop that was stopped, by
    people who have not answered yet or by anything else, goes on where it was, with the settings
    that it began with (config-loop.yaml).
    """
    folder = folder_of(common)
    policy = prepare_loop(common, settings)
    first = settings.ppo.reference or policy
    told: dict[str, Any] = {"prompts": settings.ppo.prompts, "vocabulary": settings.ppo.vocabulary}
    if settings.ppo.prompts is None:
        told = {"prompts": data(common) / "prompts.jsonl"}
        told["vocabulary"] = settings.ppo.vocabulary or data(common) / "language.jsonl"
    tests = settings.evaluate.prompts or data(common) / "test_prompts.jsonl"
    settings = replace(
        settings,
        ppo=replace(settings.ppo, reference=first, **told),
        evaluate=replace(
            settings.evaluate, prompts=tests, reference=first, judge=str(folder / "judge")
        ),
    )
    ensemble = None
    for number in range(1, settings.rounds + 1):
        turn = replace(common, run=folder / f"round-{number}", seed=common.seed + number)
        here = folder_of(turn)
        here.mkdir(exist_ok=True)
        say(f"==== round {number}")
        records = ask_about(turn, settings, policy, ensemble)
        if records is None:
            return
        model, trained = here / "reward_model", here / "policy"
        if not is_done(turn, "reward"):
            reward(turn, replace(settings.reward, feedback=records, judge_feedback=None))
        if not is_done(turn, "ppo"):
            how = replace(settings.ppo, policy=policy, reward_model=str(model))
            if any(here.glob("ppo.unfinished/checkpoints/step-*")):
                how = as_begun(turn, replace(how, resume=here), asked=("resume",))
            ppo(turn, how)
        if not is_done(turn, "evaluate"):
            evaluate(turn, settings.evaluate)
        policy, ensemble = str(trained), model if settings.reward.members > 1 else None
        write_loop_report(folder, number)
    say(f"Report: {folder / 'loop.md'}")


def ask_about(common: Common, settings: Loop, policy: str, ensemble: Path | None) -> Path | None:
    """Sample from a round's policy and have people compare the samples.

    Returns:
        The file of all answers so far; None while the round has not enough.
    """
    from reward_models.feedback import (
        FeedbackStore,
        tasks_from_completions,
        with_chats,
        write_feedback,
    )
    from text_env.prompts import load_prompts

    here, source = folder_of(common), settings.ppo.prompts
    assert source is not None
    asked, records, n = here / "asked.json", here / "feedback.jsonl", settings.comparisons
    if records.exists():
        return records
    several = settings.overlap_annotators if settings.overlap_share else 1
    if settings.people == "simulated":
        several = min(several, settings.simulated.annotators)
    with FeedbackStore(here.parent / "feedback.sqlite", common.seed) as store:
        if not asked.exists():
            set_up(common)
            how = Writing(**{f.name: getattr(settings.ppo, f.name) for f in fields(Writing)})
            prompts = some_prompts(load_prompts(source), n, common.seed)
            pairs = math.ceil(n / len(prompts)) * (2 if ensemble else 1)  # some to choose from
            samples = samples_of(common, how, policy, prompts, 2 * pairs)
            tasks = tasks_from_completions(samples.texts, "comparison", here.name)
            tasks = with_chats(tasks, samples.chats)
            random.Random(common.seed).shuffle(tasks)
            if ensemble is not None:
                tasks = with_uncertainty(common, tasks, ensemble)
                tasks.sort(key=lambda task: task.uncertainty or 0.0, reverse=True)
            tasks = tasks[:n]  # what is too many now would be asked in the rounds to come
            store.add(tasks, settings.overlap_share, several)
            write_text(asked, json.dumps({"tasks": len(tasks)}))
        if settings.people == "simulated":
            simulate(common, settings.simulated, store)
        n, lacking = store.count_open(here.name, several)
        if lacking:
            share = f"; {settings.overlap_share:.0%} of them need {several} people's" * (
                several > 1
            )
            say(
                f"{n - lacking} of {n} comparisons have all their answers{share}: "
                f"python train.py annotate --run {here.parent}; then call the loop again"
                + ", with --overlap_annotators 1 if there is nobody else"
                * (several > 1)
            )
            return None
        return write_feedback(records, store.export("comparison"))


def prepare_loop(common: Common, settings: Loop) -> str:
    """Make what the rounds stand on: first policy, judge, and what simulated people answer by.

    Returns:
        The first policy, which is the reference of every round unless another is given.
    """
    folder = folder_of(common)
    if settings.ppo.policy is None and not (folder / "sft").exists():
        sft(common, settings.sft)
    if not (folder / "judge").exists():
        reward(common, settings.judge)
    if not (folder / "judge").exists():
        raise ValueError("expected judge.judge_feedback: a loop with own feedback needs a judge")
    return settings.ppo.policy or str(folder / "sft")


def simulate(common: Common, settings: Simulated, store: "FeedbackStore") -> None:
    """Let simulated people answer until nothing is left to ask, by several what several are to."""
    from reward_models import SimulatedAnnotator, load_reward_model
    from reward_models.feedback.simulated import answer_tasks

    known: Any = load_reward_model(folder_of(common).parent / "reward_model", device_of(common))
    told = asdict(settings)
    people = [
        SimulatedAnnotator(
            known, **told, seed=1000 * common.seed + i, pseudonym=f"simulated-{i + 1}"
        )
        for i in range(told.pop("annotators"))
    ]
    bar = progress(None, "answering")
    for _ in answer_tasks(store, people):
        bar.update()
    bar.close()


def write_loop_report(folder: Path, rounds: int) -> None:
    """Write loop.md and loop.png: what each round asked for, and what came of it."""
    from reward_models.measures import with_interval
    from reward_models.plots import plot_rounds

    facts = []
    for number in range(1, rounds + 1):
        here = folder / f"round-{number}"
        found = {
            name: json.loads((here / "stages" / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("reward", "evaluate")
        }
        measured = found["evaluate"]["measures"]
        report = found["reward"]["reward_model"]["held_out"]["comparisons"]
        facts.append(
            {
                "answers": len(read_lines(here / "feedback.jsonl")),
                "accuracy": report["accuracy"],
                "before": measured[reference_in(found["evaluate"])],
                "after": measured[POLICY],
            }
        )
    names = {"judge": "judge", "ref_kl": "KL to the first, nats", "distinct-2": "distinct-2"}
    lines = [
        "# Round after round",
        "",
        "| round | answers so far | reward model, held-out accuracy | "
        + " | ".join(names.values())
        + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for number, row in enumerate([{"answers": 0, "after": facts[0]["before"]}, *facts]):
        cells = [str(number), str(row["answers"])]
        cells.append(f"{row['accuracy']:.2f}" if "accuracy" in row else "")
        cells += [with_interval(row["after"][name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Brackets are 95 % intervals over the test prompts.", "", "![judge](loop.png)"]
    write_text(folder / "loop.md", "\n".join(lines) + "\n")
    judged = [facts[0]["before"]["judge"], *(row["after"]["judge"] for row in facts)]
    plot_rounds([0, *(row["answers"] for row in facts)], judged, folder / "loop.png")


def as_plain(chosen: "Namespace") -> dict[str, Any]:
    """Return what was asked for as JSON knows it, but for the place."""
    values = chosen.clone().as_dict()
    values.pop("config", None)
    values |= {"run": None, "overwrite": False}
    return json.loads(json.dumps(values, default=str))


FREE_IN_LOOP = (
    *("rounds", "overlap_annotators", "threads", "device"),
    *("ppo.save_every", "ppo.checkpoint_every", "ppo.checkpoint_keep"),
)
"""Settings that may be others when a loop goes on."""


SAMPLED_WITH = (*(f"ppo.{f.name}" for f in fields(Writing)), "ppo.policy", "ppo.prompts")
"""Settings of PPO that a loop asks with, too."""


MADE_WITH = {
    "sft": ("sft",),
    "judge": ("judge",),
    "reward": ("round-*/stages/reward.json",),
    "ppo": ("round-*/stages/ppo.json", "round-*/ppo.unfinished/checkpoints/step-*"),
    "evaluate": ("round-*/stages/evaluate.json",),
}
"""What a loop has when settings of these parts have been used; of the others, any of `ASKED`."""


ASKED = ("sft", "judge", "round-*/asked.json")


def loop_begun(parsed: "Namespace") -> Path | None:
    """Return the settings that a loop began with, if it is to go on with one."""
    run = parsed[parsed.stage].run if parsed.stage == "loop" else None
    return (
        None if run is None or not (run / "config-loop.yaml").exists() else run / "config-loop.yaml"
    )


def refuse_other_settings(began: Path, chosen: "Namespace") -> None:
    """Raise ValueError if a loop is asked to go on with settings that it did not begin with.

    Those of a part that has not been done yet may be mended.
    """
    import yaml

    def is_used(name: str) -> bool:
        marks = MADE_WITH.get(name.split(".")[0], ASKED)
        marks += ASKED[2:] if name in SAMPLED_WITH else ()
        return any(any(began.parent.glob(mark)) for mark in marks)

    was = by_dotted_name(yaml.safe_load(began.read_text(encoding="utf-8")))
    now = by_dotted_name(as_plain(chosen))
    other = [
        f"{name} is {was[name]}, not {now[name]}"
        for name in now
        if name in was and now[name] != was[name] and name not in FREE_IN_LOOP and is_used(name)
    ]
    if other:
        raise ValueError(
            f"expected the settings that this loop began with, where {', '.join(other)}: leave "
            "them out to go on with it, or begin another in a folder of its own (--run)"
        )


def by_dotted_name(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings as one level: {"ppo": {"n_envs": 8}} is {"ppo.n_envs": 8}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        part = isinstance(value, dict)
        flat |= by_dotted_name(value, f"{before}{name}.") if part else {before + name: value}
    return flat
