"""Chinese reviews of hotels, shops and their goods, each good or bad; read from the asset's files.

Splitting into parts for training and testing is left to the caller.
"""

from pathlib import Path

from reward_models.assets import chinese_reviews
from reward_models.feedback.records import Label

LONGEST = 100
"""Characters of the longest review that is taken: half of them are below 50."""


def load_chinese_reviews(files: tuple[Path, Path] | None = None) -> list[Label]:
    """Read the reviews, the good ones first, each text once.

    Texts that are in both files, and those longer than `LONGEST`, are left out.

    Args:
        files: of the good and the bad ones, a review per line; fetched on first use if not given.

    Raises:
        AssetError: if they are not there and cannot be fetched.
    """
    good, bad = (
        dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").split("\n"))
        for file in files or chinese_reviews()
    )
    return [
        Label("", text, is_good, origin="chinese_reviews")
        for texts, others, is_good in ((good, bad, True), (bad, good, False))
        for text in texts
        if text not in others and 0 < len(text) <= LONGEST
    ]
