"""NFC as the library `tokenizers` has it, whose tables are those of Unicode 9 (2016).

NFC sorts the marks on a letter by class and joins what has one character. Python's tables are
newer: they also sort marks of later years and join letters of later scripts. To the library these
characters are letters without marks. So a text is cut at them, and each part is normalised alone.
"""

import re
import unicodedata

_LATER_MARKS = (
    "\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0"
    "\u1df6-\u1dfa\ua82c\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab\U00010eac"
    "\U00010ecb-\U00010ecf\U00010ef0-\U00010efb\U00010efd-\U00010eff\U00010f46-\U00010f50"
    "\U00010f82-\U00010f85\U00011070\U0001133b\U0001145e\U00011839\U0001183a\U0001193d\U0001193e"
    "\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42\U00011d44\U00011d45\U00011d97"
    "\U00011f41\U00011f42\U00016ff0\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d252\U0001d25b"
    "\U0001d25c\U0001d25f\U0001d280\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae"
    "\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee"
    "\U0001e6ef\U0001e6f5"
)
# Dives Akuru, Todhri, Tulu-Tigalari, Gurung Khema, Kirat Rai: scripts with letters that join.
_LATER_SCRIPTS = (
    "\U00011935\U000105c0-\U000105ff\U00011380-\U000113ff\U00016100-\U0001613f\U00016d40-\U00016d7f"
)
_LATER = re.compile(f"([{_LATER_MARKS}{_LATER_SCRIPTS}])")


def to_nfc(text: str) -> str:
    """The text with its marks sorted and joined to their letters."""
    if unicodedata.is_normalized("NFC", text):
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _LATER.split(text))
