"""The report: what a run did, in Markdown, pictures and a sentence."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.settings import Evaluate
from stages.rewards import shown_terms
from stages.run_folder import read_lines
from stages.writing import Episodes

if TYPE_CHECKING:
    import numpy as np


def agreement(report: dict[str, Any]) -> str:
    """Say in one line how well a fitted model agrees with held-out feedback."""
    parts = []
    for kind in ("ratings", "comparisons", "labels"):
        found = (report["held_out"] or {}).get(kind)
        if found is not None and kind == "ratings":
            parts.append(
                f"r = {found['pearson']:.3f}, pairwise accuracy {found['pairwise_accuracy']:.3f} "
                f"on {found['n']} held-out texts"
            )
        elif found is not None:
            n = found["decided"]
            parts.append(f"accuracy {found['accuracy']:.3f} on {n} held-out {kind}")
    members = report.get("members") or [report]
    seconds = sum(member["seconds"] for member in members)
    return "; ".join(parts) + f" ({members[0]['records']} records, {seconds:.0f} s)"


PEOPLE = "one half of the people with the other: r = {split_half:.2f}; a lexicon: r = {lexicon:.2f}"


POLICY = "policy"


def name_of(reference: str) -> str:
    """Return what a report calls the model that a policy is compared with."""
    folder = Path(reference)
    return "warm start" if folder.name == "sft" and folder.is_dir() else "reference"


def reference_in(facts: dict[str, Any]) -> str:
    """Return what an evaluation has called the model that its policy is compared with."""
    return facts.get("reference", "warm start")  # once it was called so whatever it was


def summary(facts: dict[str, Any]) -> str:
    """Say what improved, and by how much."""
    reference = reference_in(facts)
    before, after = facts["measures"][reference], facts["measures"][POLICY]
    key = "judge" if "judge" in after else "score"
    gain, low, high = facts["gain"][key]
    kept = after["distinct-2"][0] / max(before["distinct-2"][0], 1e-9)
    scale = facts.get("judge_scale") if key == "judge" else None
    unit = f" ({scale[0]:g} to {scale[1]:+g})" if scale else ""
    return (
        f"{key}{unit}: {before[key][0]:+.2f} -> {after[key][0]:+.2f}, "
        f"a gain of {gain:+.2f} [{low:+.2f}, {high:+.2f}] "
        f"at {after['ref_kl'][0]:.1f} nats per completion; "
        f"distinct-2 at {kept:.2f} of the {reference}'s"
    )


SHOWN = ("prompt", "completion", "finish_reason", "ref_kl")
"""What evaluation.json has of an episode, beside its scores and a conversation's messages."""


def write_report(
    folder: Path,
    made: Path,
    facts: dict[str, Any],
    groups: dict[str, Episodes],
    scores: dict[str, dict[str, "np.ndarray"]],
    settings: Evaluate,
) -> None:
    """Write evaluation.json, curves.png and report.md."""
    from agents.curves import training_curves
    from agents.findings import as_markdown
    from reward_models.atomic import atomic_file
    from reward_models.conversations import readable
    from reward_models.measures import measures_table, samples_table

    rows = [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]
    if rows:
        with atomic_file(made / "curves.png") as file:
            training_curves(rows).savefig(file, dpi=120, format="png")
    with atomic_file(made / "evaluation.json") as file:
        episodes = {
            name: [
                {k: e[k] for k in (*SHOWN, "messages") if k in e}
                | {k: float(v[i]) for k, v in scores[name].items()}
                for i, e in enumerate(group)
            ]
            for name, group in groups.items()
        }
        text = json.dumps({**facts, "episodes": episodes}, indent=1, ensure_ascii=False)
        file.write_text(text, encoding="utf-8")
    doctor_section = []
    if (folder / "doctor.jsonl").exists():
        findings = [json.loads(line) for line in read_lines(folder / "doctor.jsonl")]
        doctor_section = ["## What the doctor found", as_markdown(findings, rows)]
    reference = reference_in(facts)
    shown = {name: [readable(e) for e in groups[name]] for name in (reference, POLICY)}
    key = "judge" if "judge" in scores[POLICY] else "score"
    parts = [
        "# What the run did",
        summary(facts) + ".",
        f"{len(groups[POLICY])} test prompts, each continued once by every writer; 95 % intervals "
        "in brackets. " + notes(facts, groups),
        measures_table(facts["measures"], reference),
        "![curves](curves.png)" if rows else "",
        *doctor_section,
        people_section(folder),
        "## Samples",
        samples_table(shown, {name: scores[name][key] for name in shown}, key, settings.n_samples),
        "## Stages",
        stages_table(folder),
    ]
    with atomic_file(made / "report.md") as file:
        file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def people_section(folder: Path) -> str:
    """Say how the reward model agrees with each annotator and source, as Markdown.

    "" where there is one of each at most, and no picture of its calibration.
    """
    from reward_models.tables import groups_table

    file = folder / "stages" / "reward.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    held_out = facts.get("reward_model", {}).get("held_out") or {}
    drawn = (folder / "calibration.png").exists()
    parts = [
        groups_table(held_out.get("annotators", {}), "annotator"),
        groups_table(held_out.get("origins", {}), "source"),
        "![calibration](calibration.png)" if drawn else "",
    ]
    return "\n\n".join(["## The reward model and people"] * any(parts) + [p for p in parts if p])


def notes(facts: dict[str, Any], groups: Iterable[str]) -> str:
    """Say how to read the measures that there are."""
    parts = ["All scores are of prompt and completion together."]
    if facts["reward"] is not None:
        parts = [f"The score is made of {shown_terms(facts['reward'])}; terms are before weights."]
    if "judge_scale" in facts:
        scale = facts["judge_scale"]
        unit = f"on the human scale, {scale[0]:g} to {scale[1]:g}" if scale else "in logits"
        parts.append(f"The judge, {unit}, was never a reward.")
    reference = reference_in(facts)
    parts.append(f"A greedy choice's KL is -log of the {reference}'s probability of the text.")
    if any(name.startswith("best of") for name in groups):
        parts.append("The KL of best-of-n is the bound log n - (n - 1)/n.")
    return " ".join(parts)


def stages_table(folder: Path) -> str:
    """Say what each stage took and found, as Markdown."""
    lines = ["| stage | seconds | peak memory so far (GiB) | found |", "|---|---|---|---|"]
    for name in ("sft", "reward", "ppo"):
        file = folder / "stages" / f"{name}.json"
        if file.exists():
            facts = json.loads(file.read_text(encoding="utf-8"))
            cells = [name, f"{facts['seconds']:.0f}", f"{facts['peak_memory_gib']:.1f}"]
            lines.append("| " + " | ".join([*cells, "; ".join(found_by(facts))]) + " |")
    return "\n".join(lines)


def found_by(facts: dict[str, Any]) -> list[str]:
    """Say in a few words what a stage wrote down."""
    found = []
    if "sft" in facts:
        losses = "{loss_before:.2f} to {loss_after:.2f}".format(**facts["sft"])
        found.append(f"held-out loss {losses} nats per token")
    found += [f"{m}: {agreement(facts[m])}" for m in ("reward_model", "judge") if m in facts]
    if "people" in facts:
        found.append(PEOPLE.format(**facts["people"]))
    if "tokens" in facts:
        found.append(f"{facts['tokens']} tokens, {facts['episodes']} episodes")
    if facts.get("nonfinite_skipped"):
        found.append(f"{facts['nonfinite_skipped']} sequences and minibatches left out, not finite")
    return found
