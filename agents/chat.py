"""A conversation at the terminal with whoever writes, token by token.

What is written is a model's text: the caller hands over what makes it harmless to a terminal
(`visible`), and rich's markup is not interpreted. Leaves out who writes, and how.
"""

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.text import Text

Turns = list[dict[str, str]]

QUIT, RESET, BLOCK = "/quit", "/reset", '"""'
HELP = (
    f"{RESET} begins anew, {QUIT} ends; a text of several lines goes between two lines of {BLOCK}"
)

PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""What a part of a character is decoded to, until the rest of it comes."""


def converse(
    write: Callable[[str | Turns], Iterable[str]],
    templated: bool,
    visible: Callable[[str], str],
    console: Console | None = None,
    ask: Callable[[str], str] | None = None,
) -> None:
    """Let a person and a model take turns until the person ends it (/quit, Ctrl-D or Ctrl-C).

    Ctrl-C while the model writes ends its turn. A conversation that has become too long loses its
    oldest turns.

    Args:
        write: Gives the completion as it grows, each time the whole of it; raises ValueError if it
            cannot be written, as the prompt is too long, say.
        templated: Whether `write` is given the turns so far; if not, the person's text alone.
        visible: Writes out what could steer a terminal.
        console: Where to write; the terminal by default.
        ask: Reads a line after a prompt; from the keyboard by default.
    """
    console = console or Console()
    ask = ask or console.input
    console.print(HELP, markup=False, highlight=False)
    turns: Turns = []
    while True:
        try:
            text = _read(ask)
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text.strip() == QUIT:
            return
        if text.strip() == RESET:
            turns = []
        elif text.strip():
            turns.append({"role": "user", "content": text})
            turns = _answer(console, write, turns, templated, visible)


def _read(ask: Callable[[str], str]) -> str:
    """Read one line, or those of a block."""
    line = ask("> ")
    if line.strip() != BLOCK:
        return line
    lines = []
    while (line := ask(". ")).strip() != BLOCK:
        lines.append(line)
    return "\n".join(lines)


def _answer(
    console: Console,
    write: Callable[[str | Turns], Iterable[str]],
    turns: Turns,
    templated: bool,
    visible: Callable[[str], str],
) -> Turns:
    """Show the answer to the last turn as it is written; return the turns to go on from."""
    kept = [*turns]
    while True:
        try:
            if not templated:
                _show(console, visible(kept[-1]["content"]), "dim")
            said = _stream(console, write([*kept] if templated else kept[-1]["content"]), visible)
            return [*kept, {"role": "assistant", "content": said}]
        except ValueError as error:
            if not templated or len(kept) == 1:
                console.print(Text(visible(str(error)), style="red"))
                return turns[:-1]
            del kept[:2]
            console.print(Text("(the oldest turn is left out)", style="dim"))


def _stream(console: Console, texts: Iterable[str], visible: Callable[[str], str]) -> str:
    text = shown = ""
    try:
        for text in texts:
            whole = text.rstrip(PARTIAL)
            if whole.startswith(shown):
                _show(console, visible(whole[len(shown) :]))
                shown = whole
        _show(console, visible(text[len(shown) :]))
    except KeyboardInterrupt:
        pass
    console.print()
    return text


def _show(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), end="", soft_wrap=True)
