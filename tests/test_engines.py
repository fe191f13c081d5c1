"""Engines: one interface to Transformers, llama.cpp and an endpoint, on real weights."""

from typing import Any

import pytest

from tomlib.engines import Request, ask, open_engine
from tomlib.errors import TomError
from tomlib.models import Card, card
from tomlib.prompts import load_wording, messages
from tomlib.scenarios import find, scenarios

WORDING = load_wording("replies")


def test_langchain_generate_and_ask_give_the_same_draws(smol: Card) -> None:
    said = messages(find("IR/stag_hunt"), "choice+motivation", WORDING)
    with open_engine(smol, engine="transformers") as engine:
        texts = [
            c.text
            for c in ask(engine, [Request(said, [3, 4])], temperature=0.8, max_new_tokens=8)[0]
        ]
        result = engine.chat.generate([said], seeds=[3, 4], temperature=0.8, max_new_tokens=8)
        assert [g.text for g in result.generations[0]] == texts


def test_llama_cpp_and_an_endpoint_on_loopback_answer_like_transformers(
    smol: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ways to one model: exact P(C) over the same prompt within the quantized kernels' noise."""
    from dataclasses import replace

    from tomlib.readout import option_probabilities

    said = messages(scenarios("in_sample")[0], "choice", WORDING)
    with open_engine(smol, engine="transformers") as engine:
        exact, _ = option_probabilities(engine, said, ["C", "D"], 0.8)
    with open_engine(smol, engine="llamacpp", parallel=4, threads=2) as server:
        near, _ = option_probabilities(server, said, ["C", "D"], 0.8)
        drawn = ask(server, [Request(said, [1, 2, 3, 4, 5, 6])], temperature=0.8, max_new_tokens=4)
        assert [len(d) for d in drawn] == [6]
        assert all(c.new_tokens for c in drawn[0])
        monkeypatch.setenv("TOM_TEST_KEY", server.chat.openai_api_key.get_secret_value())
        own = replace(
            card("llamacpp-server"),
            base_url=server.chat.openai_api_base,
            api_key_env="TOM_TEST_KEY",
            model_id="any",
            prefill="native",
        )
        with open_engine(own) as endpoint:
            same, _ = option_probabilities(endpoint, said, ["C", "D"], 0.8)
    share = [p[0] / p.sum() for p in (exact, near, same)]
    assert share[1] == pytest.approx(share[0], abs=0.05)
    assert share[2] == pytest.approx(share[1], abs=0.01)


def test_engine_errors_say_what_to_do(smol: Card, tmp_path: Any, monkeypatch: Any) -> None:
    with pytest.raises(TomError, match="cannot take an adapter"):
        open_engine(smol, tmp_path, engine="llamacpp")
    with pytest.raises(TomError, match="engine 'vlm' cannot run a gguf card"):
        open_engine(smol, engine="vlm")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    from dataclasses import replace

    closed = replace(card("llamacpp-server"), api_key_env="NO_SUCH_KEY")
    with pytest.raises(TomError, match="NO_SUCH_KEY"):
        open_engine(closed)
    nobody = replace(closed, api_key_env="", base_url="http://127.0.0.1:9/v1")
    with open_engine(nobody) as engine:
        engine.attempts = 1
        with pytest.raises(TomError, match=r"at http://127\.0\.0\.1:9/v1: no answer"):
            ask(
                engine,
                [Request(messages(find("IR/stag_hunt"), "choice", WORDING), [1])],
                temperature=1,
            )
