"""Parsing of the human ratings, on a small archive in the authors' format."""

import io
import tarfile
from pathlib import Path

import pytest

from reward_models.human_ratings import RatedText, load_human_ratings, split_half_correlation

TEXTS = "1\t0.5\tTom &amp;amp; Ana\r\n2\t9.9\tA \x85 caf\u00e9 &lt;3\r\n3\t0\ttom & ANA \r\n"
RATINGS = "\ufeff2\t0\t1\t[4, 3, -4]\r\n1\t0\t1\t[1, 0]\r\n3\t0\t1\t[-1]"


def archive(folder: Path, texts: str = TEXTS, ratings: str = RATINGS) -> Path:
    path = folder / "ratings.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for kind, content in (("GroundTruth", texts), ("anonDataRatings", ratings)):
            data = content.encode()
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/movieReviewSnippets_{kind}.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_texts_and_raw_ratings_are_joined_by_id(tmp_path: Path) -> None:
    items = load_human_ratings(("movies",), archive(tmp_path))
    assert items == [
        RatedText("Tom & Ana", (1, 0), "movies"),
        RatedText("A \x85 café <3", (4, 3, -4), "movies"),
    ]
    assert items[1].mean == 1.0  # of the ratings, not the 9.9 that is printed beside the text
    record = items[1].as_feedback()
    assert (record.prompt, record.rating, record.scale) == ("", 1.0, (-4.0, 4.0))


def test_files_that_disagree_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same texts in both files on movies, got 1 .* '3' first"):
        load_human_ratings(("movies",), archive(tmp_path, ratings=RATINGS.rsplit("\n", 1)[0]))
    with pytest.raises(ValueError, match=r"GroundTruth.txt, line 2: expected 3 columns, got 1"):
        load_human_ratings(("movies",), archive(tmp_path, texts=TEXTS.replace("2\t9.9\t", "")))


def test_unknown_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected sources out of movies, .* got 'books'"):
        load_human_ratings(("books",), archive(tmp_path))  # type: ignore[arg-type]


def test_split_half_correlation_of_people_who_agree() -> None:
    agree = [RatedText(str(i), (i, i, i, i), "movies") for i in range(-4, 5)]
    assert split_half_correlation(agree) == pytest.approx(1)


@pytest.mark.network
def test_the_real_archive() -> None:
    """10,605 sentences of which 2 come twice; two halves of the raters agree at r = 0.97."""
    movies = load_human_ratings()
    assert len(movies) == 10_603
    assert movies[0].mean == pytest.approx(2.26666666667)
    assert split_half_correlation(movies, repeats=2) == pytest.approx(0.972, abs=0.002)
    assert len(load_human_ratings(("movies", "tweets", "products", "news"))) == 23_554
