"""Annotating at a terminal prompt, also over ssh: the same tasks and the same store as the page.

What is shown is a model's text. Nothing in it reaches the terminal as a command: control
characters are written out, and rich's markup is not interpreted.
"""

import re
import time
import unicodedata
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from reward_models.feedback.chats import Message
from reward_models.feedback.database import AnswerError
from reward_models.feedback.store import FeedbackStore
from reward_models.feedback.tasks import Assignment, Task
from reward_models.feedback.unseen import is_unseen

_ALWAYS = "s skip, u undo, q quit"


def annotate(
    store: FeedbackStore,
    annotator: str,
    console: Console | None = None,
    ask: Callable[[str], str] | None = None,
) -> int:
    """Ask one person until they quit (q, Ctrl-D or Ctrl-C) or nothing is left.

    Each answer is saved before the next question is shown.

    Args:
        store: where the tasks come from and the answers go.
        annotator: the person's pseudonym.
        console: where to write; the terminal by default.
        ask: reads a line after a prompt; from the keyboard by default.

    Returns:
        How many answers this person has given, those of earlier times included.
    """
    console = console or Console()
    ask = ask or console.input
    while (assignment := store.next_task(annotator)) is not None:
        _show(console, store, assignment)
        try:
            if not _ask_one(console, store, assignment, ask):
                break
        except (EOFError, KeyboardInterrupt):
            console.print()
            break
    else:
        console.print("Nothing is left to answer. Thank you.")
    answered = store.progress(annotator).answered
    console.print(f"{answered} answered; everything is saved.")
    return answered


def visible(text: str) -> str:
    r"""The text with everything in it that could steer a terminal or hide written as `\x1b`."""
    return "".join(
        character.encode("unicode_escape").decode("ascii") if is_unseen(character) else character
        for character in text
    )


def _show(console: Console, store: FeedbackStore, assignment: Assignment) -> None:
    """Progress, the prompt, and the completions in the order recorded."""
    progress, task = store.progress(assignment.annotator), assignment.task
    console.rule(f"{progress.answered} answered, {progress.left} left")
    chat = assignment.shown_chat
    prompt = Text(visible(task.prompt)) if chat is None else _turns(chat.prompt)
    if prompt:
        console.print(Panel(prompt, title="prompt", title_align="left"))
    for i, completion in enumerate(assignment.shown):
        title = str(i + 1) if task.kind == "comparison" else "completion"
        said = Text(visible(completion))
        if chat is not None and len(chat.completions[i]) > 1:
            said = _turns(chat.completions[i])
        console.print(Panel(said, title=title, title_align="left"))


def _turns(messages: Sequence[Message]) -> Text:
    """Who said what, a paragraph each."""
    said = [
        Text.assemble((f"{visible(message.role)}: ", "bold"), visible(message.content))
        for message in messages
    ]
    return Text("\n").join(said)


def _ask_one(
    console: Console,
    store: FeedbackStore,
    assignment: Assignment,
    ask: Callable[[str], str],
) -> bool:
    """Ask until something was done about the task; false if the person quits."""
    question = _question(assignment.task)
    started = time.monotonic()
    while True:
        key = unicodedata.normalize("NFKC", ask(f"{question}, {_ALWAYS}: ")).strip().lower()
        answer = _answer(assignment.task, key)
        try:
            if key == "q":
                return False
            if key == "s":
                store.skip(assignment.id, assignment.annotator)
                return True
            if key == "u":
                if store.undo(assignment.annotator) is not None:
                    return True
                console.print("There is nothing to undo.")
            elif answer is not None:
                seconds = time.monotonic() - started
                store.answer(assignment.id, assignment.annotator, answer, seconds)
                return True
            else:
                console.print(f"Expected {question}, {_ALWAYS}.", markup=False, highlight=False)
        except AnswerError as error:  # answered meanwhile on the page, or in another terminal
            console.print(f"Not saved: {error}.", markup=False, highlight=False)
            return True


def _question(task: Task) -> str:
    if task.kind == "comparison":
        return "1 or 2 is better, t tie"
    if task.kind == "label":
        return "g good, b bad"
    return f"a rating from {task.scale[0]} to {task.scale[1]}"


def _answer(task: Task, key: str) -> str | int | bool | None:
    """What a key says about a task; None if nothing."""
    if task.kind == "comparison":
        return {"1": "left", "2": "right", "t": "tie"}.get(key)
    if task.kind == "label":
        return {"g": True, "b": False}.get(key)
    low, high = task.scale
    if not re.fullmatch(r"-?\d{1,9}", key) or not low <= int(key) <= high:
        return None
    return int(key)
