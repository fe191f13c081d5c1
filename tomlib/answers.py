"""Reading an answer: the choice or contribution, its motivation, and what became of it.

Answers are asked for as JSON with a fixed opening, but models answer loosely. A choice is read
where the model commits itself: in the field asked for, at the very beginning, in a sentence such as
"I choose C", or as the last line. Everything else is counted as what it is, never guessed:

>>> read('{"choice": "C", "motivation": "We both gain."}', "choice+motivation")
Answer(choice='C', outcome='ok', motivation='We both gain.')
>>> read("I choose **D** because it is safe.", "choice").choice
'D'
>>> read("C and D both have their merits.", "choice").outcome
'unparsed'
>>> read("As an AI language model, I do not have preferences.", "choice").outcome
'refused'

All patterns are bounded, so that reading takes time linear in the length of the text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

GameType = Literal["two_player", "public_goods"]
Finish = Literal["stop", "length"]
Outcome = Literal["ok", "unparsed", "refused", "truncated"]

OUTCOMES: tuple[Outcome, ...] = ("ok", "unparsed", "refused", "truncated")


@dataclass(frozen=True)
class Answer:
    """What a text says.

    Attributes:
        choice: `"C"` or `"D"`, or a whole contribution; None unless the outcome is `ok`.
        outcome: `ok`; `refused` (declines to choose); `truncated` (cut off before the choice);
            `unparsed` (no choice, or several).
        motivation: The reasons given, where the answer form asks for them and the outcome is `ok`.
    """

    choice: str | int | None
    outcome: Outcome
    motivation: str | None = None


def read(
    text: str,
    answer: str,
    game: GameType = "two_player",
    finish: str = "stop",
    endowment: int = 10,
) -> Answer:
    """Read a completion with its opening put back; never raises, whatever the text.

    Where the choice comes first, the first committed choice counts; with `reasoning+choice` the
    last one, and letters within the reasoning do not count.

    Args:
        text: Opening and completion, as one text.
        answer: `choice`, `choice+motivation` or `reasoning+choice`.
        game: `two_player` reads a letter, `public_goods` a whole number of 0 to `endowment`.
        finish: `length` when the completion was cut off at its token limit.
        endowment: The largest contribution, in dollars.

    >>> read('{"contribution": 5, "motivation": "Half."}', "choice+motivation", "public_goods")
    Answer(choice=5, outcome='ok', motivation='Half.')
    >>> read('{"reasoning": "C looks kind, but', "reasoning+choice", finish="length").outcome
    'truncated'
    """
    found = _find(text, answer, game)
    cut = finish == "length"
    if found is not None and found.token is not None and not (cut and found.open):
        choice = _value(found.token)
        if isinstance(choice, str) or choice <= endowment:
            return Answer(choice, "ok", _motivation(text, answer, found))
    elif _REFUSAL.search(text, 0, _VALUE if cut else len(text)):
        return Answer(None, "refused")
    elif cut and (found is None or found.open):
        return Answer(None, "truncated")
    return Answer(None, "unparsed")


def decided(text: str, answer: str, game: GameType = "two_player") -> bool:
    """Whether no further text can change what `read` makes of the choice.

    A sampler that wants only the choice may stop here: the distribution of choices stays the same.
    Costs a few microseconds for an opening and a few tokens.

    >>> decided('{"choice": "C', "choice"), decided('{"choice": "C"', "choice")
    (False, True)
    >>> decided('{"contribution": 1', "choice", "public_goods")
    False
    >>> decided('{"contribution": 1}', "choice", "public_goods")
    True
    """
    found = _find(text, answer, game)
    return found is not None and found.settled


# -- finding the choice ---------------------------------------------------------------------------


class _Found(NamedTuple):
    """Where a text commits itself; token None: it had its chance and names no choice."""

    token: str | None
    start: int
    end: int
    settled: bool  # no continuation can change it
    open: bool  # the text ends before the choice is complete


_WINDOW = 40  # characters after a choice that may still make it "C or D" or "5 to 7"
_VALUE = 400  # characters of a field's value that are looked at

_MARKS = r"[\s\"'“”‘’*_`(\[<]"
_NOUN = r"(?i:(?:the\s|my\s)?(?:option|strategy|action|choice|answer|letter)\s{1,3})?"
_AMOUNT = r"(?i:all\s(?:of\s)?|exactly\s|just\s|only\s|the\sfull\s|a\stotal\sof\s|my\s){0,2}\$?\s?"
_LETTER = r"(?P<token>[CD])(?![^\W_]|['’][^\W\d_])"
_WORD = r"(?P<token>(?i:[CD]|cooperate|cooperation|defect|defection))(?![^\W_]|['’][^\W\d_])"
_NUMBER = r"(?P<token>\d{1,9})(?:\.0{1,2})?(?![^\W_]|[.,]\d|\s?%)"

_SUBJECT = (
    r"\b(?:I|(?i:we))(?:['’](?:ll|d|m|ve))?\s{1,3}"
    r"(?i:(?:would|will|shall|should|must|am|have|do|going|decided|to|therefore|thus|hence|then|so"
    r"|now|also|rather|instead|\w{1,15}ly)\s{1,3}){0,5}"
)
_CHOOSE = (
    r"(?i:cho+se|chosen|choosing|pick|picked|picking|select|selected|selecting|adopt|adopting|play"
    r"|playing|prefer|recommend|go(?:ing)?\s(?:with|for)|opt(?:ing|ed)?\sfor|settled?\son"
    r"|commit\sto|stick\swith)\s{1,3}"
)
_GIVE = (
    r"(?i:contribut(?:e|ing)|giv(?:e|ing)|put(?:ting)?(?:\sin)?|pay|add|donate|invest|choose)"
    r"\s{1,3}"
)
_BEST = r"(?:my|final|best|optimal|rational|dominant|safest|safer|better|preferred)\s{1,3}"
_IS = r"(?:\s{1,3}(?:is|would\sbe|will\sbe)\s{1,3}(?:to\s(?:choose|play|adopt|pick)\s{1,3})?"
_COLON = r"[\s*_\"']{0,4}:\s{0,3})"


class _Grammar(NamedTuple):
    """The patterns of one type of game."""

    field: re.Pattern[str]  # the key of the field asked for
    first: re.Pattern[str]  # a choice at the beginning of an answer
    value: re.Pattern[str]  # a choice at the beginning of the field's value
    said: re.Pattern[str]  # a key of the field, or a sentence that commits
    last: re.Pattern[str]  # a line that holds the choice alone
    other: re.Pattern[str]  # a second choice right after the first


def _grammar(key: str, token: str, value: str, sentence: str, lead: str) -> _Grammar:
    field = rf"[\"'“”‘’*_`]{{0,3}}(?<![^\W_])(?i:{key})[\"'“”‘’*_`]{{0,3}}\s{{0,3}}[:=]"
    close = (
        r"[\"'“”‘’*_`)\]>]{0,4}(?:$|[.,:;!\n\r)}–—-]|\s{1,3}(?i:because|since|as|so|for|dollars)\b)"
    )
    return _Grammar(
        re.compile(field),
        re.compile(rf"[\s{{]{{0,8}}{_MARKS}{{0,8}}{lead}{_MARKS}{{0,4}}{token}(?={close})"),
        re.compile(rf"{_MARKS}{{0,8}}{lead}{_MARKS}{{0,4}}{value}"),
        re.compile(rf"(?P<field>{field})|{sentence}"),
        re.compile(rf"{_MARKS}{{0,8}}{lead}{_MARKS}{{0,4}}{token}[.!\"'“”‘’*_`)\]>}}\s]{{0,8}}$"),
        re.compile(
            rf"[ \t\"'“”‘’*_`)\]>]{{0,4}}(?i:or\b|and\b|nor\b|to\b|vs\b|versus\b|[/|,&+–—-])"
            rf"[ \t]{{0,3}}{_MARKS}{{0,4}}{lead}{_MARKS}{{0,4}}{value}"
        ),
    )


_GRAMMARS: dict[str, _Grammar] = {
    "two_player": _grammar(
        "choice",
        _LETTER,
        _WORD,
        rf"(?:{_SUBJECT}{_CHOOSE}"
        rf"|\b(?i:(?:{_BEST}(?:strategy|option|action|move|response)|choice|answer|decision){_IS}"
        rf"|{_COLON}))"
        rf"{_NOUN}{_MARKS}{{0,4}}{_LETTER}",
        _NOUN,
    ),
    "public_goods": _grammar(
        "contribution",
        _NUMBER,
        _NUMBER,
        rf"(?:{_SUBJECT}{_GIVE}|\b(?i:(?:contribution|choice|answer|decision){_IS}|{_COLON}))"
        rf"{_MARKS}{{0,4}}{_AMOUNT}{_MARKS}{{0,4}}{_NUMBER}",
        _AMOUNT,
    ),
}

# What makes "I choose C" no commitment: a condition, or somebody else's choice.
_NOT_MINE = re.compile(
    r"(?i:\b(?:if|when|whether|unless|should|suppose|supposing|assuming|while|although)\s{1,3}"
    r"|\b(?:coplayer|player|opponent|other|their|his|her|your)(?:['’]?s?['’]?)\s{1,3}"
    r"(?:\w{1,15}\s{1,3}){0,2})$"
)
_VOID = re.compile(r"[\W_]*+(?:json)?[\W_]*+")
_REASONING = re.compile(r"[\"'“`](?i:reasoning)[\"'”`]\s{0,3}:")
_OUTSIDE = re.compile(r"[\"'”}]\s*,?\s*$")
_CLOSES = re.compile(r"[\"'”*`]{0,3}\s{0,20}\}")
_QUOTE = re.compile(r"\s{0,20}[\"'“`]?")
_UNTIL = {
    quote: re.compile(rf"[^{end}}}\n]{{0,{_VALUE}}}")
    for quote, end in (('"', '"'), ("'", "'"), ("“", "”"), ("`", "`"))
}
_CANNOT = r"I\s(?:cannot|can\snot|can['’]t)"
_REFUSAL = re.compile(
    r"\A[\W_]{0,20}(?i:choice|contribution|reasoning)?[\W_]{0,20}"
    rf"(?i:sorry\b|{_CANNOT}\b)"
    r"|(?i:\bas\san?\s(?:AI|artificial|language\smodel|large\slanguage)\b"
    r"|\bI(?:['’]m|\sam)\s(?:just\s|only\s)?an?\s(?:AI|artificial|language\smodel)\b"
    r"|\bI(?:['’]m|\sam)\s(?:(?:really|very|so)\s)?(?:sorry|unable|not\sable)\b"
    r"|\bI\s(?:apologi[sz]e\b|(?:(?:must|have\sto)\s)?(?:decline\b|refuse\b))"
    rf"|\b(?:{_CANNOT}|I\s(?:will\snot|won['’]t|do\snot\swish\sto|am\snot\swilling\sto))\s"
    r"(?:\w{1,15}ly\s)?(?:choose|answer|make\s(?:an?|the|this|that|any|such)|provide|participate"
    r"|decide|select|pick|engage|fulfill?|assist|help|comply|recommend|play|take\spart|respond"
    r"|offer)\b)"
)


def _find(text: str, answer: str, game: str) -> _Found | None:
    """The commitment that counts under the answer form, if there is one."""
    grammar = _GRAMMARS[game]
    if answer != "reasoning+choice":
        return (
            _at_the_start(text, grammar)
            or next(_committed(text, grammar), None)
            or _last_line(text, grammar)
        )
    found = _last_field(text, grammar)
    if found is None and not _REASONING.search(text):
        *_, found = (None, *_committed(text, grammar))
        found = found or _last_line(text, grammar) or _at_the_start(text, grammar)
        # A later sentence may take it back, and a text cut off has not come to its end.
        found = found and found._replace(settled=False, open=True)
    return found


def _at_the_start(text: str, grammar: _Grammar) -> _Found | None:
    match = grammar.first.match(text)
    return _unless_two(text, match, grammar) if match else None


def _committed(text: str, grammar: _Grammar) -> Iterator[_Found]:
    """Fields and sentences that commit, in the order of the text."""
    begins = len(text) - len(text.lstrip())
    opening = True
    for match in grammar.said.finditer(text):
        if match["field"] is None:
            yield from _sentence(text, match, grammar)
        else:
            found = _field_value(text, match, grammar)
            opens = opening and _VOID.fullmatch(text, begins, match.start()) is not None
            # The field that opens an answer has the last word, unless nothing stands in it.
            if found and (found.token is not None or opens):
                yield found
                if opens:
                    return
        opening = False


def _last_field(text: str, grammar: _Grammar) -> _Found | None:
    """In JSON: the field that closes the object, else the last, outside any string."""
    last = None
    for match in grammar.field.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        quoted = match[0][0] in "\"'“`" and not before.endswith("\\")
        found = _field_value(text, match, grammar) if quoted or _OUTSIDE.search(before) else None
        if found and _CLOSES.match(text, found.end):
            return found
        if found and (found.token is not None or last is None):
            last = found._replace(settled=False)
    return last


def _field_value(text: str, key: re.Match[str], grammar: _Grammar) -> _Found | None:
    """What the field says; None while it is empty. Its value ends with its quote, } or line."""
    start = key.end() + len(_QUOTE.match(text, key.end())[0])  # type: ignore[index]
    pattern = _UNTIL.get(text[start - 1], _UNTIL['"'])
    value = pattern.match(text, start)[0]  # type: ignore[index]
    end = start + len(value)
    match = grammar.value.match(value)
    found = _unless_two(value, match, grammar) if match else None
    for match in () if found else grammar.said.finditer(value):
        found = found or next(_sentence(value, match, grammar), None)
    closed = end < len(text)
    if found is None:
        if _VOID.fullmatch(value):
            return None
        return _Found(None, key.start(), end, settled=closed, open=not closed)
    return _Found(
        found.token,
        key.start(),
        start + found.end,
        settled=closed or found.settled,
        open=found.open and not closed,
    )


def _sentence(text: str, match: re.Match[str], grammar: _Grammar) -> Iterator[_Found]:
    before = text[max(0, match.start() - 60) : match.start()]
    if match["field"] is None and not _NOT_MINE.search(before):
        found = _unless_two(text, match, grammar)
        if found:
            yield found


def _last_line(text: str, grammar: _Grammar) -> _Found | None:
    body = text.rstrip()
    start = body.rfind("\n") + 1
    match = grammar.last.match(body, start)
    found = _unless_two(body, match, grammar) if match else None
    return found and found._replace(settled=False, open=True)  # a further line may follow


def _unless_two(text: str, match: re.Match[str], grammar: _Grammar) -> _Found | None:
    """The choice matched, unless another one is offered with it, as in "C or D"."""
    end = match.end()
    tail = text[end : end + _WINDOW]
    other = grammar.other.match(tail)
    if other and _value(other["token"]) != _value(match["token"]):
        return None
    settled = len(tail) == _WINDOW or tail[:1] == "\n"
    return _Found(match["token"], match.start(), end, settled, not tail)


def _value(token: str) -> str | int:
    return int(token) if token.isdecimal() else token[0].upper()


# -- the motivation -------------------------------------------------------------------------------

_REASONS = re.compile(
    r"[\"'“](?i:motivations?|reasons?|reasoning|explanation|justification|why)[\"'”]"
    r"\s{0,3}:\s{0,3}[\"'“]?"
)
# A JSON string up to its end; a quote that nothing follows up in JSON was left unescaped.
_STRING = re.compile(r'(?:[^"\\]|\\.|"(?!\s{0,10}(?:\}|,\s{0,10}["\']|\Z)))*+', re.DOTALL)


def _motivation(text: str, answer: str, found: _Found) -> str | None:
    """The reasons of an answer, taken out of their JSON; None where none are given or asked for."""
    if answer == "choice":
        return None
    if answer == "reasoning+choice":
        key = _REASONS.search(text, 0, found.start)
        body = text[key.end() if key else 0 : found.start].rstrip(" \t\r\n,")
        if key and body[-1:] in ('"', "”", "'"):
            return _unescaped(body[:-1]) or None
        body = body.rstrip("{ \t\r\n").removesuffix("json").rstrip("` \t\r\n")
        if body:
            return _unescaped(body) or None if key else body
    key = _REASONS.search(text, found.end)
    if key is None:
        return text[found.end :].strip(" \t\r\n\"'“”*_`)]}>.,:;!–—-") or None
    string = _STRING.match(text, key.end())
    assert string is not None  # it matches the empty text
    closed = text[key.end() - 1] == '"' and string.end() < len(text)
    return _unescaped(string[0] if closed else string[0].rstrip(" \t\r\n}'”`")) or None


def _unescaped(body: str) -> str:
    """JSON escapes resolved as far as they are valid; half a surrogate pair becomes U+FFFD."""
    try:
        body = json.loads(f'"{body}"', strict=False)
    except ValueError:
        body = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), body)
    return body.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
