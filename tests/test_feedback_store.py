"""The store: assignment, answers as shown and as kept, undo, and forgetting."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from reward_models.feedback import (
    Accounts,
    AlreadyAnswered,
    Assignment,
    FeedbackStore,
    StaleTask,
    Task,
    UnknownAnnotator,
    UnknownTask,
)
from reward_models.feedback.agreement import position_bias


def comparisons(n: int, **further) -> list[Task]:
    return [Task("comparison", f"p{i}", ("a", "b"), **further) for i in range(n)]


def give_all(store: FeedbackStore, annotator: str, choice: str = "left") -> list[Assignment]:
    """Answer everything that this person can be given."""
    given = []
    while (assignment := store.next_task(annotator)) is not None:
        store.answer(assignment.id, annotator, choice)
        given.append(assignment)
    return given


@pytest.fixture
def store(tmp_path: Path):
    with FeedbackStore(tmp_path / "feedback.db") as store:
        yield store


def test_the_same_task_twice_is_one(store: FeedbackStore) -> None:
    task = Task("comparison", "p", ("b", "a"), ("B", "A"))
    assert store.add([task, task, task.swapped()]) == 1
    assert store.add([task]) == 0
    other = Task("comparison", "p", ("a", "b"), ("A", "C"))
    assert store.add([other, Task("label", "p", ("a",)), Task("rating", "p", ("a",))]) == 3
    assert store.add([Task("rating", "p", ("a",), scale=(1, 7))]) == 1
    assert store.progress("ann").left == 5


def test_gold_follows_the_stores_order(store: FeedbackStore) -> None:
    store.add([Task("comparison", "p", ("b", "a"), ("B", "A"), gold="first")])
    assert store.next_task("ann").task == Task(
        "comparison", "p", ("a", "b"), ("A", "B"), gold="second"
    )


def test_an_open_task_comes_again_and_an_answered_one_never(store: FeedbackStore) -> None:
    store.add(comparisons(3))
    first = store.next_task("ann")
    assert store.next_task("ann") == first
    store.answer(first.id, "ann", "tie")
    second = store.next_task("ann")
    store.skip(second.id, "ann")
    third = store.next_task("ann")
    assert len({first.task, second.task, third.task}) == 3
    store.answer(third.id, "ann", "left")
    assert store.next_task("ann") is None
    progress = store.progress("ann")
    assert (progress.answered, progress.skipped, progress.left) == (2, 1, 0)
    assert store.next_task("bob").task == second.task


def test_answers_are_kept_in_the_tasks_own_order(store: FeedbackStore) -> None:
    """200 tasks, always the left one: kept as first where the order was not swapped."""
    store.add(comparisons(200))
    shown = {assignment.task: assignment.swapped for assignment in give_all(store, "ann")}
    assert 80 < sum(shown.values()) < 120  # 200 fair coins: 2.8 standard deviations each way
    answers = store.answers()
    for answer in answers:
        assert answer.swapped == shown[answer.task]
        assert answer.answer == ("second" if answer.swapped else "first")
    assert position_bias(answers).share == 1
    for answer, record in zip(answers, store.export(), strict=True):
        assert record.chosen == ("b" if answer.swapped else "a")
        assert record.annotator == "ann" and record.time == answer.time


def test_ratings_and_labels(store: FeedbackStore) -> None:
    store.add([Task("rating", "p", ("a",), ("A",)), Task("label", "p", ("a",))], 0)
    for _ in range(2):
        assignment = store.next_task("ann")
        value = 4 if assignment.task.kind == "rating" else False
        store.answer(assignment.id, "ann", value, seconds=2.5)
    by_kind = {answer.task.kind: answer for answer in store.answers()}
    assert by_kind["rating"].answer == 4 and by_kind["label"].answer is False
    assert by_kind["rating"].seconds == 2.5
    exported = {type(record).__name__: record for record in store.export()}
    assert exported["Rating"].rating == 4 and exported["Rating"].scale == (1, 5)
    assert exported["Rating"].origin == "A" and exported["Label"].label is False


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("comparison", "first", "expected left, right or tie, got 'first'"),
        ("comparison", ["left"], "expected left, right or tie"),
        ("rating", 6, "expected a rating from 1 to 5, got 6"),
        ("rating", 2.5, "expected a whole number from 1 to 5, got 2.5"),
        ("rating", True, "expected a rating from 1 to 5, got True"),
        ("rating", "4", "expected a whole number from 1 to 5, got '4'"),
        ("label", 1, "expected true or false, got 1"),
        ("label", None, "expected true or false, got None"),
    ],
)
def test_what_is_no_answer_is_refused(
    store: FeedbackStore, kind: str, answer: object, message: str
) -> None:
    store.add([Task(kind, "p", ("a", "b") if kind == "comparison" else ("a",))])
    assignment = store.next_task("ann")
    with pytest.raises(ValueError, match=message):
        store.answer(assignment.id, "ann", answer)
    assert store.next_task("ann") == assignment and store.answers() == []


def test_forms_out_of_date_are_refused(store: FeedbackStore) -> None:
    store.add(comparisons(3))
    first = store.next_task("ann")
    store.answer(first.id, "ann", "left")
    with pytest.raises(AlreadyAnswered, match=f"got {first.id}, which is answered already"):
        store.answer(first.id, "ann", "right")
    second = store.next_task("ann")
    with pytest.raises(StaleTask, match=f"got {second.id}"):
        store.answer(second.id, "bob", "left")
    store.undo("ann")
    with pytest.raises(StaleTask, match=f"the task that is open now, got {second.id}"):
        store.skip(second.id, "ann")
    for number in (0, -1, 99, 2**62, 10**30):
        with pytest.raises(UnknownTask, match=f"expected a task that was given, got {number}"):
            store.answer(number, "ann", "left")
    assert store.answers() == []


def test_undo_goes_back_one_by_one(store: FeedbackStore) -> None:
    store.add(comparisons(4))
    assert store.undo("ann") is None
    first = store.next_task("ann")
    store.answer(first.id, "ann", "left")
    second = store.next_task("ann")
    store.skip(second.id, "ann")
    assert store.next_task("ann").task not in (first.task, second.task)
    assert store.undo("ann") == second == store.next_task("ann")
    assert store.undo("ann") == first
    assert store.answers() == [] and store.progress("ann").left == 4
    store.answer(first.id, "ann", "right")
    assert len(store.answers()) == 1


def test_the_same_undo_twice_takes_one_answer_back(store: FeedbackStore) -> None:
    store.add(comparisons(3))
    give_all(store, "ann")
    assert store.undo("ann", of=3) is not None
    with pytest.raises(StaleTask, match="the last of 2 answers, got that of 3"):
        store.undo("ann", of=3)
    assert len(store.answers()) == 2


def test_undo_is_ones_own(store: FeedbackStore) -> None:
    store.add(comparisons(2))
    give_all(store, "ann")
    assert store.undo("bob") is None and len(store.answers()) == 2


def test_the_last_place_of_a_task_goes_to_one_person(store: FeedbackStore) -> None:
    store.add(comparisons(1), overlap_share=0)
    assert store.next_task("ann") is not None
    assert store.next_task("bob") is None
    assert store.progress("ann").left == 1 and store.progress("bob").left == 0


def test_an_open_task_expires(tmp_path: Path) -> None:
    """Bob gets what Ann left lying; her late answer counts all the same, else she gets another."""
    with FeedbackStore(tmp_path / "f.db", expire_after=0) as store:
        store.add(comparisons(1), overlap_share=0)
        late = store.next_task("ann")
        assert store.next_task("ann") == late
        store.answer(store.next_task("bob").id, "bob", "left")
        store.answer(late.id, "ann", "left")
        assert len(store.answers()) == 2
        store.add([Task("label", "p", ("a",))], overlap_share=0)
        late = store.next_task("ann")
        store.answer(store.next_task("bob").id, "bob", True)
        assert store.next_task("ann") is None
        with pytest.raises(StaleTask):
            store.answer(late.id, "ann", True)


def test_a_share_is_asked_of_several_people(store: FeedbackStore) -> None:
    """10 tasks, 3 of them of 4 people: 7 · 1 + 3 · 4 = 19 answers, however many come."""
    store.add(comparisons(10), overlap_share=0.3, overlap_annotators=4)
    for annotator in "abcdefgh":
        give_all(store, annotator)
    counts = Counter(answer.task_id for answer in store.answers())
    assert sorted(counts.values()) == [1] * 7 + [4] * 3


def test_overlap_of_many_small_batches_is_right_on_average(store: FeedbackStore) -> None:
    """100 batches of one task, a share of 0.3: 30 ± 4.6 of them."""
    for i in range(100):
        store.add([Task("label", f"p{i}", ("a",))], overlap_share=0.3, overlap_annotators=2)
    for annotator in "ab":
        give_all(store, annotator, choice=True)
    assert 15 < len(store.answers()) - 100 < 45


def test_least_answered_first_then_most_uncertain(store: FeedbackStore) -> None:
    tasks = [Task("label", f"p{i}", ("a",), uncertainty=i / 10) for i in range(3)]
    store.add([*tasks, Task("label", "p", ("a",))], overlap_share=1, overlap_annotators=2)
    first = store.next_task("ann")
    assert first.task.uncertainty == 0.2
    store.answer(first.id, "ann", True)
    order = [assignment.task.uncertainty for assignment in give_all(store, "bob", choice=True)]
    assert order == [0.1, 0.0, None, 0.2]


def test_uncertainty_and_gold_can_be_brought_up_to_date(store: FeedbackStore) -> None:
    store.add(comparisons(2))
    store.add(comparisons(2, uncertainty=0.5)[1:])
    assert store.next_task("ann").task.uncertainty == 0.5
    store.add(comparisons(1, gold="first"))
    assert store.progress("ann").left == 1


def test_gold_questions_are_mixed_in_at_a_rate(tmp_path: Path) -> None:
    """Everybody gets them: a quarter, 33 ± 6.7 before the other 100 end, and none after."""
    with FeedbackStore(tmp_path / "f.db", gold_rate=0.25) as store:
        store.add(comparisons(100), overlap_share=1, overlap_annotators=2)
        store.add([Task("label", f"g{i}", ("a",), gold=True) for i in range(80)])
        for annotator in ("ann", "bob"):
            golds = 0
            while (assignment := store.next_task(annotator)) is not None:
                golds += assignment.task.gold is not None
                is_label = assignment.task.kind == "label"
                store.answer(assignment.id, annotator, True if is_label else "left")
            assert 13 < golds < 55
            assert store.progress(annotator).answered == 100 + golds


def test_a_store_of_gold_questions_only_gives_them(store: FeedbackStore) -> None:
    store.add(comparisons(5, gold="tie"))
    assert store.progress("ann").left == 5
    assert len(give_all(store, "ann")) == len(give_all(store, "bob")) == 5


def test_the_same_seed_gives_the_same_order(tmp_path: Path) -> None:
    def order(name: str, seed: int, restart: bool) -> list[tuple[str, bool]]:
        with FeedbackStore(tmp_path / name, seed=seed) as store:
            store.add(comparisons(30))
        given: list[tuple[str, bool]] = []
        while True:
            with FeedbackStore(tmp_path / name, seed=seed) as store:
                while (assignment := store.next_task("ann")) is not None:
                    store.answer(assignment.id, "ann", "left")
                    given.append((assignment.task.prompt, assignment.swapped))
                    if restart:
                        break
                if assignment is None:
                    return given

    assert order("a", 0, restart=False) == order("b", 0, restart=True)
    assert order("a2", 1, restart=False) != order("b2", 0, restart=False)


@pytest.mark.parametrize(
    "arguments", [{"overlap_share": 1.5}, {"overlap_share": -1}, {"overlap_annotators": 0}]
)
def test_impossible_overlap_is_refused(store: FeedbackStore, arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"expected .* overlap"):
        store.add(comparisons(1), **arguments)


def test_a_nameless_annotator_is_refused(store: FeedbackStore) -> None:
    with pytest.raises(ValueError, match="expected an annotator's pseudonym, got ''"):
        store.next_task("")


def test_a_forgotten_person_is_gone_from_the_bytes(tmp_path: Path) -> None:
    """File, log and index hold neither name nor pseudonym; others' answers stay."""
    path = tmp_path / "f.db"
    with FeedbackStore(path) as store, Accounts(path) as accounts:
        store.add(comparisons(200), overlap_share=1, overlap_annotators=2)
        person = accounts.create("Zaphod Q. Beeblebrox", "correct horse")
        token = accounts.start_session(person)
        for _ in range(150):
            store.answer(store.next_task(person.pseudonym).id, person.pseudonym, "left")
        store.next_task(person.pseudonym)
        kept = len(give_all(store, "ann"))

        def found() -> set[str]:
            blob = b"".join(file.read_bytes() for file in tmp_path.iterdir())
            words = ("zaphod", person.pseudonym, "annotator-")
            return {word for word in words if word.encode() in blob}

        assert {"zaphod", person.pseudonym} <= found()
        assert store.forget("zaphod  q. BEEBLEBROX") == 150
        assert not found() & {"zaphod", person.pseudonym, "annotator-"}
        assert accounts.session(token) is None and accounts.all() == []
        assert len(store.answers()) == kept == 200
        with pytest.raises(UnknownAnnotator, match="expected the name of an annotator, got 'z"):
            store.forget("zaphod q. beeblebrox")
        assert store.forget("ann") == 200


def test_forgetting_by_pseudonym(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.db") as store, Accounts(tmp_path / "f.db") as accounts:
        store.add(comparisons(1))
        person = accounts.create("ann")
        store.answer(store.next_task(person.pseudonym).id, person.pseudonym, "left")
        assert store.forget(person.pseudonym) == 1
        assert accounts.find("ann") is None


def test_a_task_waits_for_all_its_answers(store: FeedbackStore) -> None:
    here = ("round-1", "round-1")
    store.add([*comparisons(4, origins=here), *comparisons(1)], 1.0, overlap_annotators=2)
    assert store.count_open("round-1", 2) == (4, 4)
    assert store.count_open("round-2", 2) == (0, 0)
    give_all(store, "ann")
    assert store.count_open("round-1", 2) == (4, 4)
    assert store.count_open("round-1", 1) == (4, 0)  # a second answer is waited for no longer
    give_all(store, "ben")
    assert store.count_open("round-1", 3) == (4, 0)


def test_a_task_passed_over_waits_for_whoever_is_at_work(store: FeedbackStore) -> None:
    store.add(comparisons(2, origins=("round-1", "round-1")), 0.0)
    first = store.next_task("ann")
    store.skip(first.id, "ann")
    store.answer(store.next_task("ann").id, "ann", "left")
    assert store.count_open("round-1", 1) == (2, 0)  # ann is alone
    store.undo("ann")
    store.answer(store.next_task("ann").id, "ann", "left")
    second = store.next_task("ben")
    assert second.task == first.task
    store.answer(second.id, "ben", "left")
    assert store.count_open("round-1", 1) == (2, 0)
    store.add(comparisons(4, origins=("round-1", "round-1")), 0.0)
    store.skip(store.next_task("ann").id, "ann")
    assert store.count_open("round-1", 1) == (4, 2)  # ben has not seen it


def test_the_unanswered_can_be_put_in_another_order(store: FeedbackStore) -> None:
    store.add(comparisons(6), 0.0)
    answered = store.next_task("ann")
    store.answer(answered.id, "ann", "left")
    skipped = store.next_task("ann")
    store.skip(skipped.id, "ann")
    waiting = store.unanswered()
    assert {task.prompt for task in waiting} == {f"p{i}" for i in range(6)} - {answered.task.prompt}
    assert store.add([replace(t, uncertainty=float(t.prompt[1:])) for t in waiting]) == 0
    given = [assignment.task.prompt for assignment in give_all(store, "ben")]
    assert given == sorted((task.prompt for task in waiting), reverse=True)
    assert store.unanswered() == []
