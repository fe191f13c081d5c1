"""Profiles, and what a notebook's parameters may say."""

import shutil
from pathlib import Path

import pytest

from tomlib.errors import TomError
from tomlib.profiles import PAGES, load_profile, open_run, profile_names
from tomlib.scenarios import root


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_carries_its_own_name(name: str) -> None:
    assert load_profile(name).name == name


def test_the_paper_profile_has_the_paper_s_numbers() -> None:
    p = load_profile("paper")
    assert (p.teacher, p.student) == ("llama2-70b-chat", "llama2-7b-chat")
    assert (p.n_teacher, p.n, p.epochs, p.learning_rate, p.batch_rows) == (300, 300, 3, 5e-5, 64)
    assert (p.lora_r, p.lora_alpha, p.lora_dropout, p.lora_modules) == (
        8,
        16,
        0,
        ("q_proj", "v_proj"),
    )
    assert (p.repetition_penalty, p.student_quantization, p.tokens_motivation) == (1.1, "nf4", 600)


def test_parameters_override_and_none_leaves_the_profile_s_value() -> None:
    run = open_run("04-in-sample", {"profile": "smoke", "n": 3, "seed": None, "In": [], "_x": 1})
    assert run.profile.n == 3
    assert run.profile.seed == load_profile("smoke").seed


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"profile": "quik"}, "did you mean 'quick'"),
        ({"nn": 3}, "unknown parameter 'nn'; did you mean 'n'"),
        ({"n": "3"}, "must be int, not str"),
        ({"n": True}, "must be int, not bool"),
        ({"n": 0}, "at least 1"),
        ({"temperature": -0.1}, "temperature = -0.1 must be at least 0"),
        ({"temperature": float("nan")}, "must be at least 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"learning_rate": 0}, "above 0"),
        ({"held_out": 1.0}, "below 1"),
        ({"replay": "yes"}, "must be bool"),
        ({"teacher_answer": "letter"}, "unknown"),
        ({"contexts": [1]}, "list of texts"),
    ],
)
def test_bad_parameters_are_errors(parameters: dict[str, object], says: str) -> None:
    with pytest.raises(TomError, match=says):
        open_run("04-in-sample", {"profile": "smoke", **parameters})


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_beside_the_chapters_take_parameters_as_chapters_do(page: str) -> None:
    assert open_run(page, {"profile": "smoke", "n": 3}).profile.n == 3
    with pytest.raises(TomError, match="unknown parameter 'profle'"):
        open_run(page, {"profle": "smoke"})


def test_an_unknown_chapter_is_an_error() -> None:
    with pytest.raises(TomError, match="04-in-sample"):
        open_run("04-in-sampel", {})


def test_bad_profile_files_name_file_and_setting(tmp_path: Path) -> None:
    good = Path("profiles/smoke.toml").read_text("utf-8")
    for text, says in (
        (good.replace("n_teacher = 2", "n_teachers = 2"), "n_teachers.*did you mean 'n_teacher'"),
        (good.replace("epochs = 1 ", "").replace("\nepochs = 1\n", "\n"), "'epochs' is missing"),
        (good.replace("seed = 20240805", "seed = 'x'"), "seed"),
        ("a = ", "not valid TOML"),
    ):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        with pytest.raises(TomError, match=says):
            load_profile(str(path))


def test_a_chapter_opens_its_run_again_in_the_same_kernel() -> None:
    """What its cells have made since stands among its globals; parameters are still checked."""
    kernel: dict[str, object] = {"profile": "smoke", "n": 3}
    assert open_run("04-in-sample", kernel).profile.n == 3
    kernel |= {"scenarios": [], "forms": {}, "n": 5}
    assert open_run("04-in-sample", kernel).profile.n == 5
    kernel["temperature"] = -1.0  # a setting that was not among the parameters before
    with pytest.raises(TomError, match="temperature"):
        open_run("04-in-sample", kernel)


def test_a_stopped_draw_can_be_told_from_a_whole_one() -> None:
    with pytest.raises(TomError, match="tokens_choice = 24 must be below"):
        load_profile("smoke", tokens_choice=24)


def test_a_profile_is_named_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its chapters would run under another profile than its draws."""
    with pytest.raises(TomError, match="name is no parameter"):
        load_profile("smoke", name="other")
    own = tmp_path / "mine.toml"  # a file elsewhere may be named as it likes: it goes by its path
    own.write_text((root() / "profiles" / "smoke.toml").read_text("utf-8"), "utf-8")
    assert load_profile(str(own)).name == "smoke"
    (tmp_path / "profiles").mkdir()
    shutil.copy2(own, tmp_path / "profiles" / "copied.toml")
    monkeypatch.setattr("tomlib.profiles.root", lambda: tmp_path)
    with pytest.raises(TomError, match="must be the file's own, 'copied'"):
        load_profile("copied")


def test_what_cannot_work_at_temperature_0_is_refused() -> None:
    assert load_profile("smoke", temperature=0).temperature == 0
    with pytest.raises(TomError, match="no distribution to distill"):
        load_profile("smoke", temperature=0, objective="distill")
