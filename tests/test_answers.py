"""Reading answers: what models write, cut anywhere, and whatever else a text may be."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tomlib.answers import OUTCOMES, Answer, decided, read

FORMS = ("choice", "choice+motivation", "reasoning+choice")
GAMES = ("two_player", "public_goods")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ('{"choice": "C", "motivation": "We both gain; D would start a quarrel."}', "C"),
        ('{"choice": "D"}', "D"),
        ('{"choice": "D"', "D"),
        ('{"choice": "C', "C"),
        ('{"choice": "c"}', "C"),
        ('{"choice": "D because if I choose C I lose', "D"),
        ('{"choice": "Strategy D"}', "D"),
        ('{"choice": "option C", "motivation": "I would never choose D."}', "C"),
        ('{"choice": "**C**"}', "C"),
        ('{"choice": "<C>"}', "C"),
        ('{"choice": "Cooperate"}', "C"),
        ('{"choice": "defect", "motivation": "C is naive"}', "D"),
        ('{"choice": "I choose D"}', "D"),
        ('{"choice": "C", "choice": "D"}', "C"),
        ('{"choice": "{"choice": "D"}', "D"),
        ('{"choice": "```json\n{"choice": "D"}\n```', "D"),
        ("{'choice': 'D', 'motivation': 'C is risky'}", "D"),
        ("{choice: C, motivation: We gain}", "C"),
        ("{“choice”: “D”}", "D"),
        ('```json\n{"choice": "C"}\n```', "C"),
        ('Sure! Here is my answer:\n\n{"choice": "D"}', "D"),
        ("C", "C"),
        (" C ", "C"),
        ('"C"', "C"),
        ("**C**", "C"),
        ("*D*\n\nBecause C is risky.", "D"),
        ("`D`", "D"),
        ("(C)", "C"),
        ("C.", "C"),
        ("C, because we both gain", "C"),
        ("C because we both gain", "C"),
        ("D\nC would be naive", "D"),
        ("Option D.", "D"),
        ("Strategy C", "C"),
        ("Strategy **D**: it is safe", "D"),
        ("choice: D", "D"),
        ("Choice: **D**", "D"),
        ("**Choice:** C", "C"),
        ("My choice is D.", "D"),
        ("Answer: C", "C"),
        ("I choose C because it is fair.", "C"),
        ("I choose strategy C over D.", "C"),
        ("I would choose option **C**.", "C"),
        ("I'll go with D.", "D"),
        ("I’d pick “C”", "C"),
        ("We will therefore adopt strategy D!", "D"),
        ("I have decided to play C", "C"),
        ("As an AI language model, I have no preferences, but I would choose C.", "C"),
        ("If the coplayer plays D I lose. Still, I choose C.", "C"),
        ("I do not know what they do, so my final decision is C. I choose C.", "C"),
        ("The best strategy is to choose D.", "D"),
        ("Let me think about it.\n\nD", "D"),
    ],
)
@pytest.mark.parametrize("form", ["choice", "choice+motivation"])
def test_letter_first(text: str, choice: str, form: str) -> None:
    found = read(text, form)
    assert (found.choice, found.outcome) == (choice, "ok")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"choice": "',
        '{"choice": "C or D"}',
        '{"choice": "<C or D>"}',
        '{"choice": "C/D"}',
        '{"choice": "C, D"}',
        '{"choice": "both"}',
        '{"choice": "E"}',
        '{"choice": "Coo"}',
        '{"choice": "Depends"}',
        '{"choice": "neither", "motivation": "I choose C only on Sundays"}',
        "C or D",
        "C and D both have their merits.",
        "C is risky and D is safe.",
        "Strategy C gives 5 points and strategy D gives 10.",
        "Cats and dogs",
        "I don't choose C.",
        "I would not choose D.",
        "If I choose C, I may lose.",
        "My coplayer's choice is C.",
        "Their best strategy is D.",
        "I choose between C and D.",
        "D'accord",
        "\x00\ud800",
    ],
)
def test_nothing_usable(text: str) -> None:
    assert read(text, "choice+motivation") == Answer(None, "unparsed")


@pytest.mark.parametrize(
    "text",
    [
        "I cannot.",
        "I cannot choose between C and D.",
        "I can’t help with that.",
        "Sorry, but no.",
        "I'm sorry, but I am not able to answer this.",
        "As an AI language model, I do not have personal preferences.",
        "As a language model I have no interests.",
        '{"choice": "I cannot make this decision, as an AI"}',
        '{"reasoning": "I cannot take part in this',
        "I must decline.",
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_refusals(text: str, form: str) -> None:
    assert read(text, form) == Answer(None, "refused")
    assert read(text, form, finish="length") == Answer(None, "refused")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('{"choice": "', "choice"),
        ('{"choice": "C', "choice"),  # might have become "Can I ask ..."
        ('{"choice": "Coo', "choice"),
        ("Let me think about C and", "choice+motivation"),
        ('{"reasoning": "If I choose C and they choose D, I', "reasoning+choice"),
        ('{"reasoning": "So I choose C. My choice: C', "reasoning+choice"),
        ('{"reasoning": "So.", "choice": "', "reasoning+choice"),
        ("Both matter. I choose C. On second", "reasoning+choice"),
    ],
)
def test_cut_before_the_choice(text: str, form: str) -> None:
    assert read(text, form, finish="length") == Answer(None, "truncated")


@pytest.mark.parametrize(
    ("text", "form", "choice"),
    [
        ('{"choice": "C"', "choice", "C"),
        ('{"choice": "C", "motivation": "We bo', "choice+motivation", "C"),
        ("I choose D because it pays", "choice+motivation", "D"),
        ('{"reasoning": "C is kind.", "choice": "D"', "reasoning+choice", "D"),
    ],
)
def test_cut_after_the_choice(text: str, form: str, choice: str) -> None:
    found = read(text, form, finish="length")
    assert (found.choice, found.outcome) == (choice, "ok")


def test_cut_after_an_answer_that_is_none() -> None:
    text = '{"choice": "neither", "motivation": "bo'
    assert read(text, "choice+motivation", finish="length").outcome == "unparsed"


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ('{"reasoning": "C gives 5, D gives 10.", "choice": "D"}', "D"),
        ('{"reasoning": "I choose C. My choice: C.", "choice": "D"}', "D"),
        (r'{"reasoning": "As in {\"choice\": \"C\"}, I", "choice": "D"}', "D"),
        ('{"reasoning": "If both "cooperate", 10.", "choice": "C"}', "C"),
        ('{"reasoning": "x", choice: C}', "C"),
        ("{'reasoning': 'x', 'choice': 'D'}", "D"),
        ('{"reasoning": "x"}\n{"choice": "D"}', "D"),
        ('{"reasoning": "x",\n  "choice":\n "D"\n}', "D"),
        ('{"reasoning": "x", "choice": "C"} or rather {"choice": "D"}', "C"),
        ('{"reasoning": "x", "choice": "C", "choice": "D"}', "D"),
        ("At first I choose C. But then I choose D.", "D"),
        ("C is kind, D is safe.\n\nD", "D"),
        ("C is kind, D is safe.\n\n**Choice: D**", "D"),
        ("D", "D"),
    ],
)
def test_reasoning_first(text: str, choice: str) -> None:
    found = read(text, "reasoning+choice")
    assert (found.choice, found.outcome) == (choice, "ok")


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "C gives 5. So I choose C."}',
        '{"reasoning": "C gives 5. So my choice: C',
        '{"reasoning": "x", "choice": "C or D"}',
        '{"reasoning": "x", "choice": ""}',
        "Both C and D have merits.",
    ],
)
def test_letters_within_the_reasoning_do_not_count(text: str) -> None:
    assert read(text, "reasoning+choice") == Answer(None, "unparsed")


@pytest.mark.parametrize(
    ("text", "contribution"),
    [
        ('{"contribution": 5, "motivation": "Half of 10."}', 5),
        ('{"contribution": 0}', 0),
        ('{"contribution": 10}', 10),
        ('{"contribution": 5', 5),
        ('{"contribution": 5.0}', 5),
        ('{"contribution": "5"}', 5),
        ('{"contribution": $5}', 5),
        ('{"contribution": "$5.00"}', 5),
        ('{"contribution": "5 dollars"}', 5),
        ('{"contribution": 5 dollars, "motivation": "10 is too much"}', 5),
        ('{"contribution": 5 of my 10 dollars}', 5),
        ("{'contribution': 7}", 7),
        ("5", 5),
        ("$5", 5),
        ("**5**", 5),
        ("5 dollars, since 10 is too much", 5),
        ("I contribute 5 dollars out of 10.", 5),
        ("I will put $3 into the fund and keep 7.", 3),
        ("My contribution is 4.", 4),
        ("Contribution: 6", 6),
        ("I would give all 10 dollars.", 10),
    ],
)
@pytest.mark.parametrize("form", ["choice", "choice+motivation"])
def test_contribution(text: str, contribution: int, form: str) -> None:
    found = read(text, form, "public_goods")
    assert (found.choice, found.outcome) == (contribution, "ok")
    assert type(found.choice) is int


@pytest.mark.parametrize(
    "text",
    [
        '{"contribution": ',
        '{"contribution": 12}',
        '{"contribution": 5.5}',
        '{"contribution": 5,000}',
        '{"contribution": -3}',
        '{"contribution": five}',
        '{"contribution": "five"}',
        '{"contribution": 5 to 7}',
        '{"contribution": 1-10}',
        '{"contribution": 5%}',
        '{"contribution": 5/10}',
        '{"contribution": 999999999999999999999}',
        '{"contribution": <whole number from 0 to 10>}',
        "I would give half of my 10 dollars.",
        "12",
    ],
)
def test_no_contribution(text: str) -> None:
    assert read(text, "choice", "public_goods") == Answer(None, "unparsed")


def test_contribution_after_the_reasoning_and_within_the_endowment() -> None:
    text = '{"reasoning": "I contribute 10 if they do.", "contribution": 4}'
    assert read(text, "reasoning+choice", "public_goods").choice == 4
    assert read('{"contribution": 12}', "choice", "public_goods", endowment=20).choice == 12
    cut = '{"contribution": 1'
    assert read(cut, "choice", "public_goods", finish="length").outcome == "truncated"


@pytest.mark.parametrize(
    ("text", "form", "motivation"),
    [
        ('{"choice": "C", "motivation": "We both gain."}', "choice+motivation", "We both gain."),
        ('{"choice": "C", "motivation": "We bo', "choice+motivation", "We bo"),
        (
            r'{"choice": "C", "motivation": "A \"pact\"\nholds."}',
            "choice+motivation",
            'A "pact"\nholds.',
        ),
        ('{"choice": "C", "motivation": "A "pact" holds"}', "choice+motivation", 'A "pact" holds'),
        ('{"choice": "C", "motivation": "Yes", "sure": true}', "choice+motivation", "Yes"),
        (
            r'{"choice": "C", "motivation": "caf\u00e9 \ud83d\ude00 \ud83d"}',
            "choice+motivation",
            "café 😀 �",
        ),
        ("{'choice': 'C', 'reason': 'Peace.'}", "choice+motivation", "Peace."),
        ("C because we both gain.", "choice+motivation", "because we both gain"),
        ("I choose C.\n\nIt is fair", "choice+motivation", "It is fair"),
        ('{"choice": "C"}', "choice+motivation", None),
        ('{"choice": "C", "motivation": "We both gain."}', "choice", None),
        ('{"reasoning": "C is kind.", "choice": "D"}', "reasoning+choice", "C is kind."),
        ('{"reasoning": "the "pact"", "choice": "D"}', "reasoning+choice", 'the "pact"'),
        ("C is kind. I choose D.", "reasoning+choice", "C is kind."),
        ("I choose D. It is safe", "reasoning+choice", "It is safe"),
    ],
)
def test_motivation(text: str, form: str, motivation: str | None) -> None:
    assert read(text, form).motivation == motivation


# -- decided --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form", "game", "expected"),
    [
        ('{"choice": "', "choice", "two_player", False),
        ('{"choice": "C', "choice", "two_player", False),
        ('{"choice": "C"', "choice", "two_player", True),
        ('{"choice": "C\n', "choice", "two_player", True),
        ('{"choice": "C ', "choice", "two_player", False),  # "C or D"
        ('{"choice": "Neither"', "choice", "two_player", True),
        ("C", "choice", "two_player", False),
        ("C\n", "choice", "two_player", True),
        ('{"contribution": 1', "choice", "public_goods", False),
        ('{"contribution": 1.', "choice", "public_goods", False),
        ('{"contribution": 1,', "choice", "public_goods", False),  # "1,5"
        ('{"contribution": 1, "', "choice", "public_goods", True),
        ('{"contribution": 1}', "choice", "public_goods", True),
        ('{"reasoning": "I choose C', "reasoning+choice", "two_player", False),
        ('{"reasoning": "x", "choice": "C"', "reasoning+choice", "two_player", False),
        ('{"reasoning": "x", "choice": "C"}', "reasoning+choice", "two_player", True),
    ],
)
def test_decided(text: str, form: str, game: str, expected: bool) -> None:
    assert decided(text, form, game) is expected  # type: ignore[arg-type]


PIECES = st.sampled_from(
    [
        *"CD05{}\"'`*,.: \n\\-$%/",
        "10",
        '{"choice": "',
        '{"contribution": ',
        '{"reasoning": "',
        '", "choice": "',
        '", "contribution": ',
        '", "motivation": "',
        "```json\n",
        " or ",
        " to ",
        "I choose ",
        "I contribute ",
        "my choice is ",
        "Option ",
        "if ",
        "not ",
        "ooperate",
        "efect",
        "because ",
        "dollars ",
        "coplayer ",
        "I cannot ",
        "gains and losses ",
    ]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)


@settings(max_examples=600, deadline=None)
@given(TEXTS | st.text(), TEXTS, st.sampled_from(FORMS), st.sampled_from(GAMES))
@example("Well.\nC\n", "D", "choice", "two_player")
@example("C or D", "ont", "choice", "two_player")
@example('{"choice": "C or D', 'ont"}', "choice", "two_player")
def test_what_is_decided_stays_so(text: str, more: str, form: str, game: str) -> None:
    if decided(text, form, game):  # type: ignore[arg-type]
        now = read(text, form, game)  # type: ignore[arg-type]
        for end in range(len(more) + 1):
            later = read(text + more[:end], form, game, finish="length")  # type: ignore[arg-type]
            assert later.choice == now.choice
            assert (later.outcome == "ok") == (now.outcome == "ok")


@settings(max_examples=600, deadline=None)
@given(TEXTS | st.text(), st.sampled_from(FORMS), st.sampled_from(GAMES))
def test_any_text_has_exactly_one_outcome(text: str, form: str, game: str) -> None:
    for finish in ("stop", "length"):
        found = read(text, form, game, finish)  # type: ignore[arg-type]
        assert found.outcome in OUTCOMES
        assert (found.choice is not None) == (found.outcome == "ok")
        if game == "two_player":
            assert found.choice in ("C", "D", None)
        else:
            assert found.choice is None or (type(found.choice) is int and 0 <= found.choice <= 10)
        assert found.motivation is None or found.motivation.strip()
        if found.motivation:
            found.motivation.encode()
        assert finish == "length" or found.outcome != "truncated"


REASONS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).map(str.strip).filter(len)


@settings(max_examples=300, deadline=None)
@given(REASONS, st.sampled_from("CD"), st.integers(0, 10))
def test_proper_json_is_read_back(reasons: str, letter: str, amount: int) -> None:
    import json

    text = json.dumps({"choice": letter, "motivation": reasons})
    assert read(text, "choice+motivation") == Answer(letter, "ok", reasons)
    text = json.dumps({"contribution": amount, "motivation": reasons}, ensure_ascii=False)
    assert read(text, "choice+motivation", "public_goods") == Answer(amount, "ok", reasons)
    text = json.dumps({"reasoning": reasons, "choice": letter})
    assert read(text, "reasoning+choice") == Answer(letter, "ok", reasons)


HOSTILE = [
    "a", " ", "\n", '"', "{", "\\", '\\"', "C", "C ", "C or ", "I ", "I will ", "I I'll really ",
    "5", "5 ", "$ ", "choice", "choice:", 'choice: "', '"choice": ', '{"choice": "', "`", "if ",
    "my ", "my my choice is ", '"reasoning": "', '"motivation": "', "sorry", "As an ", "I am ",
    "coplayer coplayer ", "all all ", "-", '",', '"} ', "the ", "I choose C or D ", "json",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_work_is_linear_in_the_length(piece: str) -> None:
    def cost(size: int) -> float:
        body = piece * (size // len(piece))
        start = time.process_time()
        for game in GAMES:
            for form in FORMS[1:]:
                for head in ("", '{"reasoning": "', '{"choice": "C", "motivation": "'):
                    read(head + body, form, game)  # type: ignore[arg-type]
        return time.process_time() - start

    small, large = min(cost(2_000), cost(2_000)), cost(48_000)
    # 24 times the text: 24 times the work if linear, 576 times if quadratic. Only the ratio counts.
    assert large < 150 * small + 0.05


def test_a_megabyte_is_read() -> None:
    text = '{"choice": "D", "motivation": "' + "I would choose C. " * 60_000 + '"}'
    found = read(text, "choice+motivation")
    assert found.choice == "D" and len(found.motivation or "") > 1_000_000
    assert read("<script>" * 130_000, "choice").outcome == "unparsed"
