"""People: what they are asked, and what becomes of their answers."""

import getpass
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.settings import Annotate, Common, Export, Forget, Import, SignIn, Worth
from stages.data import data
from stages.models import named_model
from stages.process import device_of, progress, say, set_up
from stages.run_folder import folder_of, left_by, write_text
from stages.writing import as_in_ppo, prompts_of, samples_of, some_prompts

if TYPE_CHECKING:
    from reward_models.feedback import Task
    from reward_models.feedback.tasks import Kind


def annotate(common: Common, settings: Annotate) -> None:
    """Ask people about completions, on a page or here; answers go to the run's feedback.sqlite."""
    from reward_models.feedback import Accounts, FeedbackStore
    from reward_models.feedback.terminal import annotate as ask_here

    if not settings.terminal:
        from reward_models.feedback.web import serve, set_up_account  # missing? now, not later
    kind = settings.kind or "comparison"
    if settings.against is not None and kind != "comparison":
        raise ValueError(f"expected kind comparison with against, got {kind}")
    file = store_file(common, settings.store)
    tasks = None if file.exists() else tasks_to_ask(common, settings, kind)
    if tasks == []:  # nor is a store made where there is no run
        raise ValueError("expected tasks, or samples that differ, to ask about, got none")
    with (
        FeedbackStore(file, common.seed, settings.gold_rate) as store,
        Accounts(file) as accounts,
    ):
        given = (settings.tasks, settings.policy, settings.against, settings.prompts)
        is_asked = any(value is not None for value in given)
        if tasks is None and (is_asked or store.count_tasks(settings.kind) == 0):
            tasks = tasks_to_ask(common, settings, kind)
        if tasks is not None:
            overlap = (settings.overlap_share, settings.overlap_annotators)
            say(f"{store.add(tasks, *overlap)} new tasks")
        if settings.ensemble is not None:
            waiting = with_uncertainty(common, store.unanswered(), settings.ensemble)
            store.add(waiting)  # they are there: it is told how uncertain each is
            say(f"{len(waiting)} tasks without all their answers put in order, the disputed first")
        if settings.terminal:
            here = settings.annotator or getpass.getuser()
            account = accounts.find(here) or accounts.create(here)
            ask_here(store, account.pseudonym)
            return
        if not accounts.anybody_can_sign_in():
            set_up_account(accounts, ask("Nobody can sign in yet. A name to do it with: "))
        scheme = "http" if settings.certificate is None else "https"
        say(f"Annotate at {scheme}://{settings.host}:{settings.port}/ (Ctrl-C ends it)")
        serve(
            store,
            accounts,
            settings.host,
            settings.port,
            settings.names,
            settings.lead,
            certificate=None if settings.certificate is None else str(settings.certificate),
            key=None if settings.key is None else str(settings.key),
        )


def ask(question: str) -> str:
    """Ask for a line at the terminal."""
    try:
        return input(question)
    except EOFError:
        raise ValueError("expected an answer at the terminal, which is not to be had") from None


def tasks_to_ask(common: Common, settings: Annotate, kind: "Kind") -> "list[Task]":
    """Read tasks from a file, or sample them from one policy or two."""
    from reward_models.feedback import (
        tasks_from_completions,
        tasks_from_jsonl,
        tasks_side_by_side,
        with_chats,
    )
    from text_env.prompts import load_prompts

    if settings.tasks is not None:
        tasks = tasks_from_jsonl(settings.tasks, kind)
    else:
        set_up(common)
        folder, policy = folder_of(common), settings.policy
        if policy is None:
            trained = folder / "policy"
            policy = str(trained if trained.exists() else left_by("sft", folder / "sft"))
        run = Path(policy).parent
        settings = as_in_ppo(run, settings)
        source = settings.prompts or prompts_of(run, "ppo") or data(common) / "prompts.jsonl"
        prompts = some_prompts(load_prompts(source), settings.n_prompts, common.seed)
        mine = samples_of(common, settings, policy, prompts, settings.samples)
        if settings.against is None:
            tasks = with_chats(tasks_from_completions(mine.texts, kind, policy), mine.chats)
        else:
            theirs = samples_of(common, settings, settings.against, prompts, settings.samples)
            tasks = tasks_side_by_side(mine.texts, theirs.texts, (policy, settings.against))
            tasks = with_chats(tasks, theirs.chats | mine.chats)
    return tasks


def with_uncertainty(common: Common, tasks: "list[Task]", ensemble: Path) -> "list[Task]":
    """Say of each task how far the members of an ensemble differ on it."""
    from reward_models import RewardEnsemble

    model = RewardEnsemble.load(ensemble, device_of(common))
    said: list[Task] = []
    measures: tuple[tuple[int, Any], ...] = ((1, model.spread), (2, model.pair_uncertainty))
    for n_texts, measure in measures:
        some = [task for task in tasks if len(task.completions) == n_texts]
        if some:
            sides = map(list, zip(*(task.completions for task in some), strict=True))
            found: Any = measure([task.prompt for task in some], *sides)
            said += [replace(t, uncertainty=float(u)) for t, u in zip(some, found, strict=True)]
    return said


def store_file(common: Common, given: Path | None, there: bool = False) -> Path:
    """Return the file of tasks and answers; if it is to be `there`, say how it is made."""
    file = given or folder_of(common) / "feedback.sqlite"
    if there and not file.exists():
        raise FileNotFoundError(
            f"expected {file}, which `python train.py annotate` or `feedback import` makes"
        )
    return file


def make_account(common: Common, settings: SignIn) -> None:
    """Let somebody sign in on the page; asks for the password."""
    from reward_models.feedback import Accounts
    from reward_models.feedback.web import set_up_account

    with Accounts(store_file(common, settings.store)) as accounts:
        account = set_up_account(accounts, settings.name)
    say(f"{account.name} can sign in; answers will know them as {account.pseudonym}")


def import_answers(common: Common, settings: Import) -> None:
    """Take up answers from a file: records (.jsonl) or ratings (.csv)."""
    from reward_models.feedback import FeedbackStore, read_feedback, read_ratings_csv

    if settings.file.suffix == ".csv":
        records = read_ratings_csv(settings.file, settings.scale)
    else:
        records = read_feedback(settings.file)
    with FeedbackStore(store_file(common, settings.store)) as store:
        say(f"{store.import_records(records)} new answers of {len(records)}")


def export_answers(common: Common, settings: Export) -> None:
    """Write the answers to a file: records (.jsonl), or ratings (.csv)."""
    from reward_models.feedback import FeedbackStore, write_feedback, write_ratings_csv

    kind = settings.kind
    if settings.file.suffix == ".csv":
        if kind not in (None, "rating"):
            raise ValueError(
                f"expected a .jsonl file for {kind}s, got {settings.file}: a .csv "
                "holds ratings only"
            )
        kind = "rating"
    if settings.file.exists() and not common.overwrite:
        raise FileExistsError(f"{settings.file} exists already: pass --overwrite true")
    with FeedbackStore(store_file(common, settings.store, there=True)) as store:
        records = store.export(kind, settings.ties)
    write = write_ratings_csv if settings.file.suffix == ".csv" else write_feedback
    say(f"{len(records)} answers: {write(settings.file, records)}")


def forget(common: Common, settings: Forget) -> None:
    """Erase one person's answers, name and password, and what the run's files say of them."""
    from reward_models.feedback import Accounts, FeedbackStore

    file, folder = store_file(common, settings.store, there=True), folder_of(common)
    with FeedbackStore(file) as store, Accounts(file) as accounts:
        by_pseudonym = {account.pseudonym: account for account in accounts.all()}
        account = accounts.find(settings.name) or by_pseudonym.get(settings.name)
        names = {settings.name}  # what was imported may have answers under the name
        if account is not None:
            names |= {account.name, account.pseudonym}
        # The store knows whose pseudonym it is: it comes last, so that this can be done again.
        written = [line for name in sorted(names) for line in forget_in_files(folder, name)]
        gone = "" if account is None else f", and the account {account.name}"
        n_answers = store.forget(settings.name)
    say(f"{n_answers} answers erased{gone}")
    for line in written:
        say(line)
    if n_answers:
        say(
            "Not touched: files that were exported, and models that have learned from the answers "
            "(`python train.py reward` fits one without them)"
        )


def forget_in_files(folder: Path, pseudonym: str) -> list[str]:
    """Erase a person in what a run, or a loop's rounds, have written; return what was where."""
    from reward_models.feedback import read_feedback, write_feedback
    from reward_models.tables import cell

    said = []
    for file in sorted(folder.glob("round-*/feedback.jsonl")):
        records = read_feedback(file)
        kept = [record for record in records if record.annotator != pseudonym]
        if len(kept) < len(records):
            said.append(
                f"{len(records) - len(kept)} of them were in {write_feedback(file, kept)} too"
            )
    for run in (folder, *sorted(folder.glob("round-*"))):
        facts, report = run / "stages" / "reward.json", run / "report.md"
        if facts.exists() and drop_annotator(
            found := json.loads(facts.read_text(encoding="utf-8")), pseudonym
        ):
            write_text(facts, json.dumps(found, indent=1, ensure_ascii=False))
            said.append(f"figures of {pseudonym} erased in {facts}")
        lines = report.read_text(encoding="utf-8").split("\n") if report.exists() else []
        left = without_row(lines, "| annotator |", f"| {cell(pseudonym)} |")
        if left != lines:
            write_text(report, "\n".join(left))
            said.append(f"figures of {pseudonym} erased in {report}")
    return said


def drop_annotator(facts: Any, pseudonym: str) -> bool:
    """Take a person out of what is said by annotator, at any depth; return whether it was there."""
    if isinstance(facts, list):
        return any([drop_annotator(part, pseudonym) for part in facts])
    if not isinstance(facts, dict):
        return False
    by_annotator = facts.get("annotators")
    there = isinstance(by_annotator, dict) and by_annotator.pop(pseudonym, None) is not None
    return any([there, *(drop_annotator(part, pseudonym) for part in facts.values())])


def without_row(lines: list[str], head: str, row: str) -> list[str]:
    """Return lines without the rows that begin so in tables whose first line begins with `head`."""
    kept, within = [], False
    for line in lines:
        within = line.startswith("|") and (within or line.startswith(head))
        if not (within and line.startswith(row)):
            kept.append(line)
    return kept


def worth(common: Common, settings: Worth) -> None:
    """Say how many more answers are worth it; leaves learning-curve.png and learning-curve.json.

    Reward models are fitted on an eighth, a quarter, half and all of the answers, measured on the
    same held-out ones, and the curve is continued.
    """
    from collections import Counter

    from reward_models import LearnedRewardModel
    from reward_models.feedback import FeedbackStore
    from reward_models.fitting import split
    from reward_models.learning_curve import in_words, learning_curve
    from reward_models.plots import plot_learning_curve

    set_up(common)
    with FeedbackStore(store_file(common, settings.store, there=True)) as store:
        kinds = Counter(answer.task.kind for answer in store.answers())
        kind = settings.kind or (kinds.most_common(1)[0][0] if kinds else None)
        records = store.export(kind)
    learned, held_out = split(records, settings.held_out, common.seed)
    if len(learned) < LEAST_ANSWERS:
        raise ValueError(
            f"expected {LEAST_ANSWERS} {kind or 'answer'}s or more to learn from, for a curve, got "
            f"{len(learned)} and {len(held_out)} held out"
        )
    measure: Any = f"{kind}s"
    base, bar = named_model(settings.model), progress(4, "fitting")
    curve = learning_curve(
        lambda seed: LearnedRewardModel.from_pretrained(base, device_of(common), seed=seed),
        learned,
        held_out,
        [len(learned) // part for part in (8, 4, 2, 1)],
        measure,
        settings.repeats,
        common.seed,
        on_point=lambda _: bar.update(),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
    )
    bar.close()
    said = in_words(curve, len(records), settings.least_gain)
    folder = folder_of(common)
    plot_learning_curve(curve, folder / "learning-curve.png")
    facts = {"answers": len(records), "least_gain": settings.least_gain, "said": said}
    write_text(folder / "learning-curve.json", json.dumps(facts | asdict(curve), indent=1))
    say(said)


LEAST_ANSWERS = 32
"""So many to learn from, for a curve: its first point has an eighth of them."""
