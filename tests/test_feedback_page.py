"""The annotation page in a real browser: headless Chromium against a server on a free port.

`python tests/test_feedback_page.py` draws the pictures of it in `docs/` anew.
"""

import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")
import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from reward_models.feedback import Chat, Message, accounts
from reward_models.feedback.accounts import Accounts
from reward_models.feedback.records import Rating
from reward_models.feedback.store import FeedbackStore
from reward_models.feedback.tasks import Task
from reward_models.feedback.web import make_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.xdist_group("chromium"),
]

PASSWORD = "a long password"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 375, "height": 700}
DESK = {"width": 1100, "height": 640}

COMPARISON = Task(
    "comparison",
    "The film opens on a quiet harbour at dawn, and for two hours",
    (
        " it hardly leaves it: every scene is patient, well lit and quietly funny, and the two "
        "leads make silence look easy.",
        " the camera never settles, and neither does the plot, which wanders from one "
        "half-finished idea to the next until the credits come as a relief.",
    ),
    ("runs/tuned/policy", "runs/plain/policy"),
)
RATING = Task(
    "rating",
    "这部电影讲的是",
    ("一个普通家庭在北京的生活，节奏很慢，但每个镜头都很用心，看完以后让人久久不能平静。",),
)
LABEL = Task(
    "label",
    "The second act",
    (" drags <script>document.title = 'taken'</script>, \x1b[31mred\x1b[0m, \u202edrawkcab\u202c, "
     + "long" * 60,),
)  # fmt: skip

ASKED = (
    Message("system", "回答要简短。"),
    Message("user", "你好！<b onclick=alert(1)>今天</b>做什么？"),
)
CHAT = Task(
    "comparison",
    "<|im_start|>user\n你好！<|im_end|>\n<|im_start|>assistant\n",
    ("去公园散步怎么样？", "Read a book.\n<img src=x onerror=\"document.title='taken'\">"),
    chat=Chat(
        ASKED,
        (
            (Message("assistant", "去公园散步怎么样？"),),
            (
                Message("assistant", "Read a book."),
                Message("user", "哪一本？"),
                Message("assistant", "<img src=x onerror=\"document.title='taken'\">"),
            ),
        ),
    ),
)
"""One of the completions is an answer, the other two with the user's turn between."""


class Desk:
    """A store and a server of its page."""

    def __init__(self, path: Path) -> None:
        self.store, self.accounts = FeedbackStore(path), Accounts(path)
        for name in ("ann", "ben", "cid"):
            self.accounts.create(name, PASSWORD)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        app = make_app(self.store, self.accounts)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.accounts.close()
        self.store.close()

    def add(self, *tasks: Task) -> None:
        self.store.add(tasks, overlap_share=1.0, overlap_annotators=3)

    @property
    def answers(self) -> dict[str, object]:
        return {answer.task.kind: answer.answer for answer in self.store.answers()}


class Visitor:
    """A browser window whose console and requests are kept."""

    def __init__(self, browser: Any, desk: Desk, **options: Any) -> None:
        self.desk = desk
        self.context = browser.new_context(**{"viewport": DESK} | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.hosts: set[str | None] = set()
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))

    def sign_in(self, name: str = "ann") -> Any:
        self.page.goto(self.desk.url)
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Password").fill(PASSWORD)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url(self.desk.url)
        return self.page

    def click(self, name: str) -> None:
        with self.page.expect_navigation():
            self.page.get_by_role("button", name=name).click()

    def press(self, key: str) -> None:
        with self.page.expect_navigation():
            self.page.keyboard.press(key)

    def kind(self) -> str:
        """Kind of the task that is shown; empty if there is none."""
        choices = self.page.locator(".choices")
        return choices.get_attribute("class").split()[-1] if choices.count() else ""

    def check(self) -> None:
        assert self.complaints == []
        assert self.hosts == {"127.0.0.1"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(accounts, "_PARAMETERS", (16, 8, 1))  # quick to hash
    desk = Desk(tmp_path / "feedback.db")
    yield desk
    desk.close()


@pytest.mark.parametrize("how", ["click", "press"])
def test_each_kind_by_mouse_and_by_keys(browser: Any, desk: Desk, how: str) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    names = {"comparison": "A is better", "rating": "4", "label": "Good"}
    keys = {"comparison": "ArrowLeft", "rating": "4", "label": "g"}
    visitor = Visitor(browser, desk)
    page = visitor.sign_in()
    left = ""
    while kind := visitor.kind():
        if kind == "comparison":
            left = page.locator(".pair .text").first.inner_text()
        if how == "click":
            visitor.click(names[kind])
        else:
            visitor.press(keys[kind])
    assert page.get_by_text("Nothing left for you").is_visible()
    given = desk.answers
    choice = given.pop("comparison")
    assert given == {"rating": 4, "label": True}
    assert left == COMPARISON.completions[0 if choice == "first" else 1].strip()
    visitor.check()


@pytest.mark.parametrize(
    ("task", "key", "saved"),
    [
        (COMPARISON, "t", "tie"),
        (RATING, "1", 1),
        (RATING, "5", 5),
        (LABEL, "b", False),
        (LABEL, "B", False),
    ],
)
def test_the_other_keys(browser: Any, desk: Desk, task: Task, key: str, saved: object) -> None:
    desk.add(task)
    visitor = Visitor(browser, desk)
    visitor.sign_in()
    visitor.page.keyboard.press("Control+" + key)  # the browser's, not ours
    visitor.press(key)
    assert list(desk.answers.values()) == [saved]
    visitor.check()


def test_skip_and_undo_by_keys_and_mouse(browser: Any, desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    visitor = Visitor(browser, desk)
    page = visitor.sign_in()
    first = visitor.kind()
    assert page.get_by_role("button", name="Undo").is_disabled()
    visitor.press("s")
    assert visitor.kind() != first
    visitor.press("u")
    assert visitor.kind() == first and page.get_by_role("status").is_visible()
    visitor.click("Skip")
    visitor.click("Undo last answer")
    assert visitor.kind() == first
    visitor.check()


def test_a_reload_in_the_middle_keeps_the_task_and_the_side(browser: Any, desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    visitor = Visitor(browser, desk)
    page = visitor.sign_in()
    before = page.locator("main").inner_text()
    page.reload()
    assert page.locator("main").inner_text() == before
    visitor.check()


def test_two_annotators_at_once(browser: Any, desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    visitors = [Visitor(browser, desk) for _ in range(2)]
    for visitor, name in zip(visitors, ("ann", "ben"), strict=True):
        visitor.sign_in(name)
    keys = {"comparison": "t", "rating": "2", "label": "b"}
    for _ in range(3):
        for visitor in visitors:
            visitor.press(keys[visitor.kind()])
    by_annotator = [answer.annotator for answer in desk.store.answers()]
    assert sorted(map(by_annotator.count, set(by_annotator))) == [3, 3]
    for visitor in visitors:
        visitor.check()


def test_a_form_left_open_in_another_window_is_stale(browser: Any, desk: Desk) -> None:
    desk.add(RATING)
    visitor = Visitor(browser, desk)
    page = visitor.sign_in()
    other = visitor.context.new_page()
    other.goto(desk.url)
    visitor.press("5")
    with other.expect_navigation():
        other.keyboard.press("1")
    assert "no longer open for you" in other.locator("main").inner_text()
    other.get_by_role("link", name="Go on annotating").click()
    assert other.get_by_text("Nothing left for you").is_visible()
    assert desk.answers == {"rating": 5}
    assert page.url == desk.url
    visitor.check()


def test_two_presses_give_one_answer(browser: Any, desk: Desk) -> None:
    desk.add(RATING, LABEL)
    visitor = Visitor(browser, desk)
    page = visitor.sign_in()
    with page.expect_navigation():
        page.evaluate(
            """() => ["1", "2", "b", "g", "s"].forEach((key) => document.body.dispatchEvent(
                 new KeyboardEvent("keydown", {key, bubbles: true})))"""
        )
    page.wait_for_load_state()
    assert page.get_by_text("1 of 2 answered").is_visible()
    visitor.check()


def test_strange_texts_are_only_shown(browser: Any, desk: Desk) -> None:
    desk.add(LABEL)
    visitor = Visitor(browser, desk)
    page = visitor.sign_in()
    text = page.locator(".sheet .text").inner_text()
    assert "<script>document.title = 'taken'</script>" in text
    assert "⟨ESC⟩[31mred⟨ESC⟩[0m" in text and "⟨U+202E⟩drawkcab⟨U+202C⟩" in text
    assert page.title() == "Is this completion good or bad? · Feedback"
    visitor.check()


def test_chinese_is_shown_with_chinese_glyphs(browser: Any, desk: Desk) -> None:
    desk.add(RATING)
    visitor = Visitor(browser, desk)
    text = visitor.sign_in().locator(".sheet .text")
    assert text.inner_text() == RATING.completions[0]
    assert text.get_attribute("lang") == "zh"
    visitor.check()


def test_a_chat_is_shown_as_turns(browser: Any, desk: Desk) -> None:
    desk.add(CHAT)
    visitor = Visitor(browser, desk)
    page = visitor.sign_in()
    assert page.title() == "Which conversation is better? · Feedback"
    assert "im_start" not in page.content()
    before = page.locator(".prompt .turn")
    assert before.locator(".role").all_text_contents() == ["system", "user"]
    assert before.locator(".text").all_text_contents() == [m.content for m in ASKED]
    assert before.locator(".text").first.get_attribute("lang") == "zh"
    assert page.locator("b[onclick]").count() == page.locator("img").count() == 0
    sheets = [sheet.locator(".text").all_text_contents() for sheet in page.locator(".sheet").all()]
    shown = [[m.content for m in messages] for messages in CHAT.chat.completions]
    assert sorted(map(len, sheets)) == [1, 3] and sorted(sheets) == sorted(shown)
    said = page.locator(".sheet .turn").filter(has=page.get_by_text("哪一本？"))
    assert said.locator(".role").text_content() == "user"
    visitor.press("ArrowLeft")
    (answer,) = desk.store.answers()
    assert answer.task.completions[answer.answer == "second"] == "\n".join(sheets[0][::2])
    assert desk.store.export()[0].chat.completions[0] == tuple(
        CHAT.chat.completions[shown.index(sheets[0])]
    )
    visitor.check()


def test_chats_that_people_differ_on_are_shown_as_turns(browser: Any, desk: Desk) -> None:
    desk.add(CHAT)
    visitors = [Visitor(browser, desk), Visitor(browser, desk)]
    for visitor, name in zip(visitors, ("ann", "ben"), strict=True):
        page = visitor.sign_in(name)
        is_left = page.locator(".sheet").first.locator(".turn").count() == 3
        visitor.press("ArrowLeft" if is_left == (name == "ann") else "ArrowRight")
    page.goto(desk.url + "dashboard")
    assert page.locator(".dispute .turn").count() == 2 + 3
    assert "im_start" not in page.content() and page.locator("img").count() == 0
    visitor.check()


def test_a_phone_scrolls_in_one_direction_only(browser: Any, desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL, CHAT)
    visitor = Visitor(browser, desk, viewport=PHONE, color_scheme="dark", has_touch=True)
    page = visitor.sign_in()
    keys = {"comparison": "t", "rating": "2", "label": "b"}
    for path in ("", "", "", "", "", "dashboard", "sign-in", "nowhere"):
        page.goto(desk.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box["height"] >= 44 and box["x"] + box["width"] <= PHONE["width"]
        if kind := visitor.kind():
            visitor.press(keys[kind])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"


def test_everything_works_without_javascript(browser: Any, desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    visitor = Visitor(browser, desk, java_script_enabled=False)
    page = visitor.sign_in()
    names = {"comparison": "Tie", "rating": "3", "label": "Bad"}
    visitor.click("Skip")
    visitor.click("Undo last answer")
    while kind := visitor.kind():
        assert not page.locator("kbd").first.is_visible()
        visitor.click(names[kind])
    assert desk.answers == {"comparison": "tie", "rating": 3, "label": False}
    visitor.click("Sign out")
    assert page.get_by_role("heading", name="Sign in").is_visible()
    visitor.check()


def test_a_wrong_password_is_said_and_the_name_kept(browser: Any, desk: Desk) -> None:
    visitor = Visitor(browser, desk)
    page = visitor.page
    page.goto(desk.url)
    page.get_by_label("Name").fill("ann")
    page.get_by_label("Password").fill("not the password")
    visitor.click("Sign in")
    assert "do not belong together" in page.get_by_role("alert").inner_text()
    assert page.get_by_label("Name").input_value() == "ann"


def better(film: int) -> str:
    """Which completion most people prefer."""
    return "first" if film % 3 else "second"


def fill(desk: Desk) -> None:
    """Answer some hundred tasks as three people would who mostly see the same."""
    random = Random(0)
    today = datetime.now(UTC)
    desk.add(
        *(
            replace(COMPARISON, prompt=f"Film {i}", gold=better(i) if i < 20 else None)
            for i in range(60)
        ),
        *(replace(RATING, prompt=f"{i}") for i in range(30)),
    )
    for n, account in enumerate(desk.accounts.all()):
        for _ in range(50 + 20 * n):
            assignment = desk.store.next_task(account.pseudonym)
            if assignment is None:
                break
            answer: object = 3 + int(assignment.task.prompt[-1]) % 3
            if assignment.task.kind == "comparison":
                wanted = COMPARISON.completions[
                    better(int(assignment.task.prompt.split()[-1])) == "second"
                ]
                agrees = random.random() < 0.9
                answer = "left" if agrees == (assignment.shown[0] == wanted) else "right"
            elif random.random() < 0.2:
                answer = 3
            seconds = random.uniform(4, 15)
            desk.store.answer(assignment.id, account.pseudonym, answer, seconds)
        desk.store.import_records(
            Rating(
                "Film",
                f" {i}",
                2 + i % 3,
                (1, 5),
                account.pseudonym,
                (today - timedelta(days=1 + i % 4)).isoformat(timespec="seconds"),
            )
            for i in range(random.randint(40, 70))
        )


def draw(folder: Path) -> None:
    """Save a picture of each page in `folder`."""
    shown = (
        COMPARISON,
        RATING,
        replace(
            LABEL, completions=(" drags, <b>but</b> the \x1b[31mlast\x1b[0m one repays it all.",)
        ),
    )
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        desk = Desk(Path(temporary) / "feedback.db")
        fill(desk)
        visitor = Visitor(browser, desk)
        visitor.page.goto(desk.url)
        save(visitor.page, folder / "annotate-sign-in.png")
        page = visitor.sign_in()
        for task in shown:
            desk.add(replace(task, uncertainty=1.0))
            visitor.press("s")
            save(page, folder / f"annotate-{task.kind}.png")
        page.set_viewport_size({"width": 1100, "height": 1000})
        page.goto(desk.url + "dashboard")
        save(page, folder / "annotate-dashboard.png")
        browser.close()
        desk.close()


def save(page: Any, path: Path) -> None:
    """Save what is shown, in few colours."""
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs")
