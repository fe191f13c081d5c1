"""Shared-prefix LoRA against the row-by-row computation; adapters, checkpoints, resume."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tomlib import finetune
from tomlib.collect import collect, training_rows, tuned_adapter
from tomlib.errors import TomError
from tomlib.finetune import Group, _passes, check_base, group_nll, headless
from tomlib.models import Card, card
from tomlib.profiles import Run
from tomlib.prompts import load_wording, prompt_id


@pytest.fixture(scope="module")
def lora(smol: Card) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    from tomlib.sharing import load_transformers

    model, _ = load_transformers(smol)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


@pytest.mark.parametrize("off", [False, True], ids=["own head", "head taken off"])
@pytest.mark.parametrize(("prompts", "answers"), [(1, 1), (1, 4), (1, 16), (4, 3)])
def test_loss_and_gradients_equal_the_row_by_row_computation(
    lora: Any, prompts: int, answers: int, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(finetune, "HEAD_ROWS", 50)

    rng = random.Random(answers)

    def words(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(100, 20000) for _ in range(n))

    common = words(40)
    groups = [
        Group(
            common + words(rng.randrange(1, 30)),
            tuple(words(rng.randrange(1, 20)) for _ in range(answers)),
            tuple(float(1 + i % 3) for i in range(answers)),
        )
        for _ in range(prompts)
    ]
    assert _passes(groups, lora) == [groups]
    lora.zero_grad()
    layer = lora.get_output_embeddings()
    head = headless(lora) if off else None
    assert (head is not None) == off
    shared = group_nll(lora, groups, head=head)
    shared.backward()
    lora.set_output_embeddings(layer)
    grads = {n: p.grad.double() for n, p in lora.named_parameters() if p.grad is not None}
    lora.zero_grad()
    lora.double()  # the reference has no rounding of its own to speak of
    total = 0.0
    for group in groups:
        for tail, weight in zip(group.answers, group.weights, strict=True):
            logp = lora(input_ids=torch.tensor([group.prompt + tail])).logits[0].log_softmax(-1)
            picked = logp[len(group.prompt) - 1 : -1].gather(1, torch.tensor(tail)[:, None])
            loss = -picked.sum() * weight
            loss.backward()
            total += loss.item()
    assert shared.item() == pytest.approx(total, rel=1e-5)
    error = sum(((p.grad - grads[n]) ** 2).sum() for n, p in lora.named_parameters() if n in grads)
    size = sum((g**2).sum() for g in grads.values())
    assert float((error / size) ** 0.5) < 1e-5
    lora.zero_grad()
    lora.float()


def test_a_pass_holds_what_begins_alike_and_fits(
    lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, other = (tuple(range(at, at + 30)) for at in (0, 0, 500))
    groups = [
        Group((*start, tail), ((1, 2),) * 4, (1.0,) * 4)
        for start, tail in ((one, 7), (other, 7), (two, 8))
    ]
    assert _passes(groups, lora) == [[groups[0], groups[2]], [groups[1]]]
    monkeypatch.setattr(finetune, "free_memory", lambda device: 0)
    cut = _passes(groups, lora)
    assert [len(some) for some in cut] == [1] * 12
    assert sum(g.mass for some in cut for g in some) == sum(g.mass for g in groups)


def _rows(run: Run) -> pd.DataFrame:
    return training_rows(run, "published")


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    new_smoke: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0.0)
    run = new_smoke(max_steps=4, published_epochs=4, published_batch=1, lora_dropout=0.1)
    whole = tuned_adapter(run, "published", progress=False)
    ours = load_file(whole.folder / "adapter_model.safetensors")
    monkeypatch.setenv("TOM_RUNS", str(tmp_path / "again"))
    other = new_smoke(max_steps=4, published_epochs=4, published_batch=1, lora_dropout=0.1)
    from dataclasses import replace

    other = replace(other, folder=tmp_path / "again" / "smoke")
    calls = 0
    backward = finetune._backward

    def dies_at_the_third(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return backward(*args)

    monkeypatch.setattr(finetune, "_backward", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tuned_adapter(other, "published", progress=False)
    monkeypatch.setattr(finetune, "_backward", backward)
    resumed = tuned_adapter(other, "published", progress=False)
    assert resumed.fingerprint == whole.fingerprint
    theirs = load_file(resumed.folder / "adapter_model.safetensors")
    assert all((ours[k] == theirs[k]).all() for k in ours)
    pd.testing.assert_frame_equal(
        whole.log.drop(columns="seconds"), resumed.log.drop(columns="seconds")
    )


def test_a_finished_adapter_is_found_again_and_a_change_makes_another(
    new_smoke: Callable[..., Run],
) -> None:
    run = new_smoke(max_steps=1)
    first = tuned_adapter(run, "published", progress=False)
    written = (first.folder / "training.json").stat().st_mtime_ns
    assert tuned_adapter(run, "published", progress=False) == first
    assert (first.folder / "training.json").stat().st_mtime_ns == written
    frame = _rows(run)
    how, who = finetune.settings(run, "published"), card("smollm2-135m")
    assert finetune.fingerprint(who, how, frame) == first.fingerprint
    changed = frame.assign(weight=frame["weight"] + (frame.index == 0))
    assert finetune.fingerprint(who, how, changed) != first.fingerprint
    other = finetune.settings(run.changed(lora_r=4), "published")
    assert finetune.fingerprint(who, other, frame) != first.fingerprint


def test_training_lowers_the_loss_of_what_it_sees(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke(max_steps=0, published_epochs=6, published_batch=4)
    log = tuned_adapter(run, "published", progress=False).log
    assert log["loss"].iloc[-1] < log["loss"].iloc[0] - 0.05


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path, smol: Card) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"base": "0" * 64, "student": "another"}))
    with pytest.raises(TomError, match="belongs to 'another'"):
        check_base(tmp_path, smol)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(TomError, match="no readable training record"):
        check_base(tmp_path, smol)


def test_rows_hold_what_the_teacher_said_after_the_opening(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke(n_teacher=3)
    draws = collect(
        run, "teacher", run.scenarios("in_sample"), "choice+motivation", 3,
        letter_only=False, progress=False,
    )  # fmt: skip
    rows = finetune.rows(run, draws)
    usable = draws[draws["outcome"].eq("ok")]
    assert rows["weight"].sum() == len(usable)
    assert not rows["text"].str.startswith('{"choice"').any()
    assert set(rows["text"]) == {t.removeprefix('{"choice": "') for t in usable["text"]}


def test_no_rows_and_unknown_arms_are_errors(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    with pytest.raises(TomError, match="no training rows"):
        finetune.train(run, "published", _rows(run).iloc[:0])
    with pytest.raises(TomError, match="arm 'both'"):
        finetune.settings(run, "both")


def test_a_batch_counts_rows_by_their_weights() -> None:
    groups = [Group((i,), ((1,), (2,)), (150.0, 150.0)) for i in range(4)]
    assert [len(b) for b in finetune._batches(groups, 64, by_rows=True)] == [1] * 4
    light = [Group((i,), ((1,), (2,)), (1.0, 1.0)) for i in range(4)]
    assert [len(b) for b in finetune._batches(light, 4, by_rows=True)] == [2, 2]


def test_copies_carry_the_distribution_over(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke(published_copies=["reordered", "relabelled"])
    frame = training_rows(run, "published")
    shares = frame.assign(letter=frame["text"].str[0]).pivot(
        index=["context", "game", "prompt"], columns="letter", values="weight"
    )
    for s in run.scenarios("in_sample"):
        cell = shares.loc[s.context.name, s.game.name]
        c, d = cell.loc[prompt_id(s, "choice", run.wording)]
        for name, told in (("reordered", [c, d]), ("relabelled", [d, c])):
            assert cell.loc[prompt_id(s, "choice", load_wording(name))].tolist() == told
    assert frame["prompt"].nunique() == 3 * len(run.scenarios("in_sample"))
    adapter = tuned_adapter(run, "published", progress=False)  # every prompt is found again
    assert adapter.record["distinct_rows"] == len(frame)
    plain = training_rows(new_smoke(), "published")
    additive = training_rows(new_smoke(published_targets="additive"), "published")
    assert not plain["weight"].equals(additive["weight"])


def test_answers_of_a_server_that_does_not_go_on_become_rows_in_form(
    new_smoke: Callable[..., Run],
) -> None:
    run = new_smoke()
    draws = collect(
        run, "teacher", run.scenarios("in_sample")[:1], "choice+motivation", 2,
        letter_only=False, progress=False,
    )  # fmt: skip
    loose = draws.assign(
        text="```json\n{ \"choice\": \"D\", \"motivation\": \"Safe.\" }\n```",
        choice="D", outcome="ok", motivation="Safe.",
    )  # fmt: skip
    frame = finetune.rows(run, loose)
    assert frame["text"].tolist() == ['D", "motivation": "Safe."}']
    assert frame["ended"].all() and frame["weight"].sum() == 2
