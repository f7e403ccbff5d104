"""What a completion answers: numbers, letters, labels, boxed expressions. Nothing here ever raises on a text.

The functions whose names begin with ``paper_`` follow the rules of the authors' evaluators, oddities included;
``response_label`` that of LLM-Adapters.
"""

from __future__ import annotations

import math
import re

#: Numbers count as equal within this. Source: the authors' evaluator for mathematics.
TOLERANCE = 1e-3

#: The phrase that every clean target ends in, with or without a colon, as its two training sets have it.
ANSWER_IS = re.compile(r"\banswer\s+is\b:?", re.IGNORECASE)

NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]])[-\u2212])?  # not where something stands before it to be subtracted from
    [$€£]?(?P<inner>(?<=[$€£])[-\u2212])?
    (?<!\w)  # neither answer1 nor the 2 of 12
    (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    (?P<exponent>[eE][-+]?\d{1,3}(?!\w))?
    (?:\s?/\s?(?P<below>\d+(?:\.\d+)?))?
    """,
    re.VERBOSE | re.ASCII,
)
PAPER_NUMBER = re.compile(r"-?\d+\.?\d*")


def numbers(text: str) -> list[float]:
    """All numbers of a text: 1,234 and $5.00 and -3 and 1/2 and .5 and 1e9; a percent sign is not read."""
    return [value for value in map(_value, NUMBER.finditer(text)) if math.isfinite(value)]


def _value(match: re.Match[str]) -> float:
    above = float(match["digits"].replace(",", "") + (match["exponent"] or ""))
    below = float(match["below"] or 1)
    value = above / below if below else math.nan
    return -value if match["sign"] or match["inner"] else value


def last_number(text: str) -> float | None:
    """The last number anywhere, or None."""
    return next(reversed(numbers(text)), None)


def after_phrase(text: str) -> str | None:
    """What follows the last "answer is", or None without it."""
    pieces = ANSWER_IS.split(text)
    return pieces[-1] if len(pieces) > 1 else None


def number_after_phrase(text: str) -> float | None:
    """The first number after the last "answer is", or None."""
    rest = after_phrase(text)
    return None if rest is None else next(iter(numbers(rest)), None)


def paper_last_number(text: str) -> float | None:
    """The last number as the authors read it: commas away, a minus always a sign, no fraction, no exponent."""
    found = PAPER_NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def paper_number_after(text: str, phrase: str) -> float | None:
    """The first number after the first occurrence of a phrase, up to its second; without one the last anywhere."""
    parts = text.replace(",", "").split(phrase)
    found = PAPER_NUMBER.findall(parts[1]) if len(parts) > 1 else []
    return float(found[0]) if found else paper_last_number(text)


def is_number(text: str) -> bool:
    """A plain finite number, so that :func:`is_close` can compare with it."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_close(value: float | None, gold: str) -> bool:
    """A number was found, and it is the gold one within :data:`TOLERANCE`."""
    return value is not None and abs(value - float(gold)) <= TOLERANCE


def paper_letter(text: str) -> str | None:
    """The first capital A to E anywhere, even within a word."""
    found = re.search("[A-E]", text)
    return found[0] if found else None


def letter_after_phrase(text: str) -> str | None:
    """The first A to E that stands alone after the last "answer is", or None."""
    rest = after_phrase(text)
    found = re.search(r"\b[A-E]\b", rest) if rest is not None else None
    return found[0] if found else None


def last_letter(text: str) -> str | None:
    """The last A to E that stands alone, or None."""
    return next(reversed(re.findall(r"\b[A-E]\b", text)), None)


def label(text: str, pattern: str) -> str | None:
    """The first label of a text, as a whole word, or None.

    Args:
        text: A completion.
        pattern: Labels as a regular expression, such as ``answer[1-5]``.
    """
    found = re.search(rf"\b(?:{pattern})\b", text)
    return found[0] if found else None


def paper_label(text: str, pattern: str) -> str | None:
    """The first label after the last "the correct answer is", or of the whole text without it; also within words."""
    found = re.search(pattern, text.split("the correct answer is")[-1])
    return found[0] if found else None


def response_label(text: str, pattern: str) -> str | None:
    """The first label of what stands before another heading of a response; also within words."""
    found = re.search(pattern, text.split("### Response:")[0])
    return found[0] if found else None


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}``, ``\fbox{...}`` or ``\boxed 5`` holds, or None if there is none or it is open."""
    starts = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    if not starts:
        return None
    rest = text[starts[-1].end() :]
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$]+", rest)
        return bare[0] if bare else None
    depth = 0
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:position]
    return None
