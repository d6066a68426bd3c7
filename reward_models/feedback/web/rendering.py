"""Pages from templates, and the exceptions that become one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from reward_models.feedback.web.display import language, visible

_HEADINGS = {
    400: "That did not work",
    403: "Not from here",
    404: "Not found",
    409: "Already settled",
    413: "Too long",
    500: "An error of ours",
    503: "Not saved",
}

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {"visible": visible, "language": language}


class Refusal(Exception):
    """A request that is answered with a sentence.

    Args:
        status: the HTTP status, from 400.
        sentence: what is wrong, and what to do.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


def page(
    template: str, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
) -> HTMLResponse:
    """A page of that template; `values` are what it shows."""
    text = _templates.get_template(template).render({"annotator": None, "page": None} | values)
    return HTMLResponse(text, status, dict(headers or {}))


def message(status: int, sentence: str) -> HTMLResponse:
    """A page of one sentence, with a link on to the next task."""
    heading = _HEADINGS.get(status, _HEADINGS[400])
    return page("message.html", status, heading=heading, sentence=sentence)
