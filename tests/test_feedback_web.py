"""The annotation page over HTTP: what it shows, saves and refuses."""

import html
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from httpx import Response

from reward_models.feedback import accounts
from reward_models.feedback.accounts import Accounts
from reward_models.feedback.database import StoreError
from reward_models.feedback.store import FeedbackStore
from reward_models.feedback.tasks import Task
from reward_models.feedback.web import make_app, serve, set_up_account

PASSWORD = "a long password"
BASE = "http://localhost:8000"
SESSION_COOKIE, VISIT_COOKIE = "feedback_session_8000", "feedback_visit_8000"
COMPARISON = Task("comparison", "The film", (" shines.", " drags."), ("runs/tuned", "runs/plain"))
RATING = Task("rating", "这部电影", ("很好看。",), ("runs/tuned",))
LABEL = Task("label", "It", (" <script>alert(1)</script>\x1b[31m\u202e\x00",), ("runs/plain",))


class Desk:
    """A store with accounts, and browsers that look at its page."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "feedback.db"
        self.clients: list[TestClient] = []
        self.open()
        for name in ("Ann", "Ben"):
            self.accounts.create(name, PASSWORD)

    def open(self) -> None:
        self.store, self.accounts = FeedbackStore(self.path, gold_rate=1), Accounts(self.path)
        self.app = make_app(self.store, self.accounts, lead="Ann")

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.accounts.close()
        self.store.close()

    def add(self, *tasks: Task) -> None:
        self.store.add(tasks, overlap_share=1.0, overlap_annotators=2)

    def client(self) -> TestClient:
        client = TestClient(self.app, BASE, headers={"Origin": BASE})
        self.clients.append(client)
        return client

    def signed_in(self, name: str = "ann") -> TestClient:
        client = self.client()
        assert sign_in(client, name).url == f"{BASE}/"
        return client


def fields(page: str, action: str) -> dict[str, str]:
    """The hidden fields of the form with that action."""
    form = re.search(rf'<form [^>]*action="{action}".*?</form>', page, re.DOTALL)
    assert form, f"no form {action}"
    found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form[0])
    return {name: html.unescape(value) for name, value in found}


def sign_in(client: TestClient, name: str = "ann", password: str = PASSWORD) -> Response:
    form = fields(client.get("/sign-in").text, "/sign-in")
    return client.post("/sign-in", data=form | {"name": name, "password": password})


def send(client: TestClient, action: str, **values: str) -> Response:
    """Send the form of the page that is shown now."""
    return client.post(action, data=fields(client.get("/").text, action) | values)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(accounts, "_PARAMETERS", (16, 8, 1))  # quick to hash
    desk = Desk(tmp_path)
    yield desk
    desk.close()


@pytest.mark.parametrize(
    ("task", "value", "saved"),
    [
        (RATING, "4", 4),
        (LABEL, "good", True),
        (LABEL, "bad", False),
        (COMPARISON, "tie", "tie"),
    ],
)
def test_an_answer_of_each_kind_is_saved(desk: Desk, task: Task, value: str, saved: object) -> None:
    desk.add(task)
    client = desk.signed_in()
    page = send(client, "/answer", answer=value).text
    (answer,) = desk.store.answers()
    assert (answer.task.kind, answer.answer) == (task.kind, saved)
    assert answer.seconds is not None and answer.seconds >= 0
    assert "Nothing left for you" in page and "1 of 1 answered" in page


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_side_chosen_is_the_completion_seen_there(desk: Desk, side: str) -> None:
    desk.add(*(Task("comparison", f"{i}", (" shines.", " drags.")) for i in range(12)))
    client = desk.signed_in()
    for _ in range(12):
        page = client.get("/").text
        shown = re.findall(r'<div class="text" [^>]*>([^<]*)</div>', page)
        prompt = re.search(r'class="text prompt" [^>]*>([^<]*)<', page)
        assert prompt
        send(client, "/answer", answer=side)
        (answer,) = [a for a in desk.store.answers() if a.task.prompt == prompt[1]]
        chosen = answer.task.completions[0 if answer.answer == "first" else 1]
        assert chosen.strip() == shown[0 if side == "left" else 1]
    assert len({answer.swapped for answer in desk.store.answers()}) == 2


def test_the_task_page_does_not_say_where_completions_are_from(desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    client = desk.signed_in()
    for _ in range(3):
        assert "runs/" not in client.get("/").text
        send(client, "/skip")
    assert "Nothing left for you" in client.get("/").text


def test_texts_are_shown_not_obeyed(desk: Desk) -> None:
    desk.add(LABEL)
    page = desk.signed_in().get("/").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search("[\x00\x1b\u202e]", page)
    assert "⟨ESC⟩" in page and "⟨U+202E⟩" in page and "⟨NUL⟩" in page


def test_a_reload_shows_the_same_task_and_undo_brings_the_last_one_back(desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    client = desk.signed_in()
    first = fields(client.get("/").text, "/answer")
    assert fields(client.get("/").text, "/answer") == first
    send(client, "/skip")
    assert fields(client.get("/").text, "/answer")["task"] != first["task"]
    page = send(client, "/undo")
    assert "Taken back." in page.text and "0 of 3 answered" in page.text


def test_undo_takes_back_no_more_than_its_page_knew_of(desk: Desk) -> None:
    desk.add(RATING, replace_prompt(RATING, "二"), replace_prompt(RATING, "三"))
    client = desk.signed_in()
    send(client, "/answer", answer="1")
    send(client, "/answer", answer="2")
    form = fields(client.get("/").text, "/undo")
    assert client.post("/undo", data=form).status_code == 200
    late = client.post("/undo", data=form)
    assert late.status_code == 409 and "nothing was undone" in late.text
    assert [answer.answer for answer in desk.store.answers()] == [1]


def test_undo_of_nothing_is_a_conflict(desk: Desk) -> None:
    desk.add(RATING)
    answer = send(desk.signed_in(), "/undo")
    assert answer.status_code == 409 and "There is no answer to take back." in answer.text


def replace_prompt(task: Task, prompt: str) -> Task:
    return Task(task.kind, prompt, task.completions, task.origins)


def test_a_stale_form_saves_nothing(desk: Desk) -> None:
    desk.add(RATING, LABEL)
    client = desk.signed_in()
    form = fields(client.get("/").text, "/answer")
    kind = "rating" if "How good" in client.get("/").text else "label"
    value = {"rating": "3", "label": "good"}[kind]
    client.post("/answer", data=form | {"answer": value})
    for action, given in (("/answer", {"answer": value}), ("/skip", {})):
        late = client.post(action, data=form | given)
        assert late.status_code == 409
        assert "no longer open for you" in late.text and 'href="/"' in late.text
    assert len(desk.store.answers()) == 1


def test_nobody_answers_for_somebody_else(desk: Desk) -> None:
    desk.add(RATING)
    ann, ben = desk.signed_in("ann"), desk.signed_in("ben")
    task = fields(ann.get("/").text, "/answer")["task"]
    answer = send(ben, "/answer", task=task, answer="3")
    assert answer.status_code in (404, 409)
    assert desk.store.answers() == []


@pytest.mark.parametrize(
    ("action", "values", "status", "sentence"),
    [
        ("/answer", {"task": "987654", "answer": "3"}, 404, "There is no such task."),
        ("/answer", {"answer": "9"}, 400, "That is no answer to this task"),
        ("/answer", {"answer": "left"}, 400, "That is no answer to this task"),
        ("/answer", {"answer": "good"}, 400, "That is no answer to this task"),
        ("/answer", {"answer": "3.5"}, 400, "That is no answer to this task"),
        ("/answer", {"answer": "\x00"}, 400, "That is no answer to this task"),
        ("/answer", {"answer": "3" * 21}, 422, "That form is not complete"),
        ("/answer", {}, 422, "That form is not complete"),
        ("/answer", {"task": "x", "answer": "3"}, 422, "That form is not complete"),
        ("/answer", {"task": "-1", "answer": "3"}, 422, "That form is not complete"),
        ("/answer", {"task": "9" * 30, "answer": "3"}, 422, "That form is not complete"),
        ("/answer", {"token": "0" * 64, "answer": "3"}, 403, "another sign-in"),
        ("/answer", {"token": "é", "answer": "3"}, 403, "another sign-in"),
        ("/skip", {"token": ""}, 403, "another sign-in"),
        ("/skip", {"task": "987654"}, 404, "There is no such task."),
        ("/undo", {"token": ""}, 403, "another sign-in"),
        ("/undo", {"steps": "many"}, 422, "That form is not complete"),
        ("/sign-out", {"token": ""}, 403, "another sign-in"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(
    desk: Desk, action: str, values: dict[str, str], status: int, sentence: str
) -> None:
    desk.add(RATING)
    client = desk.signed_in()
    answer = send(client, action, **values)
    assert answer.status_code == status
    assert sentence in answer.text and "<h1>" in answer.text and "Traceback" not in answer.text
    assert desk.store.answers() == []
    assert "How good is this completion?" in client.get("/").text


def test_malformed_bodies_are_refused(desk: Desk) -> None:
    client = desk.signed_in()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/answer", content=b"--y", headers=kind).status_code in (400, 403, 422)
    upload = client.post("/answer", files={"answer": b"3", "token": b"x"})
    assert upload.status_code in (403, 422)
    assert client.post("/answer", content=b"{", headers={"Content-Type": "text/json"}).is_error
    assert client.post("/answer", content=b"a" * 70_000).status_code == 413


def test_unknown_pages_and_wrong_methods_are_plain_pages(desk: Desk) -> None:
    client = desk.client()
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/static/../app.py", 404),
        ("GET", "/static/%2e%2e/app.py", 404),
        ("GET", "/docs", 404),
        ("GET", "/answer", 405),
        ("PUT", "/", 405),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert "<h1>" in answer.text
        assert answer.headers["Content-Type"].startswith("text/html")


def test_signed_out_visitors_see_nothing(desk: Desk) -> None:
    desk.add(COMPARISON)
    client = desk.client()
    for path in ("/", "/dashboard"):
        answer = client.get(path)
        assert answer.url.path == "/sign-in" and "shines" not in answer.text
    for path in ("/answer", "/skip", "/undo", "/sign-out"):
        answer = client.post(path)
        assert answer.status_code == 401
        assert "please sign in first" in answer.text


def test_an_expired_session_is_told_of(desk: Desk) -> None:
    client = desk.client()
    client.cookies.set(SESSION_COOKIE, "no such session")
    for answer in (client.get("/"), client.post("/answer", data={"answer": "3"})):
        assert answer.status_code == 401
        assert "Your session is over" in answer.text
    client.cookies.delete(SESSION_COOKIE)
    form = fields(answer.text, "/sign-in") | {"name": "ann", "password": PASSWORD}
    assert client.post("/sign-in", data=form).url == f"{BASE}/"


def test_a_wrong_password_is_refused_and_then_held_back(desk: Desk) -> None:
    client = desk.client()
    for name in ("nobody", "ann", "ann", "ANN ", "ann", "ann"):
        answer = sign_in(client, name, "not the password")
        assert answer.status_code == 401
        assert "Name and password do not belong together." in answer.text
        assert "not the password" not in answer.text
    answer = sign_in(client)
    assert answer.status_code == 429 and "Too many attempts" in answer.text
    assert 0 < int(answer.headers["Retry-After"]) <= 60
    assert sign_in(client, "ben").url == f"{BASE}/"


def test_the_form_for_signing_in_belongs_to_one_browser(desk: Desk) -> None:
    ours, theirs = desk.client(), desk.client()
    form = fields(theirs.get("/sign-in").text, "/sign-in")
    values = form | {"name": "ann", "password": PASSWORD}
    assert ours.post("/sign-in", data=values).status_code == 403  # no cookie yet
    assert ours.post("/sign-in", data=values).status_code == 403  # another one
    assert ours.post("/sign-in", data={"name": "ann", "password": PASSWORD}).status_code == 403
    cross = theirs.post("/sign-in", data=values, headers={"Origin": "http://evil.example"})
    assert cross.status_code == 403 and SESSION_COOKIE not in theirs.cookies
    assert ours.get("/").url.path == "/sign-in"


def test_posts_from_elsewhere_are_refused_in_a_session_too(desk: Desk) -> None:
    desk.add(RATING)
    client = desk.signed_in()
    form = fields(client.get("/").text, "/answer") | {"answer": "3"}
    for headers in ({"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = client.post("/answer", data=form, headers=headers)
        assert answer.status_code == 403 and "another site" in answer.text
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert desk.store.answers() == []


def test_cookies_are_kept_from_scripts_and_other_sites(desk: Desk) -> None:
    for base, before, port in ((BASE, "", 8000), ("https://localhost", "__Host-", 443)):
        client = TestClient(desk.app, base, headers={"Origin": base}, follow_redirects=False)
        for kind, answer in (("visit", client.get("/sign-in")), ("session", sign_in(client))):
            name = f"{before}feedback_{kind}_{port}"
            cookie = answer.headers["Set-Cookie"]
            assert cookie.startswith(f"{name}=")
            assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(
                cookie.split(",")[0].split("; ")
            )
            assert ("; Secure" in cookie) == base.startswith("https")
        client.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_pages_at_two_ports_of_one_host_have_sessions_of_their_own(desk: Desk, scheme: str) -> None:
    browser = TestClient(desk.app)  # one jar, and a cookie goes to every port of its host
    desk.clients.append(browser)
    for port, name in (("8000", "ann"), ("8001", "ben")):
        browser.base_url = f"{scheme}://localhost:{port}"
        browser.headers["Origin"] = f"{scheme}://localhost:{port}"
        assert sign_in(browser, name).url.path == "/"
    browser.base_url, browser.headers["Origin"] = (
        f"{scheme}://localhost:8000",
        f"{scheme}://localhost:8000",
    )
    page = browser.get("/").text
    assert ">ann<" in page
    assert browser.post("/sign-out", data=fields(page, "/sign-out")).url.path == "/sign-in"
    assert len(browser.cookies) == 2  # the other session, and this visit
    browser.base_url = f"{scheme}://localhost:8001"
    assert ">ben<" in browser.get("/").text


def test_made_up_names_hold_up_nobody_elsewhere(desk: Desk) -> None:
    def client_at(address: str) -> TestClient:
        client = TestClient(desk.app, BASE, headers={"Origin": BASE}, client=(address, 50000))
        desk.clients.append(client)
        return client

    stranger = client_at("203.0.113.9")
    statuses = [sign_in(stranger, f"nobody {i}").status_code for i in range(31)]
    assert statuses == [401] * 30 + [429]
    assert sign_in(client_at("198.51.100.7")).url == f"{BASE}/"


def test_signing_in_gives_a_new_session_and_ends_the_old_one(desk: Desk) -> None:
    client = desk.signed_in()
    old = client.cookies[SESSION_COOKIE]
    assert sign_in(client).url == f"{BASE}/"
    assert client.cookies[SESSION_COOKIE] != old
    assert desk.accounts.session(old) is None


def test_signing_out_ends_the_session_on_the_server(desk: Desk) -> None:
    client = desk.signed_in()
    session = client.cookies[SESSION_COOKIE]
    assert send(client, "/sign-out").url.path == "/sign-in"
    assert SESSION_COOKIE not in client.cookies
    assert desk.accounts.session(session) is None


def test_a_session_and_an_open_task_outlive_a_restart(desk: Desk) -> None:
    desk.add(COMPARISON, RATING, LABEL)
    before = desk.signed_in()
    form = fields(before.get("/").text, "/answer")
    session = before.cookies[SESSION_COOKIE]
    desk.close()
    desk.open()
    after = desk.client()
    after.cookies.set(SESSION_COOKIE, session)
    assert fields(after.get("/").text, "/answer") == form
    assert after.post("/skip", data=form).status_code == 200


def test_every_page_is_sealed_and_names_no_other_place(desk: Desk) -> None:
    desk.add(COMPARISON)
    client = desk.signed_in()
    for path in ("/", "/dashboard", "/sign-in", "/nowhere", "/static/page.css", "/static/keys.js"):
        answer = client.get(path)
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["Cache-Control"] == "no-store"
        assert "http:" not in answer.text and "https:" not in answer.text
        assert not re.search(r"<script>|<style|style=|\son\w+=", answer.text)


def test_the_dashboard_gives_the_figures(desk: Desk) -> None:
    gold = Task("rating", "5 is right", (" text",), gold=5)
    desk.add(
        COMPARISON, LABEL, gold, *(replace_prompt(RATING, f"{i} is right") for i in range(1, 5))
    )
    for name, label in (("ann", "good"), ("ben", "bad")):
        client = desk.signed_in(name)
        while "Nothing left" not in (page := client.get("/").text):
            right = re.search(r">(\d) is right", page)
            value = right[1] if right else label if "good or bad" in page else "tie"
            send(client, "/answer", answer=value)
    page = re.sub(r"\s+", " ", client.get("/dashboard").text)
    for expected in (
        "<dd>14<",
        "by 2 people",
        'α 1.00 <span class="small quiet">100 % of 5 pairs agree',
        "0 % of 1 pairs agree",
        "(you)",
        "100 % (21 to 100 %)",  # each right on the one gold question
        'runs/plain</th> <td class="start">runs/tuned</td> <td>1</td> <td>50 % (5 to 95 %)',
        "<strong>good</strong> × 1 · <strong>bad</strong> × 1",
    ):
        assert expected in page, expected


def test_the_dashboard_does_not_sway_whoever_has_yet_to_answer(desk: Desk) -> None:
    desk.accounts.create("Cid", PASSWORD)
    desk.store.add([RATING], overlap_share=1.0, overlap_annotators=3)
    for name, value in (("ben", "1"), ("cid", "5")):
        send(desk.signed_in(name), "/answer", answer=value)
    for name, shown in (("ann", True), ("ben", True)):
        assert ("× 1" in desk.signed_in(name).get("/dashboard").text) == shown
    desk.accounts.create("Dan", PASSWORD)
    page = desk.signed_in("dan").get("/dashboard").text
    assert "None so far." in page and "很好看" not in page


def test_an_empty_dashboard_says_so(desk: Desk) -> None:
    assert "There are no answers yet." in desk.signed_in().get("/dashboard").text


def test_a_store_that_fails_is_told_of(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StoreError("disk full on /secret/place")

    desk.add(RATING)
    client = desk.signed_in()
    monkeypatch.setattr(desk.store, "answer", full)
    answer = send(client, "/answer", answer="3")
    assert answer.status_code == 503 and "<h1>Not saved</h1>" in answer.text
    assert "secret" not in answer.text and "disk full" in caplog.text


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "reward_models.feedback.web")
    with pytest.raises(ModuleNotFoundError, match=r"uvicorn is missing: .*rlhf-gym\[feedback\]"):
        importlib.import_module("reward_models.feedback.web")


def test_serving_needs_somebody_who_can_sign_in(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    with (
        FeedbackStore(path) as store,
        Accounts(path) as nobody,
        pytest.raises(ValueError, match="expected an account that can sign in, got none"),
    ):
        serve(store, nobody, host="0.0.0.0")


def test_the_first_account_is_set_up_at_the_terminal(tmp_path: Path) -> None:
    with Accounts(tmp_path / "feedback.db") as accounts:
        secrets = iter([PASSWORD, "another password", PASSWORD, PASSWORD])
        with pytest.raises(ValueError, match="expected the same password twice"):
            set_up_account(accounts, "Ann", lambda _: next(secrets))
        made = set_up_account(accounts, "Ann", lambda _: next(secrets))
        assert accounts.verify("ann", PASSWORD) == made


def test_whoever_answered_at_the_terminal_gets_a_password_first(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    with FeedbackStore(path) as store, Accounts(path) as accounts:
        made = accounts.create("Ann")
        with pytest.raises(ValueError, match="expected an account that can sign in"):
            serve(store, accounts)
        assert set_up_account(accounts, "Ann", lambda _: PASSWORD) == made
        assert accounts.verify("Ann", PASSWORD) == made
