"""How a text that nobody can vouch for is shown: all of it, and nothing of it obeyed.

Markup is escaped by the templates; here the characters that a reader would not see are written out.
"""

import re

from markupsafe import Markup, escape

from reward_models.feedback.unseen import is_unseen

# Names, not control pictures (␛): many systems have no font with those.
_CONTROLS = {0x00: "NUL", 0x07: "BEL", 0x08: "BS", 0x0D: "CR", 0x1B: "ESC", 0x7F: "DEL"}
_KANA = re.compile("[\u3040-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7af]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")


def visible(text: str) -> Markup:
    """The text as markup, with control characters, bidi overrides and the like made visible.

    Line feeds and tabs stay as they are; ESC becomes ⟨ESC⟩, a right-to-left override ⟨U+202E⟩. A
    carriage return before a line feed is dropped.
    """
    shown = [_shown(character) for character in text.replace("\r\n", "\n")]
    return Markup("").join(shown)


def language(text: str) -> str:
    """The language tag by which a browser picks the glyphs of Han characters; else empty."""
    if _KANA.search(text):
        return "ja"
    if _HANGUL.search(text):
        return "ko"
    return "zh" if _HAN.search(text) else ""


def _shown(character: str) -> Markup:
    if not is_unseen(character):
        return escape(character)
    code = ord(character)
    name = _CONTROLS.get(code, f"U+{code:04X}")
    return Markup('<span class="control">⟨{}⟩</span>').format(name)
