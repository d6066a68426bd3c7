"""Writes the small data sets of the presets qa.yaml and summaries.yaml: invented, by template.

    python configs/make_data.py

Every name and number in them is drawn at random. Texts of test prompts are in no other part.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIZES = {"train": 200, "test": 60, "feedback": 200, "judge": 100}
"""Rows of each part; `feedback` and `judge` are comparisons, on texts of their own."""

NAMES = [
    "Amal",
    "Bo",
    "Chen",
    "Dora",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Mira",
    "Nils",
    "Olga",
    "Pavel",
]
TOWNS = [
    "Arden",
    "Belmar",
    "Corvale",
    "Dunmoor",
    "Eastwick",
    "Farholm",
    "Glenrock",
    "Harwell",
    "Iverton",
    "Kelby",
    "Lowport",
    "Marsh",
]
JOBS = [
    "baker",
    "teacher",
    "nurse",
    "tailor",
    "farmer",
    "painter",
    "pilot",
    "judge",
    "cook",
    "gardener",
]
SHOPS = ["a bakery", "a bookshop", "a small hotel", "a garage", "a tea house", "a cinema"]
BUILDINGS = ["library", "museum", "theatre", "lighthouse", "station", "castle", "market", "school"]
COLOURS = ["red", "blue", "green", "white", "yellow", "grey"]
ANIMALS = ["otters", "owls", "foxes", "wolves", "herons", "badgers", "hares", "seals"]
FOODS = ["fish", "berries", "mice", "insects", "grass", "frogs", "roots", "crabs"]
EVENTS = ["concert", "lecture", "fair", "race", "dance", "exhibition"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ROOMS = ["town hall", "old barn", "blue room", "main square", "school gym", "harbour"]
TEAMS = ["Rovers", "Hawks", "Lions", "Comets", "Miners", "Sailors", "Tigers", "Foxes"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"]
GOODS = ["bicycles", "shoes", "lamps", "chairs", "clocks", "tents", "boats"]
FILLERS = [
    "Many people had been waiting for this.",
    "It was a mild day, and the streets were full.",
    "Neighbours talked about little else.",
    "A local band played in the background.",
    "The mayor was not there.",
    "Nobody could remember anything like it.",
    "More is to be said about it next week.",
    "Some had come from far away.",
]

Question = tuple[str, list[str], list[str]]
"""A question, right answers (the first is what is learned), and wrong ones."""


def passage(r: random.Random) -> tuple[str, list[Question]]:
    """Return a short text and questions on it."""
    name, other = r.sample(NAMES, 2)
    town, town2 = r.sample(TOWNS, 2)
    year, number = str(r.randint(1890, 2019)), r.choice(NUMBERS)
    wrong = [town2, other, str(r.randint(1890, 2019))]
    kind = r.randrange(4)
    if kind == 0:
        job, shop = r.choice(JOBS), r.choice(SHOPS)
        text = f"{name}, a {job} from {town}, moved to {town2} in {year} and opened {shop} there."
        return text, [
            (f"Where did {name} come from?", [town, f"from {town}"], [town2, job]),
            (f"Where did {name} move to?", [town2, f"to {town2}"], [town, shop]),
            (f"When did {name} move?", [year, f"in {year}"], [town2, wrong[2]]),
            (f"What was {name} by trade?", [f"a {job}", job], [shop, name]),
            (f"What did {name} open?", [shop, shop.partition(" ")[2]], [year, f"a {job}"]),
        ]
    if kind == 1:
        building, colour = r.choice(BUILDINGS), r.choice(COLOURS)
        text = (
            f"The {building} of {town} was built in {year} after plans by {name}. It has {number} "
            f"rooms, and its doors are {colour}."
        )
        return text, [
            (f"When was the {building} built?", [year, f"in {year}"], [number, wrong[2]]),
            (f"Who made the plans of the {building}?", [name], [other, town]),
            (f"How many rooms does the {building} have?", [number, f"{number} rooms"], [year]),
            (f"What colour are the doors of the {building}?", [colour], [building, name]),
        ]
    if kind == 2:
        animal, food = r.choice(ANIMALS), r.choice(FOODS)
        text = (
            f"The {animal} near {town} eat {food} and sleep {number} hours a day. {name} has "
            f"counted them since {year}."
        )
        return text, [
            (f"What do the {animal} eat?", [food], [animal, town]),
            (
                f"How long do the {animal} sleep?",
                [f"{number} hours", f"{number} hours a day", number],
                [food, year],
            ),
            (f"Who counts the {animal}?", [name], [other, food]),
            (f"Since when have the {animal} been counted?", [year, f"since {year}"], [number]),
        ]
    event, day, room = r.choice(EVENTS), r.choice(DAYS), r.choice(ROOMS)
    text = f"The {event} begins on {day} at {number} in the {room} of {town}. {name} has tickets."
    return text, [
        (f"On which day is the {event}?", [day, f"on {day}"], [number, town]),
        (f"At what time does the {event} begin?", [number, f"at {number}"], [day, town]),
        (f"Where is the {event}?", [f"in the {room}", f"the {room} of {town}", room], [day]),
        (f"Who has tickets for the {event}?", [name], [other, room]),
    ]


def question(r: random.Random) -> tuple[str, list[str], list[str]]:
    """Return a prompt with one question, right answers, and worse ones."""
    text, questions = passage(r)
    asked, right, wrong = r.choice(questions)
    chatty = f"I think that the answer is {r.choice([right[0], *wrong])}, but I am not sure."
    return f"{text}\n{asked}\n", right, [*wrong, chatty]


def story(r: random.Random) -> tuple[str, list[str], list[str]]:
    """Return a prompt with a short report, its summary, and worse ones."""
    name, other = r.sample(NAMES, 2)
    town, town2 = r.sample(TOWNS, 2)
    number, year = r.choice(NUMBERS), r.randint(1890, 2019)
    day, building = r.choice(DAYS), r.choice(BUILDINGS)
    kind = r.randrange(5)
    if kind == 0:
        one, two = r.sample(TEAMS, 2)
        high, low = sorted(r.sample(range(6), 2), reverse=True)
        facts = [
            f"On {day} the {one} of {town} met the {two} of {town2}.",
            f"{name} scored the first goal for the {one}.",
            f"When it was over, the score was {high} to {low} for the {one}.",
        ]
        summary = f"The {one} beat the {two} {high} to {low} on {day}."
    elif kind == 1:
        facts = [
            f"There was a fire in the {building} of {town} on {day} night.",
            f"{name}, who lives next door, called for help.",
            f"All {number} people in the house got out unhurt.",
        ]
        summary = f"A fire in the {building} of {town} on {day} hurt nobody."
    elif kind == 2:
        goods = r.choice(GOODS)
        facts = [
            f"The company of {name} makes {goods} in {town}.",
            f"It was founded in {year}.",
            f"Next spring it will open a second factory, in {town2}, and hire {number} people.",
        ]
        summary = f"{name}'s company, which makes {goods}, will open a second factory in {town2}."
    elif kind == 3:
        facts = [
            f"The council of {town} talked about the old {building} for {number} hours.",
            f"{name} wanted to sell it, and {other} wanted to keep it.",
            f"In the end the council decided on {day} to repair it.",
        ]
        summary = f"The council of {town} decided to repair the old {building}."
    else:
        animal = r.choice(ANIMALS)
        facts = [
            f"For years there had been no {animal} near {town}.",
            f"On {day} {name} saw {number} of them by the river.",
            f"{other}, who studies them, says that the water is cleaner now.",
        ]
        summary = f"The {animal} have come back to {town}, as the water is cleaner."
    sentences = facts.copy()
    for filler in r.sample(FILLERS, 2):
        sentences.insert(r.randrange(1, len(sentences) + 1), filler)
    beside = r.choice([s for s in sentences if s in FILLERS])
    twice = f"{summary} {beside}"
    return " ".join(sentences) + "\nIn one sentence:\n", [summary], [facts[1], beside, twice]


def parts(make: Callable[[random.Random], Any], seed: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield each part with its rows; no prompt is in two parts, or twice in one."""
    r, seen = random.Random(seed), set()
    for part, size in SIZES.items():
        rows: list[Any] = []
        while len(rows) < size:
            prompt, right, wrong = make(r)
            if prompt in seen:
                continue
            seen.add(prompt)
            if part in ("train", "test"):
                rows.append({"prompt": prompt, "reference": right})
            else:
                rejected = r.choice(wrong)
                rows.append({"prompt": prompt, "chosen": right[0], "rejected": rejected})
        yield part, rows


def write(folder: Path, rows_of: Iterable[tuple[str, list[Any]]]) -> None:
    """Write each part as JSON lines."""
    folder.mkdir(exist_ok=True)
    for part, rows in rows_of:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def main(place: Path = HERE) -> None:
    """Write both data sets into folders of `place`."""
    write(place / "qa", parts(question, seed=1))
    write(place / "summaries", parts(story, seed=2))


if __name__ == "__main__":
    main()
