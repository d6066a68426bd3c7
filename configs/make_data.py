"""Writes the small data sets of the presets qa.yaml and summaries.yaml: invented, by template.

    python configs/make_data.py

First the words, then the topics of the reports (REPORTS) and of the texts that are asked about
(PASSAGES), then what puts them together. Every name and number is drawn at random, and so is the
way in which a thing is said. No prompt is in two parts. The warm start is shown the first half of
each list of words; PPO meets more of them, the last fifth is for test and judge alone. What the
warm start is shown is by people of unequal care (CARELESS), as demonstrations are.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Part(NamedTuple):
    """How many rows a file has, and the share of each list of words that they are made of."""

    size: int
    words: float = 0.8


PARTS = {
    "warm_start": Part(240, words=0.5),
    "train": Part(240),
    "test": Part(80, words=1.0),
    "feedback": Part(240),
    "judge": Part(200, words=1.0),
}
"""The files of a data set; `feedback` and `judge` are comparisons, on texts of their own."""
CARELESS = 0.3
"""Share of the warm start's rows whose completion is true, but not as it should be."""

WORDS = {
    "name": (
        "Amal, Bo, Chen, Dora, Emil, Farah, Goran, Hana, Ines, Jonas, Kofi, Lena, Mira, Nils, "
        "Olga, Pavel, Rosa, Sami, Tara, Umar, Vera, Wanda, Yusuf, Zoe, Anton, Bela, Carla, Dario, "
        "Edith, Femi, Greta, Hugo, Irma, Jamal"
    ),
    "town": (
        "Arden, Belmar, Corvale, Dunmoor, Eastwick, Farholm, Glenrock, Harwell, Iverton, Kelby, "
        "Lowport, Marsh, Norden, Oakham, Penrith, Quarley, Redhill, Selby, Thornton, Upwell, "
        "Verley, Winslow, Yarrow, Ashby, Brackley, Colne, Denham, Elmsford, Fenwick, Girton"
    ),
    "job": (
        "baker, teacher, nurse, tailor, farmer, painter, pilot, judge, cook, gardener, plumber, "
        "dentist, clerk, sailor, miller, barber"
    ),
    "shop": (
        "bakery, bookshop, small hotel, garage, tea house, cinema, flower shop, music school, "
        "bicycle shop, dance hall, pharmacy, toy shop"
    ),
    "building": (
        "library, museum, theatre, lighthouse, station, castle, market, school, mill, hospital, "
        "chapel, brewery, prison, bakery"
    ),
    "colour": "red, blue, green, white, yellow, grey, black, brown, pink, purple",
    "animal": (
        "otters, owls, foxes, wolves, herons, badgers, hares, seals, storks, beavers, bats, "
        "toads, deer, swans"
    ),
    "food": (
        "fish, berries, mice, insects, grass, frogs, roots, crabs, seeds, worms, snails, leaves, "
        "nuts, eggs"
    ),
    "event": "concert, lecture, fair, race, dance, exhibition, play, parade, auction, feast",
    "room": (
        "town hall, old barn, blue room, main square, school gym, harbour hall, city park, church "
        "garden, glass house, railway hotel"
    ),
    "team": (
        "Rovers, Hawks, Lions, Comets, Miners, Sailors, Tigers, Foxes, Rangers, Bears, Eagles, "
        "Pirates, Wolves, Knights"
    ),
    "goods": (
        "bicycles, shoes, lamps, chairs, clocks, tents, boats, pianos, carpets, toys, bells, gloves"
    ),
    "crop": "apple, potato, wheat, grape, onion, cherry, barley, pumpkin",
    "contest": "baking, singing, chess, swimming, spelling, fishing, photo, poetry",
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "month": (
        "January, March, May, July, September, November, February, April, June, August, October, "
        "December"
    ),
    "number": "three, five, seven, nine, twelve, four, six, eight, ten, eleven, two",
}
"""What is drawn; `{town}`, `{town2}` and `{town3}` are three different ones. So are years."""


class Report(NamedTuple):
    """What reports are on: the news, what is beside the point, and how it may have ended.

    Attributes:
        news: Ways to begin.
        endings: Ways to say an ending, and the sentence that sums up a report which ends so.
        beside: Sentences that do not belong in the summary.
    """

    news: list[str]
    endings: list[tuple[list[str], str]]
    beside: list[str]


class Example(NamedTuple):
    """A prompt and what may be said to it: right, true but not as it should be, or beside it."""

    prompt: str
    right: list[str]
    careless: list[str]
    wrong: list[str]


class Passage(NamedTuple):
    """What texts are on, and what is asked about them.

    Attributes:
        sentences: Ways to say each of its sentences, in their order.
        questions: Ways to ask, right answers (the first is what is learned), and wrong ones.
    """

    sentences: list[list[str]]
    questions: list[tuple[list[str], list[str], list[str]]]


BESIDE = [
    "Many people had been waiting for this.",
    "It was a mild {day3}, and the streets were full.",
    "Neighbours talk about little else.",
    "{name3}, who runs the {shop} next door, was not there.",
    "Nobody in {town} can remember anything like it.",
    "More is to be said about it in {month2}.",
    "Some had come all the way from {town3}.",
    "Tea and cake were served to all.",
]
"""Sentences for reports on anything."""

REPORTS = [
    Report(  # a match
        news=[
            "On {day} the {team} of {town} met the {team2} of {town2}.",
            "The {team2} travelled to {town} on {day} to play the {team}.",
            "Some {number} thousand people in {town} saw the {team} play the {team2} on {day}.",
        ],
        endings=[
            (
                [
                    "When it was over, the score was {high} to {low} for the {team}.",
                    "The home side scored {high} times, and let in {low}.",
                    "The guests went home with {low} goals against {high}.",
                ],
                "The {team} beat the {team2} {high} to {low} in {town}.",
            ),
            (
                [
                    "It was the guests who won, {high} to {low}.",
                    "The {team2} took the cup home, as they were {high} to {low} ahead.",
                    "The home side could not do more than {low} goals against {high}.",
                ],
                "The {team2} beat the {team} {high} to {low} in {town}.",
            ),
            (
                [
                    "At the final whistle both sides had {low} goals.",
                    "Neither side won, as each scored {low}.",
                ],
                "The {team} and the {team2} drew {low} all in {town}.",
            ),
        ],
        beside=[
            "{name} scored first, with a long shot.",
            "{name2} had to leave with a hurt knee after {number2} minutes.",
            "The rain had turned the grass to mud.",
            "When they last met, in {year}, it was 7 to 1.",
        ],
    ),
    Report(  # a fire
        news=[
            "A fire broke out in the {building} of {town} on {day} night.",
            "On {day} night flames were seen in the {building} of {town}.",
            "Smoke came out of the {building} of {town} late on {day}.",
        ],
        endings=[
            (
                [
                    "All {number} people in the house got out safely.",
                    "The {number} people inside had been warned in time and are well.",
                ],
                "A fire in the {building} of {town} hurt nobody.",
            ),
            (
                [
                    "Firemen carried out {number} people, who are now in hospital.",
                    "For {number} people help came late, and they were badly burnt.",
                ],
                "A fire in the {building} of {town} hurt {number} people.",
            ),
            (
                [
                    "By morning nothing but the walls was left.",
                    "The next day people stood before a heap of ashes.",
                ],
                "A fire has destroyed the {building} of {town}.",
            ),
        ],
        beside=[
            "{name}, who lives across the street, called for help.",
            "A heater is thought to have been the cause.",
            "It took firemen from {town2} {number2} hours to put it out.",
            "The {building} had been painted {colour} only in {month}.",
        ],
    ),
    Report(  # a factory
        news=[
            "{name}, whose company makes {goods} in {town}, had news for the press on {day}.",
            "There is news of the factory for {goods} that {name} has in {town}.",
            "In {town} {name} makes {goods}, and has been in the papers again.",
        ],
        endings=[
            (
                [
                    "Next {month} a second factory will be built, in {town2}.",
                    "From {month} on, {number} workers will make the same in {town2} too.",
                ],
                "{name} will open a second factory for {goods} in {town2}.",
            ),
            (
                [
                    "At the end of {month} the doors will be shut for good.",
                    "The {number} workers have been told to look for other work by {month}.",
                ],
                "{name}'s factory for {goods} in {town} will close in {month}.",
            ),
            (
                [
                    "All of it now belongs to {name2}, who paid {number} million.",
                    "For {number} million, {name2} is the new owner.",
                ],
                "{name2} has bought {name}'s factory for {goods} in {town}.",
            ),
        ],
        beside=[
            "It all began in {year}, in a single room.",
            "The {goods} are sold in {number2} countries.",
            "In {town3} another company makes {goods2}.",
            "The workers had asked for higher wages.",
        ],
    ),
    Report(  # the council
        news=[
            "On {day} the council of {town} talked for {number} hours about the old {building}.",
            "What is to become of the old {building}? The council of {town} met on {day}.",
            "The old {building} has stood empty for years, and {town}'s council had to act.",
        ],
        endings=[
            (
                [
                    "In the end it was agreed to have the roof and the walls put right.",
                    "It will get new windows and a new roof, {number2} members said.",
                ],
                "The council of {town} will repair the old {building}.",
            ),
            (
                [
                    "It goes to {name} for {number2} million, most members thought.",
                    "The offer of {name}, of {number2} million, was taken.",
                ],
                "The council of {town} will sell the old {building} to {name}.",
            ),
            (
                [
                    "Workers will come in {month2} to pull it down.",
                    "By {month2} there will be a lawn in its place, most members said.",
                ],
                "The council of {town} will tear down the old {building}.",
            ),
        ],
        beside=[
            "{name2} would have liked a car park.",
            "It was built in {year} by a {job} from {town2}.",
            "{name3} spoke of the {colour} windows.",
            "A new {building2} had been refused before.",
        ],
    ),
    Report(  # animals
        news=[
            "For {number} years nobody had seen any {animal} near {town}.",
            "The last {animal} of {town} were seen {number} years ago.",
            "There used to be {animal} around {town}, up to {number} years ago.",
        ],
        endings=[
            (
                [
                    "On {day} {name} counted a dozen of them by the river.",
                    "Since {month} {name} has met some of them every evening.",
                ],
                "The {animal} are back near {town} after {number} years.",
            ),
            (
                [
                    "{name} looked for them until {month}, and found none.",
                    "All that {name} found in {month} was an old nest.",
                ],
                "There are still no {animal} near {town}.",
            ),
        ],
        beside=[
            "{name2} studies {animal2}, and wrote a book about them in {year}.",
            "They live on {food}.",
            "The water is cleaner than it was in {year}.",
            "In {town2} there are too many {animal2}.",
        ],
    ),
    Report(  # an event
        news=[
            "The {event} of {town} was to be held on {day} in the {room}.",
            "Everything was ready for {town}'s {event} in the {room} on {day}.",
            "{number} thousand people had tickets for {day}, when the {event} of {town} was to be.",
        ],
        endings=[
            (
                [
                    "As {name} is ill, everybody has to wait until {day2}.",
                    "The tickets are now good for {day2}.",
                ],
                "The {event} of {town} is put off to {day2}.",
            ),
            (
                [
                    "Guests should go to the {room2}, as the roof leaks.",
                    "There is more space in the {room2}, so that is where it will be.",
                ],
                "The {event} of {town} is moved to the {room2}.",
            ),
            (
                [
                    "There is no money for it any more, and guests get theirs back.",
                    "It will not take place, this year or the next.",
                ],
                "The {event} of {town} is cancelled.",
            ),
        ],
        beside=[
            "{name2} had practised for {number2} weeks.",
            "Last year it was in {town2}.",
            "The first one was held in {year}.",
            "The {colour} lights had been hung up already.",
        ],
    ),
    Report(  # a walk
        news=[
            "{name} went for a walk in the hills above {town} on {day} and did not come home.",
            "On {day} {name}, a {job} of {town}, was seen last on the way to the hills.",
            "Since {day} {number} people have been looking for {name} in the hills of {town}.",
        ],
        endings=[
            (
                [
                    "A dog came upon the walker by a stream, cold but well.",
                    "The missing walker was asleep in a hut, and is well.",
                ],
                "{name} was found safe in the hills of {town}.",
            ),
            (
                [
                    "The walker had fallen into a gorge and broken a leg.",
                    "A helicopter brought the walker to hospital with broken bones.",
                ],
                "{name} was found hurt in the hills of {town}.",
            ),
            (
                [
                    "Dogs and a helicopter have searched without a trace.",
                    "Nothing has been found but a {colour} hat.",
                ],
                "{name} is still missing in the hills of {town}.",
            ),
        ],
        beside=[
            "{name2} had given warning of fog.",
            "In {year} somebody was lost there for {number2} days.",
            "The path from {town2} was closed.",
            "It was a birthday, {name3} says.",
        ],
    ),
    Report(  # an election
        news=[
            "{name} and {name2} both wanted to be mayor, and on {day} {town} voted.",
            "On {day} the people of {town} had the choice of {name} or {name2} for mayor.",
            "{town} went to vote on {day}: would {name} or {name2} be its mayor?",
        ],
        endings=[
            (
                [
                    "{name2} was {number} thousand votes behind.",
                    "{name} had more than half of the votes, and thanked everybody.",
                ],
                "{name} was elected mayor of {town}.",
            ),
            (
                [
                    "{name} was {number} thousand votes behind.",
                    "{name2} had more than half of the votes, and thanked everybody.",
                ],
                "{name2} was elected mayor of {town}.",
            ),
            (
                [
                    "Each had the same number of votes, so all is to be done again in {month}.",
                    "As too few people came, they are called again in {month}.",
                ],
                "{town} must vote for a mayor again in {month}.",
            ),
        ],
        beside=[
            "The old mayor, {name3}, moves to {town2}.",
            "The votes were counted in the {room} until late.",
            "Both want a new {building}.",
            "{number2} years ago a {job} won.",
        ],
    ),
    Report(  # a bridge
        news=[
            "Since {month} no car has crossed the bridge from {town} to {town2}.",
            "The bridge between {town} and {town2} was shut in {month}.",
            "Those who go from {town} to {town2} have had no bridge since {month}.",
        ],
        endings=[
            (
                [
                    "On {day} {name} cut the ribbon, and the first cars rolled.",
                    "Cars and buses have been using it again since {day}.",
                ],
                "The bridge from {town} to {town2} is open again.",
            ),
            (
                [
                    "The work takes longer than planned, until {month2}.",
                    "More cracks were found, and nobody may use it before {month2}.",
                ],
                "The bridge from {town} to {town2} stays shut until {month2}.",
            ),
            (
                [
                    "From {day} on a boat takes people across, {number} times a day.",
                    "{name} will take people over the river in a boat from {day} on.",
                ],
                "A ferry will go from {town} to {town2} from {day}.",
            ),
        ],
        beside=[
            "The way round by {town3} takes {number2} hours.",
            "It was built in {year}.",
            "{name2}, a {job}, had to sell a shop because of it.",
            "Its {colour} paint had come off long ago.",
        ],
    ),
    Report(  # a contest
        news=[
            "On {day} {number} people took part in the {contest} contest of {town}.",
            "The {contest} contest of {town} was held in the {room} on {day}.",
            "Who would win {town}'s {contest} contest? On {day} the jury met.",
        ],
        endings=[
            (
                [
                    "Nobody was a match for {name}.",
                    "The jury had no doubt, and the cup went to {name}.",
                ],
                "{name} won the {contest} contest of {town}.",
            ),
            (
                [
                    "The jury could not choose between {name} and {name2}.",
                    "{name} and {name2} were equally good, and both got a cup.",
                ],
                "{name} and {name2} shared the {contest} prize of {town}.",
            ),
        ],
        beside=[
            "{name3} came third, and the year before second.",
            "The youngest was {number2} years old.",
            "In {year} a {job} from {town2} won.",
            "The cup is {colour}.",
        ],
    ),
    Report(  # a theft
        news=[
            "On {day} night somebody took {number} {goods} from the {building} of {town}.",
            "When the {building} of {town} opened on {day}, {number} {goods} were gone.",
            "{number} {goods} have been missing from the {building} of {town} since {day}.",
        ],
        endings=[
            (
                [
                    "The police now have {name}, who had sold some of them.",
                    "Footprints led to {name}, who is now in a cell.",
                ],
                "{name} was arrested for stealing {goods} in {town}.",
            ),
            (
                [
                    "They were in a barn in {town2}, under the hay.",
                    "A child saw them in a boat near {town2}.",
                ],
                "The {goods} stolen in {town} were found in {town2}.",
            ),
        ],
        beside=[
            "{name2} had forgotten to lock the door.",
            "They are worth {number2} thousand.",
            "The {goods2} were left behind.",
            "There was a theft in {town3} in {month} too.",
        ],
    ),
    Report(  # a harvest
        news=[
            "Around {town} most farmers grow for the {crop} market.",
            "The {crop} farmers of {town} met on {day}.",
            "{name}, a {crop} farmer near {town}, looked at the fields on {day}.",
        ],
        endings=[
            (
                [
                    "Ice in the night of {day2} has left them almost nothing.",
                    "The cold nights of last week have killed nearly all of it.",
                ],
                "Frost has spoilt the {crop} harvest of {town}.",
            ),
            (
                [
                    "Never in {number} years was there so much to bring in.",
                    "One has to go back {number} years to find as good a year.",
                ],
                "The {crop} harvest of {town} is the best in {number} years.",
            ),
        ],
        beside=[
            "{name2} drives the only tractor.",
            "The market in {town2} pays little.",
            "{animal} eat some of it every year.",
            "In {year} they grew tea.",
        ],
    ),
]

PASSAGES = [
    Passage(  # two who moved
        sentences=[
            [
                "{name}, a {job} from {town}, moved to {town2} in {year} and opened a {shop}.",
                "In {year} the {job} {name} left {town} for {town2}, and opened a {shop}.",
            ],
            [
                "{name2}, a {job2}, came there from {town3} in {year2} and runs a {shop2}.",
                "The {shop2} belongs to {name2}, a {job2}, who came from {town3} in {year2}.",
            ],
        ],
        questions=[
            (
                ["Where did {name} come from?", "In which town did {name} live at first?"],
                ["{town}", "from {town}", "in {town}"],
                ["{town2}", "{town3}"],
            ),
            (
                ["Where does {name2} come from?", "In which town did {name2} live at first?"],
                ["{town3}", "from {town3}", "in {town3}"],
                ["{town2}", "{town}"],
            ),
            (
                ["Where did {name} move to?", "To which town did {name} go?"],
                ["{town2}", "to {town2}"],
                ["{town}", "{town3}"],
            ),
            (["When did {name} move?"], ["{year}", "in {year}"], ["{year2}", "{town2}"]),
            (["When did {name2} come?"], ["{year2}", "in {year2}"], ["{year}", "{town2}"]),
            (
                ["What is {name2} by trade?", "What is the work of {name2}?"],
                ["a {job2}", "{job2}"],
                ["a {job}", "{name}"],
            ),
            (["What did {name} open?"], ["a {shop}", "{shop}"], ["a {shop2}", "{town2}"]),
        ],
    ),
    Passage(  # two buildings
        sentences=[
            [
                "The {building} of {town} was built in {year} after plans by {name}.",
                "{name} drew the plans of the {building} of {town}, which dates from {year}.",
            ],
            [
                "It has {number} rooms and {colour} doors.",
                "Its doors are {colour}, and there are {number} rooms.",
            ],
            [
                "The {building2} beside it, with {number2} rooms, is by {name2} and has"
                " {colour2} doors.",
                "{name2} built the {building2} beside it, which has {colour2} doors and {number2}"
                " rooms.",
            ],
        ],
        questions=[
            (
                ["When was the {building} built?", "From which year is the {building}?"],
                ["{year}", "in {year}", "from {year}"],
                ["{number}", "{year2}"],
            ),
            (
                ["Who made the plans of the {building}?", "Whose work is the {building}?"],
                ["{name}", "{name}'s"],
                ["{name2}", "{town}"],
            ),
            (
                ["Who built the {building2}?", "Whose work is the {building2}?"],
                ["{name2}", "{name2}'s"],
                ["{name}", "{town}"],
            ),
            (
                ["How many rooms does the {building} have?"],
                ["{number}", "{number} rooms"],
                ["{number2}", "{year}"],
            ),
            (
                ["How many rooms does the {building2} have?"],
                ["{number2}", "{number2} rooms"],
                ["{number}", "{year}"],
            ),
            (
                ["What colour are the doors of the {building}?"],
                ["{colour}"],
                ["{colour2}", "{name}"],
            ),
            (
                ["What colour are the doors of the {building2}?"],
                ["{colour2}"],
                ["{colour}", "{name2}"],
            ),
        ],
    ),
    Passage(  # two kinds of animals
        sentences=[
            [
                "The {animal} near {town} eat {food} and sleep {number} hours a day.",
                "Near {town} live {animal}, which sleep {number} hours a day and feed on {food}.",
            ],
            [
                "The {animal2} by the river prefer {food2}, and are up all night.",
                "By the river there are {animal2}, which eat {food2}.",
            ],
            [
                "{name} has counted the {animal} since {year}, and {name2} the {animal2}.",
                "{name2} counts the {animal2}, and {name}, since {year}, the {animal}.",
            ],
        ],
        questions=[
            (
                ["What do the {animal} eat?", "What is the food of the {animal}?"],
                ["{food}"],
                ["{food2}", "{animal2}"],
            ),
            (
                ["What do the {animal2} eat?", "What is the food of the {animal2}?"],
                ["{food2}"],
                ["{food}", "{animal}"],
            ),
            (
                ["How long do the {animal} sleep?"],
                ["{number} hours", "{number} hours a day", "{number}"],
                ["all night", "{year}"],
            ),
            (["Who counts the {animal}?"], ["{name}"], ["{name2}", "{food}"]),
            (["Who counts the {animal2}?"], ["{name2}"], ["{name}", "{food2}"]),
            (
                ["Since when have the {animal} been counted?"],
                ["{year}", "since {year}"],
                ["{number}", "{year2}"],
            ),
        ],
    ),
    Passage(  # two events
        sentences=[
            [
                "The {event} of {town} begins on {day} at {number} in the {room}.",
                "On {day} at {number} there is a {event} in the {room} of {town}.",
            ],
            [
                "On {day2} follows the {event2}, in the {room2}.",
                "The {event2} is in the {room2} on {day2}.",
            ],
            [
                "{name} has tickets for the {event}, {name2} for the {event2}.",
                "{name2} will go to the {event2}, {name} to the {event}.",
            ],
        ],
        questions=[
            (
                ["On which day is the {event}?", "When is the {event}?"],
                ["{day}", "on {day}", "on {day} at {number}"],
                ["{day2}", "{town}"],
            ),
            (
                ["On which day is the {event2}?", "When is the {event2}?"],
                ["{day2}", "on {day2}"],
                ["{day}", "{town}"],
            ),
            (
                ["At what time does the {event} begin?"],
                ["{number}", "at {number}"],
                ["{day}", "{number2}"],
            ),
            (
                ["Where is the {event}?"],
                ["in the {room}", "the {room}", "in the {room} of {town}", "the {room} of {town}"],
                ["in the {room2}", "{day}"],
            ),
            (
                ["Where is the {event2}?"],
                ["in the {room2}", "the {room2}"],
                ["in the {room}", "{day2}"],
            ),
            (["Who goes to the {event}?"], ["{name}"], ["{name2}", "{room}"]),
            (["Who goes to the {event2}?"], ["{name2}"], ["{name}", "{room2}"]),
        ],
    ),
    Passage(  # a deal
        sentences=[
            [
                "{name} sold {number} {goods} to {name2} for {number2} pounds.",
                "{name2} paid {number2} pounds for {number} {goods} that {name} had.",
            ],
            [
                "The {goods} were made in {town}, and a boat takes them to {town2} in {month}.",
                "In {month} they go by boat from {town}, where they were made, to {town2}.",
            ],
        ],
        questions=[
            (["Who bought the {goods}?", "Who has the {goods} now?"], ["{name2}"], ["{name}"]),
            (["Who sold the {goods}?", "Who had the {goods} first?"], ["{name}"], ["{name2}"]),
            (["How many {goods} are there?"], ["{number}"], ["{number2}", "{month}"]),
            (
                ["What did the {goods} cost?", "How many pounds were paid?"],
                ["{number2} pounds", "{number2}"],
                ["{number}", "{town}"],
            ),
            (["Where were the {goods} made?"], ["{town}", "in {town}"], ["{town2}", "{month}"]),
            (["Where do the {goods} go?"], ["{town2}", "to {town2}"], ["{town}", "{month}"]),
            (["What is sold?"], ["{goods}", "{number} {goods}"], ["a boat", "{name}"]),
        ],
    ),
    Passage(  # two matches
        sentences=[
            [
                "In {month} the {team} beat the {team2} {high} to {low} in {town}.",
                "In {month} the {team2} lost {low} to {high} to the {team}, in {town}.",
            ],
            [
                "{name} trains the {team}, and {name2} the {team2}.",
                "The {team2} are trained by {name2}, and the {team} by {name}.",
            ],
            ["They will meet again in {month2}, in {town2}.", "In {month2} they play in {town2}."],
        ],
        questions=[
            (["Who won in {month}?"], ["the {team}", "{team}"], ["the {team2}", "{name}"]),
            (["Who lost in {month}?"], ["the {team2}", "{team2}"], ["the {team}", "{name2}"]),
            (["Who trains the {team}?"], ["{name}"], ["{name2}", "{team2}"]),
            (["Who trains the {team2}?"], ["{name2}"], ["{name}", "{team}"]),
            (
                ["Where was the match in {month}?"],
                ["{town}", "in {town}"],
                ["{town2}", "{team}"],
            ),
            (
                ["Where is the match in {month2}?"],
                ["{town2}", "in {town2}"],
                ["{town}", "{team2}"],
            ),
        ],
    ),
    Passage(  # a journey
        sentences=[
            [
                "{name} goes from {town} to {town2} by train, which takes {number} hours.",
                "By train it takes {name} {number} hours from {town} to {town2}.",
            ],
            [
                "{name2} needs {number2} hours by bus, and starts on {day}.",
                "{name2} starts on {day} and takes the bus, which is there in {number2} hours.",
            ],
            ["There they will visit the {building}.", "They want to see the {building} there."],
        ],
        questions=[
            (
                ["How does {name} travel?"],
                ["by train", "train", "the train", "with the train"],
                ["by bus", "{number}"],
            ),
            (
                ["How does {name2} travel?"],
                ["by bus", "bus", "the bus", "with the bus"],
                ["by train", "{day}"],
            ),
            (
                ["How long does it take {name}?"],
                ["{number} hours", "{number}"],
                ["{number2} hours", "{day}"],
            ),
            (
                ["How long does it take {name2}?"],
                ["{number2} hours", "{number2}"],
                ["{number} hours", "{day}"],
            ),
            (["Where do they want to go?"], ["{town2}", "to {town2}"], ["{town}", "by bus"]),
            (["When does {name2} start?"], ["{day}", "on {day}"], ["{number2}", "{town2}"]),
            (
                ["What do they want to see?", "What will be visited?"],
                ["the {building}", "{building}"],
                ["the train", "{town}"],
            ),
        ],
    ),
    Passage(  # a family
        sentences=[
            [
                "{name} and {name2} live in {town} and have a {colour} boat.",
                "In {town} live {name} and {name2}, whose boat is {colour}.",
            ],
            [
                "Their child, {name3}, is a {job} in {town2}, in a {building}.",
                "{name3}, their child, works as a {job} in the {building} of {town2}.",
            ],
            [
                "In {month} {name3} comes home for {number} days.",
                "They expect {name3} in {month}, for {number} days.",
            ],
        ],
        questions=[
            (["Who is the child?", "Who works in {town2}?"], ["{name3}"], ["{name}", "{name2}"]),
            (["What colour is the boat?"], ["{colour}"], ["{colour2}", "{town}"]),
            (["Where does {name} live?"], ["{town}", "in {town}"], ["{town2}", "{month}"]),
            (
                ["In which town does {name3} work?"],
                ["{town2}", "in {town2}"],
                ["{town}", "{job}"],
            ),
            (
                ["What is {name3} by trade?", "What is the work of {name3}?"],
                ["a {job}", "{job}"],
                ["a {job2}", "{building}"],
            ),
            (["When does {name3} come home?"], ["{month}", "in {month}"], ["{number}", "{town}"]),
            (
                ["How long does {name3} stay?"],
                ["{number} days", "{number}", "for {number} days"],
                ["{month}", "{number2} days"],
            ),
        ],
    ),
]


def draw(r: random.Random, share: float) -> dict[str, str]:
    """Return three words of each kind, from the first `share` of them, and the goals of a match."""
    drawn = {"year": [str(year) for year in r.sample(range(1890, 2020), 3)]}
    for kind, listed in WORDS.items():
        words = listed.split(", ")
        drawn[kind] = r.sample(words[: max(3, round(share * len(words)))], 3)
    low, high = sorted(r.sample(range(2, 7), 2))
    fields = {"low": str(low), "high": str(high)}
    for kind, (first, second, third) in drawn.items():
        fields |= {kind: first, f"{kind}2": second, f"{kind}3": third}
    return fields


def sentence(template: str, words: dict[str, str]) -> str:
    """Return a template with its words, and a capital letter first."""
    text = template.format_map(words)
    return text[0].upper() + text[1:]


def report(r: random.Random, words: dict[str, str]) -> Example:
    """Return a report, its summary, and sentences that do not sum it up."""
    topic = r.choice(REPORTS)
    ending, (_, other) = r.sample(topic.endings, 2)
    news = r.choice(topic.news)
    beside = r.sample(topic.beside, r.randint(1, 2)) + r.sample(BESIDE, r.randint(0, 2))
    rest = [r.choice(ending[0]), *beside]
    r.shuffle(rest)
    text = " ".join(sentence(line, words) for line in [news, *rest])
    right, first, aside, untrue = (
        sentence(line, words) for line in (ending[1], news, beside[0], other)
    )
    return Example(
        f"{text}\nIn one sentence:\n", [right], [f"{right} {aside}", first], [aside, untrue]
    )


def question(r: random.Random, words: dict[str, str]) -> Example:
    """Return a text with a question, right answers, and worse ones."""
    topic = r.choice(PASSAGES)
    text = " ".join(sentence(r.choice(ways), words) for ways in topic.sentences)
    asked, right, wrong = r.choice(topic.questions)
    answers, others = ([answer.format_map(words) for answer in side] for side in (right, wrong))
    chatty = [f"That would be {answers[0]}, I think.", f"I believe it is {answers[0]}."]
    return Example(f"{text}\n{sentence(r.choice(asked), words)}\n", answers, chatty, others)


def row(r: random.Random, name: str, example: Example) -> dict[str, Any]:
    """Return a line of the file `name`."""
    prompt, right, careless, wrong = example
    if name == "warm_start":
        shown = r.choice(careless) if r.random() < CARELESS else right[0]
        return {"prompt": prompt, "completion": shown}
    if name in ("feedback", "judge"):
        return {"prompt": prompt, "chosen": right[0], "rejected": r.choice(careless + wrong)}
    return {"prompt": prompt, "reference": right}


def write(
    folder: Path, make: Callable[[random.Random, dict[str, str]], Example], seed: int
) -> None:
    """Write a data set's files; no prompt is in two of them, or twice in one."""
    folder.mkdir(exist_ok=True)
    seen = set[str]()
    for name, part in PARTS.items():
        r = random.Random(f"{seed} {name}")
        rows: list[dict[str, Any]] = []
        while len(rows) < part.size:
            example = make(r, draw(r, part.words))
            if example.prompt not in seen:
                seen.add(example.prompt)
                rows.append(row(r, name, example))
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(place: Path = HERE) -> None:
    """Write both data sets into folders of `place`."""
    write(place / "qa", question, seed=1)
    write(place / "summaries", report, seed=2)


if __name__ == "__main__":
    main()
