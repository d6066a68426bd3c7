"""The pages of whoever has signed in: a task, its answer, and the dashboard."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import RedirectResponse, Response

from reward_models.feedback.database import AnswerError, UnknownTask
from reward_models.feedback.store import FeedbackStore
from reward_models.feedback.web.figures import dashboard
from reward_models.feedback.web.rendering import Refusal, page
from reward_models.feedback.web.sessions import Visit, poster, visitor

router = APIRouter()

AssignmentId = Annotated[int, Form(ge=1, le=2**63 - 1)]  # SQLite's integers

_QUESTIONS = {
    "comparison": "Which {} is better?",
    "rating": "How good is this {}?",
    "label": "Is this {} good or bad?",
}
_ANSWERS: dict[str, object] = {
    "left": "left",
    "tie": "tie",
    "right": "right",
    "good": True,
    "bad": False,
}


@router.get("/")
def show_task(request: Request, visit: Annotated[Visit, Depends(visitor)]) -> Response:
    """The open task, or the next one, or that there is none."""
    store = _store(request)
    assignment = store.next_task(visit.account.pseudonym)
    progress = store.progress(visit.account.pseudonym)
    context: dict[str, Any] = {
        "annotator": visit.account.name,
        "token": visit.form_token,
        "page": "task",
        "done": progress.answered,
        "total": progress.answered + progress.left,
        "steps": progress.answered + progress.skipped,
        "undone": "undone" in request.query_params,
    }
    if assignment is None:
        return page("done.html", **context)
    task, chat = assignment.task, assignment.shown_chat
    judged = "completion"
    if chat is not None:
        judged = "conversation" if chat.is_of_turns else "answer"
    return page(
        "task.html",
        **context,
        kind=task.kind,
        question=_QUESTIONS[task.kind].format(judged),
        judged=judged,
        prompt=task.prompt,
        completions=assignment.shown,
        chat=chat,
        scale=range(int(task.scale[0]), int(task.scale[1]) + 1),
        task_id=assignment.id,
    )


@router.post("/answer")
def answer(
    request: Request,
    visit: Annotated[Visit, Depends(poster)],
    task: AssignmentId,
    answer: Annotated[str, Form(max_length=20)],
) -> Response:
    """Save an answer to the task that is open."""
    try:
        given = _ANSWERS[answer] if answer in _ANSWERS else int(answer)
        _store(request).answer(task, visit.account.pseudonym, given)
    except AnswerError as error:
        raise _refusal(error) from error
    except ValueError as error:
        raise Refusal(400, "That is no answer to this task, so nothing was saved.") from error
    return RedirectResponse("/", status_code=303)


@router.post("/skip")
def skip(
    request: Request, visit: Annotated[Visit, Depends(poster)], task: AssignmentId
) -> Response:
    """Pass over the task that is open."""
    try:
        _store(request).skip(task, visit.account.pseudonym)
    except AnswerError as error:
        raise _refusal(error) from error
    return RedirectResponse("/", status_code=303)


@router.post("/undo")
def undo(
    request: Request,
    visit: Annotated[Visit, Depends(poster)],
    steps: Annotated[int, Form()],
) -> Response:
    """Take the last answer back, if it still is the last one that the form's sender saw."""
    try:
        undone = _store(request).undo(visit.account.pseudonym, steps)
    except AnswerError as error:
        sentence = "You have answered since, or taken it back already; nothing was undone."
        raise Refusal(409, sentence) from error
    if undone is None:
        raise Refusal(409, "There is no answer to take back.")
    return RedirectResponse("/?undone", status_code=303)


@router.get("/dashboard")
def show_dashboard(request: Request, visit: Annotated[Visit, Depends(visitor)]) -> Response:
    """What the answers say, and how far they agree."""
    leads = visit.account.name == request.app.state.lead
    figures = dashboard(_store(request).answers(), visit.account.pseudonym, leads)
    return page(
        "dashboard.html",
        annotator=visit.account.name,
        token=visit.form_token,
        page="dashboard",
        **figures._asdict(),
    )


def _store(request: Request) -> FeedbackStore:
    store: FeedbackStore = request.app.state.store
    return store


def _refusal(error: AnswerError) -> Refusal:
    if isinstance(error, UnknownTask):
        return Refusal(404, "There is no such task.")
    return Refusal(
        409,
        "This task is no longer open for you: it was answered, skipped or taken back, perhaps in "
        "another window. Nothing was saved.",
    )
