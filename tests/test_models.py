"""Model cards: what the repository has, what a user may add, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_weights import TEXT, made_up

from tomlib import models, weights
from tomlib.errors import TomError


def test_the_cards_of_the_repository() -> None:
    cards = models.cards()
    assert [name for name, card in cards.items() if card.kind == "gguf"] == [
        "qwen2.5-coder-1.5b",
        "qwen2.5-coder-0.5b",
        "smollm2-135m",
    ]
    teacher, student = cards["qwen2.5-coder-1.5b"], cards["qwen2.5-coder-0.5b"]
    assert teacher.family == student.family and teacher.parameters > student.parameters
    assert len(teacher.source[0].packages) == 22 and len(student.source[0].packages) == 6
    assert cards["llama2-70b-chat"].gated
    for card in cards.values():
        assert weights.weights_id(card)
        assert card.licence or card.kind in ("published", "endpoint")
    assert weights.weights_id(teacher) == teacher.sha256
    paper = cards["llama2-7b-chat"]
    assert weights.weights_id(paper) == f"{paper.repo}@{paper.revision}"
    published = [weights.weights_id(card) for card in cards.values() if card.kind == "published"]
    assert len(set(published)) == len(published) == 3


def test_a_user_adds_a_card_in_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(tmp_path)
    monkeypatch.setenv("TOM_MODELS", str(tmp_path))
    assert models.card("made-up").file == str(tmp_path / "models.toml")
    monkeypatch.setenv("TOM_MODELS", str(tmp_path / "models.toml"))
    assert "made-up" in models.cards() and "smollm2-135m" in models.cards()
    monkeypatch.setenv("TOM_MODELS", str(tmp_path / "none.toml"))
    with pytest.raises(TomError, match=r"none\.toml: no such file"):
        models.cards()


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(TomError, match=r"'qwen2\.5-0\.5b' is unknown; did you mean 'qwen2\.5-"):
        models.card("qwen2.5-0.5b")


def changed(field: str, value: str) -> str:
    """The made-up card with one field's value changed (or, without a value, left out)."""
    lines = []
    for line in TEXT.splitlines():
        if line.split(" = ")[0] == field:
            if value:
                lines.append(f"{field} = {value}")
        else:
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (changed("sha256", ""), "model 'made-up': the field 'sha256' is missing"),
        (changed("sha256", '"abc"'), "'made-up': sha256 must be 64 hexadecimal digits"),
        (changed("size", "-1"), "'made-up': size must be a whole number above 0, got -1"),
        (changed("size", "true"), "size must be a whole number above 0, got True"),
        (changed("size", '"1 GB"'), "size must be a whole number above 0"),
        (changed("kind", '"ggfu"'), "kind 'ggfu' is unknown; did you mean 'gguf'"),
        (changed("kind", ""), "kind  is unknown; add one of gguf, folder, hub"),
        (changed("name", ""), "model 1: the field 'name' is missing"),
        (changed("name", '"../x"'), "name must be up to 60 letters"),
        (changed("name", '"smollm2-135M"'), "the name is taken by 'smollm2-135m'"),
        (TEXT + TEXT, "model 'made-up': the name is taken by an earlier entry"),
        (changed("family", '"x"\nlicense = "MIT"'), "field 'license'; did you mean 'licence'"),
        (changed("family", '"x"\nengine = "vllm"'), "engine 'vllm' is not one of llamacpp, tra"),
        (changed("family", '"x"\nrepo = "a/b"'), "unknown field 'repo'"),
        (changed("version", ""), "'made-up', source 1: the field 'version' is missing"),
        (changed("version", '">=1"'), "source 1: version must be one exact version"),
        (changed("packages", "[]"), "source 1: packages must be a list of texts"),
        (changed("packages", '["-r x"]'), "source 1: packages must be package names"),
        (changed("packages", ""), "source 1: must name packages, repo or path"),
        (TEXT.split("[[model.source]]")[0], "'made-up': needs at least one [[model.source]]"),
        (TEXT.replace("[[model]]", "[model]", 1), "model must be written as [[model]]"),
        (TEXT.replace("[[model]]", "[[models]]"), "nothing called 'models' belongs here"),
        ("model = 3", "model must be written as [[model]]"),
        ("[[model]]\nname", "not valid TOML"),
    ],
)
def test_a_wrong_card_is_named_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "models.toml").write_text(text, encoding="utf-8")
    with pytest.raises(TomError) as error:
        models.cards(tmp_path)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'models.toml'}: ")
    assert "\n" not in str(error.value)


ENDPOINT = """
[[model]]
name = "server"
kind = "endpoint"
family = "any"
purpose = "tests"
base_url = "http://127.0.0.1:8000/v1"
model_id = "some/model"
prefill = "none"
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"http://127', '"127', "base_url must be http"),
        ("http://127", "http://me:key@127", "base_url must be http.*without a key"),
        ("/v1", "/v1?key=secret", "base_url must be http"),
        ("http://127.0.0.1:8000/v1", "http://[::1", "base_url must be http"),
        ('"none"', '"yes"', "prefill 'yes' is not one of native, continue_final_message, none"),
        ('prefill = "none"', 'prefill = "none"\napi_key_env = "sk-123"', "never a key itself"),
        ('prefill = "none"', 'prefill = "none"\napi_key_env = "gsk_live_1"', "in capitals"),
    ],
)
def test_a_wrong_endpoint(tmp_path: Path, old: str, new: str, says: str) -> None:
    (tmp_path / "models.toml").write_text(ENDPOINT)
    assert models.card("server", tmp_path).engine == "endpoint"
    (tmp_path / "models.toml").write_text(ENDPOINT.replace(old, new))
    with pytest.raises(TomError, match=says):
        models.cards(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_a_file_holds_it_is_cards_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    whole = (TEXT + ENDPOINT).encode()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(start + 30, len(whole))))
    piece = data.draw(st.binary(max_size=8) | st.text(max_size=8).map(str.encode))
    (tmp_path / "models.toml").write_bytes(whole[:start] + piece + whole[end:])
    try:
        assert all(isinstance(card, models.Card) for card in models.cards(tmp_path).values())
    except TomError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from([*models.ENGINES, "", "other"]),
    field=st.sampled_from([*models.Card.__dataclass_fields__, "unknown"]),
    value=values,
)
def test_whatever_a_field_holds_it_is_a_card_or_one_line(
    kind: str, field: str, value: object
) -> None:
    full = {"name": "x", "kind": kind, "family": "f", "purpose": "p", field: value}
    try:
        assert isinstance(models._card(Path("f.toml"), "f.toml: model 'x'", full), models.Card)
    except TomError as error:
        assert str(error).startswith("f.toml: model 'x'")
