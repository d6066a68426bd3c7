"""English sentences rated by people, with every single rating; parsed from the authors' archive.

Splitting into parts for training and testing is left to the caller.

Source: Hutto & Gilbert 2014, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text, ICWSM.
"""

import html
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reward_models.assets import human_ratings_archive
from reward_models.evaluation import pearson
from reward_models.feedback.records import Rating

SCALE = (-4.0, 4.0)
"""From extremely negative to extremely positive."""

Source = Literal["movies", "tweets", "products", "news"]

_FILES: dict[Source, str] = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class RatedText:
    """A text and what people said about it.

    Args:
        text: the sentence, or the tweet.
        ratings: one whole number per person, within `SCALE`. The same place in two texts' ratings
            does not mean the same person.
        source: the collection it comes from.
    """

    text: str
    ratings: tuple[int, ...]
    source: str

    @property
    def mean(self) -> float:
        """Mean rating, on `SCALE`."""
        return sum(self.ratings) / len(self.ratings)

    def as_feedback(self) -> Rating:
        """The mean rating as a record that a reward model can be fitted on."""
        return Rating("", self.text, self.mean, SCALE, origin=f"human_ratings/{self.source}")


def load_human_ratings(
    sources: Sequence[Source] = ("movies",), archive: str | os.PathLike[str] | None = None
) -> list[RatedText]:
    """Read rated texts, in the order of the sources and of their files, each text once.

    Texts that differ in case or blanks only count as the same; the first is kept. The ratings are
    the raw ones: the means printed beside the texts disagree with them for 199 tweets.

    Args:
        sources: any of movies (10,603 sentences of reviews), tweets, products (sentences of
            customers' reviews) and news (sentences of editorials).
        archive: the authors' archive; fetched on first use if not given.

    Raises:
        AssetError: if the archive is not there and cannot be fetched.
        ValueError: if a source is unknown, or the archive's two files on it disagree.
    """
    for source in sources:
        if source not in _FILES:
            raise ValueError(f"expected sources out of {', '.join(_FILES)}, got {source!r}")
    seen: set[str] = set()
    rated = []
    with tarfile.open(archive or human_ratings_archive()) as tar:
        for source in sources:
            for item in _read_source(tar, source):
                key = " ".join(item.text.casefold().split())
                if key not in seen:
                    seen.add(key)
                    rated.append(item)
    return rated


def split_half_correlation(items: Iterable[RatedText], seed: int = 0, repeats: int = 20) -> float:
    """How well one half of the raters predicts the other half: mean correlation of their means.

    It bounds what a model can be expected to reach. Each text's ratings are halved at random.

    Args:
        items: texts with at least two ratings each.
        seed: of the random halves.
        repeats: number of random halvings to average.
    """
    rng = np.random.default_rng(seed)
    ratings = [np.array(item.ratings) for item in items]
    correlations = []
    for _ in range(repeats):
        shuffled = [rng.permutation(row) for row in ratings]
        halves = [(row[: len(row) // 2].mean(), row[len(row) // 2 :].mean()) for row in shuffled]
        first, second = np.array(halves).T
        correlations.append(pearson(first, second))
    return float(np.mean(correlations))


def _read_source(tar: tarfile.TarFile, source: Source) -> list[RatedText]:
    texts = {fields[0]: fields[2] for fields in _rows(tar, source, "GroundTruth", columns=3)}
    ratings = {
        fields[0]: tuple(json.loads(fields[3]))
        for fields in _rows(tar, source, "anonDataRatings", columns=4)
    }
    if texts.keys() != ratings.keys():
        differing = sorted(texts.keys() ^ ratings.keys())
        raise ValueError(
            f"expected the same texts in both files on {source}, got {len(differing)} that are in "
            f"one only, {differing[0]!r} first"
        )
    return [RatedText(_unescape(text), ratings[key], source) for key, text in texts.items()]


def _rows(tar: tarfile.TarFile, source: Source, kind: str, columns: int) -> list[list[str]]:
    name = f"hutto_ICWSM_2014/{_FILES[source]}_{kind}.txt"
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"expected a file {name} in the archive, got something else")
    lines = file.read().decode("utf-8-sig").split("\n")
    rows = [line.strip("\r").split("\t") for line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise ValueError(f"{name}, line {number}: expected {columns} columns, got {len(row)}")
    return rows


def _unescape(text: str) -> str:
    """Undo HTML entities, twice: the editorials hold some that were escaped two times."""
    return html.unescape(html.unescape(text)).strip()
