"""Which task a person is given next, and in which order its completions are shown.

Chance is drawn from the seed and from what it is drawn for, never from a running generator: the
same seed gives the same order whatever the number of processes and restarts.
"""

import math
import random
import sqlite3
from collections import Counter

_OPEN_TO = """
    FROM tasks
    LEFT JOIN (
        SELECT task, count(*) AS given FROM assignments
        WHERE annotator <> :annotator
            AND (answer IS NOT NULL OR (done IS NULL AND opened > :live_since))
        GROUP BY task
    ) AS others ON others.task = tasks.id
    WHERE (tasks.gold IS NOT NULL) = :gold
        AND tasks.wanted > (CASE WHEN :gold THEN 0 ELSE coalesce(given, 0) END)
        AND NOT EXISTS (
            SELECT 1 FROM assignments
            WHERE assignments.task = tasks.id AND annotator = :annotator AND done IS NOT NULL
        )
"""
"""Tasks that a person has not done and that others were given less often than wanted.

What others hold open counts until it is older than `live_since`. Tasks with a known answer are
asked of everybody.
"""


def choose_task(
    connection: sqlite3.Connection, annotator: str, seed: int, gold_rate: float, live_since: float
) -> int | None:
    """The number of the task to give: least answered first, then the most uncertain, then chance.

    A share `gold_rate` has a known answer. All have one if the store holds no other tasks.
    """
    turns = [False]
    if _only_gold(connection):
        turns = [True]
    elif _is_gold_turn(connection, annotator, seed, gold_rate):
        turns = [True, False]
    for gold in turns:
        row = connection.execute(
            f"SELECT tasks.id {_OPEN_TO} ORDER BY CASE WHEN :gold THEN 0 ELSE coalesce(given, 0) "
            "END, uncertainty DESC NULLS LAST, place LIMIT 1",
            {"annotator": annotator, "gold": gold, "live_since": live_since},
        ).fetchone()
        if row is not None:
            return row["id"]
    return None


def is_open_to(
    connection: sqlite3.Connection, task: int, annotator: str, live_since: float
) -> bool:
    """Whether a task that this person left lying has not gone to others since."""
    return any(
        connection.execute(
            f"SELECT 1 {_OPEN_TO} AND tasks.id = :task",
            {"annotator": annotator, "gold": gold, "live_since": live_since, "task": task},
        ).fetchone()
        for gold in (False, True)
    )


def count_left(connection: sqlite3.Connection, annotator: str, live_since: float) -> int:
    """How many tasks this person can still be given, gold questions mixed in not counted."""
    return connection.execute(
        f"SELECT count(*) {_OPEN_TO}",
        {"annotator": annotator, "gold": _only_gold(connection), "live_since": live_since},
    ).fetchone()[0]


def count_open(connection: sqlite3.Connection, origin: str, most: int) -> tuple[int, int]:
    """How many tasks there are from an origin, and how many of them still lack an answer.

    A task lacks one until as many people as wanted, `most` at most, have answered. If some of them
    have passed it over, it waits for those who are at work on this origin's tasks, and then no
    longer.
    """
    done: dict[int, set[str]] = {}
    answers: Counter[int] = Counter()
    wanted: dict[int, int] = {}
    for row in connection.execute(
        "SELECT tasks.id, wanted, annotator, answer IS NOT NULL AS answered FROM tasks "
        "LEFT JOIN assignments ON task = tasks.id AND done IS NOT NULL WHERE wanted > 0 "
        "AND EXISTS (SELECT 1 FROM json_each(origins) WHERE value = ?)",
        (origin,),
    ):
        wanted[row["id"]] = min(row["wanted"], most)
        done.setdefault(row["id"], set())
        if row["annotator"] is not None:
            done[row["id"]].add(row["annotator"])
            answers[row["id"]] += row["answered"]
    people = set().union(*done.values())
    lacking = [
        task
        for task, enough in wanted.items()
        if answers[task] < enough and (len(done[task]) < enough or people - done[task])
    ]
    return len(wanted), len(lacking)


def is_shown_swapped(seed: int, digest: str, annotator: str) -> bool:
    """Whether this person sees this comparison's second completion first."""
    return _draw(seed, "order", digest, annotator) < 0.5


def place(seed: int, digest: str) -> float:
    """A task's place among those that nothing else tells apart."""
    return _draw(seed, "place", digest)


def draw_overlap(seed: int, tasks: list[int], share: float) -> list[int]:
    """Choose the tasks that several people are asked, a share of them to within one task."""
    rng = random.Random(f"{seed}/overlap/{tasks[:1]}/{len(tasks)}")
    return rng.sample(tasks, math.floor(len(tasks) * share + rng.random()))


def _only_gold(connection: sqlite3.Connection) -> bool:
    return not connection.execute(
        "SELECT EXISTS (SELECT 1 FROM tasks WHERE gold IS NULL AND wanted > 0)"
    ).fetchone()[0]


def _is_gold_turn(
    connection: sqlite3.Connection, annotator: str, seed: int, gold_rate: float
) -> bool:
    given = connection.execute(
        "SELECT count(*) FROM assignments WHERE annotator = ? AND opened IS NOT NULL", (annotator,)
    ).fetchone()[0]
    return _draw(seed, "gold", annotator, given) < gold_rate


def _draw(*purpose: object) -> float:
    """A number from 0 to 1 that depends on nothing but its purpose."""
    return random.Random("/".join(map(str, purpose))).random()
