"""Which characters of a text a reader would not see, or would see something else for.

How they are written out is up to the page and to the terminal.
"""

import unicodedata

# Format characters (category Cf) with a place in ordinary text: joiners, the soft hyphen, and the
# Arabic, Syriac and Kaithi signs that are drawn.
_ORDINARY = frozenset("\u00ad\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f") | {
    "\u0890",
    "\u0891",
    "\u08e2",
    "\U000110bd",
    "\U000110cd",
}
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def is_unseen(character: str) -> bool:
    """Whether it is a control character, bidi override or the like; line feed and tab are not."""
    return (
        character not in "\n\t"
        and character not in _ORDINARY
        and unicodedata.category(character) in _HIDDEN_CATEGORIES
    )
