"""Sampling on servers: no draw lost, whatever the server does; a real one on loopback."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from tomlib import engines
from tomlib.engines import Engine, Request, ask, open_engine
from tomlib.errors import TomError
from tomlib.models import Card, card
from tomlib.prompts import load_wording, messages
from tomlib.readout import _next_token
from tomlib.scenarios import scenarios
from tomlib.sharing import prompt_tokens
from tomlib.weights import fetch

WORDING = load_wording("replies")
SCENARIOS = scenarios("in_sample")[:2]


def _said(number: int = 0, answer: str = "choice+motivation") -> Any:
    return messages(SCENARIOS[number], answer, WORDING)


def _endpoint(server: Engine, monkeypatch: pytest.MonkeyPatch, url: str = "") -> Card:
    """A card of the llama.cpp server that `server` runs in this process, seen as any endpoint."""
    chat: Any = server.chat
    monkeypatch.setenv("TOM_TEST_KEY", chat.openai_api_key.get_secret_value())
    return replace(
        card("llamacpp-server"),
        base_url=url or chat.openai_api_base,
        api_key_env="TOM_TEST_KEY",
        model_id="any",
    )


@pytest.fixture(scope="module")
def llamacpp(smol: Card) -> Iterator[Engine]:
    with open_engine(smol, engine="llamacpp", parallel=8, threads=1) as engine:
        yield engine


@pytest.fixture
def between(llamacpp: Engine) -> Iterator[Callable[..., tuple[str, list[dict[str, Any]]]]]:
    """A proxy before the real server that spoils some of its answers: `(its URL, calls seen)`."""
    started = []

    def start(
        spoil: Callable[[int, Any, dict[str, Any]], bool],
    ) -> tuple[str, list[dict[str, Any]]]:
        calls: list[dict[str, Any]] = []
        real = str(llamacpp.chat.openai_api_base).split("/")[2]  # type: ignore[attr-defined]
        lock = threading.Lock()

        class Proxy(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    calls.append({"n": body.get("n"), "at": time.monotonic(), "body": body})
                    number = len(calls)
                if spoil(number, self, body):
                    return
                wire = http.client.HTTPConnection(real, timeout=300)
                key = self.headers["Authorization"]
                headers = {"Content-Type": "application/json", "Authorization": key}
                wire.request("POST", self.path, json.dumps(body), headers)
                answer = wire.getresponse()
                self.reply(answer.status, answer.read())

            def reply(self, status: int, data: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        started.append(proxy)
        return f"http://127.0.0.1:{proxy.server_port}/v1", calls

    yield start
    for proxy in started:
        proxy.shutdown()
        proxy.server_close()


def test_a_full_context_is_asked_again_with_fewer_at_a_time(smol: Card) -> None:
    """512 cells hold the prompt's 277 tokens and two or three answers, not eight."""
    with open_engine(smol, engine="llamacpp", parallel=8, context=64, threads=1) as engine:
        requests = [Request(_said(0), range(6)), Request(_said(1), range(10, 11))]
        drawn = ask(engine, requests, temperature=1.5, max_new_tokens=80)
        assert [len(d) for d in drawn] == [6, 1]
        assert all(c.text and 0 < c.new_tokens <= 80 for d in drawn for c in d)
        assert engine.parallel < 8


def test_calls_that_fill_the_context_together_are_made_again_one_by_one(
    llamacpp: Engine, between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two fits alone: that the first one was alone at its start says nothing."""
    both = threading.Barrier(2)

    def full(number: int, proxy: Any, body: dict[str, Any]) -> bool:
        if number > 2:
            return False
        both.wait(60)
        time.sleep(0.5 * (body["seed"] == 0))
        proxy.reply(500, b'{"error": {"message": "Context size has been exceeded."}}')
        return True

    url, calls = between(full)
    at = _endpoint(llamacpp, monkeypatch, url)
    with open_engine(at, parallel=2) as engine:
        requests = [Request(_said(0), range(1)), Request(_said(1), range(10, 11))]
        drawn = ask(engine, requests, temperature=0.8, max_new_tokens=2)
        assert engine.parallel == 1
    assert [len(d) for d in drawn] == [1, 1] and len(calls) == 4


def test_a_prompt_that_never_fits_is_an_error_and_no_endless_loop(smol: Card) -> None:
    with (
        open_engine(smol, engine="llamacpp", parallel=4, context=64, threads=1) as engine,
        pytest.raises(TomError, match="ontext size"),
    ):
        ask(engine, [Request(_said(), range(4))], temperature=1)


def test_a_server_without_n_gets_one_call_per_draw(
    llamacpp: Engine, between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_n(number: int, proxy: Any, body: dict[str, Any]) -> bool:
        body["n"] = 1
        return False

    url, calls = between(without_n)
    with open_engine(_endpoint(llamacpp, monkeypatch, url), parallel=4) as engine:
        requests = [Request(_said(0), range(3)), Request(_said(1), range(10, 14))]
        drawn = ask(engine, requests, temperature=0.8, max_new_tokens=2)
    assert [len(d) for d in drawn] == [3, 4]
    assert len(calls) == 7 and engine.per_call == 1
    assert len({c.seed for d in drawn for c in d}) == 7  # a call's own seed for every draw


def test_a_server_that_refuses_n_is_asked_for_one_at_a_time(
    llamacpp: Engine, between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses_n(number: int, proxy: Any, body: dict[str, Any]) -> bool:
        if body.get("n", 1) > 1:
            proxy.reply(400, b'{"error": {"message": "n must be 1"}}')
        return body.get("n", 1) > 1

    url, calls = between(refuses_n)
    with open_engine(_endpoint(llamacpp, monkeypatch, url), parallel=4) as engine:
        drawn = ask(engine, [Request(_said(0), range(3))], temperature=0.8, max_new_tokens=2)
    assert [len(d) for d in drawn] == [3]
    assert calls[0]["n"] == 3 and engine.per_call == 1


def test_a_hosted_server_s_answer_is_kept_whole_and_it_is_asked_no_more_than_said(
    llamacpp: Engine, between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = '{"choice": "D", "motivation": "Safe."}'  # as the opening begins
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": whole},
    }

    def hosted(number: int, proxy: Any, body: dict[str, Any]) -> bool:
        asked.append(body)
        proxy.reply(
            200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
        )
        return True

    asked: list[dict[str, Any]] = []
    url, _ = between(hosted)
    own = replace(_endpoint(llamacpp, monkeypatch, url), prefill="none")
    assert whole.startswith(_said(0)[-1].content)
    with open_engine(own, parallel=1) as engine:
        ((drawn,),) = ask(engine, [Request(_said(0), [0])], temperature=0.8, max_new_tokens=9)
    assert drawn.text == whole
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]
    assert not {"logprobs", "top_logprobs", "top_k", "min_p"} & set(asked[0])


def test_after_an_error_nothing_is_tried_again(
    llamacpp: Engine, between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call is refused while the others wait for a busy server: the error is there at once."""

    def spoil(number: int, proxy: Any, body: dict[str, Any]) -> bool:
        if body["seed"] == 0:
            time.sleep(0.5)
            proxy.reply(401, b'{"error": {"message": "wrong key"}}')
        else:
            proxy.reply(429, b'{"error": {"message": "slow down"}}', retry_after="300")
        return True

    url, calls = between(spoil)
    before = set(threading.enumerate())
    with open_engine(_endpoint(llamacpp, monkeypatch, url), parallel=4) as engine:
        requests = [Request(_said(0), range(1)), Request(_said(1), range(10, 11))]
        with pytest.raises(TomError, match="wrong key"):
            ask(engine, requests, temperature=0.8, max_new_tokens=2)
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(20)
            assert not thread.is_alive()  # else Python would wait for it at its end
    assert len(calls) == 2


def test_a_broken_and_busy_server_loses_no_draw(
    llamacpp: Engine, between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Busy for a second, broken, cut off, garbled: then the real server's answer."""

    def spoil(number: int, proxy: Any, body: dict[str, Any]) -> bool:
        if number == 1:
            proxy.reply(429, b'{"error": {"message": "slow down"}}', retry_after="1")
        elif number == 2:
            proxy.reply(500, b'{"error": {"message": "broken"}}')
        elif number == 3:
            proxy.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        elif number == 4:
            proxy.reply(200, b"garbage")
        return number <= 4

    url, calls = between(spoil)
    with open_engine(_endpoint(llamacpp, monkeypatch, url), parallel=4) as engine:
        drawn = ask(engine, [Request(_said(), range(4))], temperature=0.8, max_new_tokens=4)
    assert [len(d) for d in drawn] == [4]
    assert len(calls) == 5
    assert calls[1]["at"] - calls[0]["at"] >= 1  # what the server asked for


@pytest.mark.parametrize(("status", "attempts"), [(401, 1), (503, 3)])
def test_a_refusal_is_an_error_at_once_and_a_broken_server_after_some_attempts(
    llamacpp: Engine, between: Any, monkeypatch: pytest.MonkeyPatch, status: int, attempts: int
) -> None:
    def refuse(number: int, proxy: Any, body: dict[str, Any]) -> bool:
        proxy.reply(status, b'{"error": {"message": "no"}}', retry_after="0")
        return True

    url, calls = between(refuse)
    with open_engine(_endpoint(llamacpp, monkeypatch, url), parallel=2) as engine:
        engine.attempts = 3
        with pytest.raises(TomError, match="no answer"):
            ask(engine, [Request(_said(), [1])], temperature=0.8)
    assert len(calls) == attempts


def test_an_endpoint_draws_from_the_distribution_that_it_says_it_has(
    llamacpp: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's own cuts (top-k 40, top-p 0.95, min-p 0.05) would show in 600 first tokens."""
    said = _said(0, "choice")
    with open_engine(_endpoint(llamacpp, monkeypatch), parallel=8) as engine:
        believed = _next_token(engine, said, 1.0)
        (draws,) = ask(engine, [Request(said, range(600))], temperature=1.0, max_new_tokens=1)
    frequent = {
        token: p for token, p in believed.items() if p > 0.02 and token.strip("<|>") == token
    }
    seen = Counter(c.text if c.text in frequent else "another" for c in draws)
    expected = frequent | {"another": 1 - sum(frequent.values())}
    assert len(draws) == 600 and 0.05 < expected["another"] < 0.95
    for token, p in expected.items():
        low, high = binomtest(seen[token], 600).proportion_ci(0.999)
        assert low <= p <= high, token


def _unquantized(gguf: Path, to: Path) -> Path:
    """The same model with all weights in fp32, as Transformers reads them."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    source = GGUFReader(gguf)
    architecture = source.fields["general.architecture"].contents()
    writer = GGUFWriter(to, architecture)
    for name, known in source.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = known.types[-1] if known.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, known.contents(), known.types[0], sub_type=inner)
    for tensor in source.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, plain, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def test_llama_cpp_at_equal_precision_is_transformers(
    smol: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log probabilities within 0.02, and choices of one distribution, as with vLLM (test_vllm)."""
    said = [_said(number, "choice") for number in range(2)]
    requests = [Request(each, range(300)) for each in said]
    decoding: dict[str, Any] = {"temperature": 0.8, "max_new_tokens": 2}
    with open_engine(smol, engine="transformers", threads=2) as own:
        reader: Any = own.chat.reader  # type: ignore[attr-defined]
        logp = []
        for each in said:
            logits = reader.read(prompt_tokens(reader.tokenizer, each)).logits
            logp.append((logits - logits.logsumexp(-1)).numpy())
        ours = ask(own, requests, **decoding)
        words = reader.tokenizer
    plain = _unquantized(fetch(smol), tmp_path / "f32.gguf")
    monkeypatch.setattr(engines, "fetch", lambda card, **_: plain)
    with open_engine(smol, engine="llamacpp", parallel=8, threads=2) as server:
        worst = 0.0
        for each, known in zip(said, logp, strict=True):
            for token, p in _next_token(server, each, 1.0).items():
                ids = words(token, add_special_tokens=False)["input_ids"]
                if p > 1e-3 and len(ids) == 1:
                    worst = max(worst, abs(float(np.log(p) - known[ids[0]])))
        theirs = ask(server, requests, **decoding)
    print(f"largest difference of log probabilities: {worst:.5f}")
    assert 0 < worst < 0.02
    for here, there in zip(ours, theirs, strict=True):
        a, b = (Counter(c.text for c in draws) for draws in (here, there))
        assert sum(a.values()) == sum(b.values()) == 300
        for text in {t for t, k in (a + b).items() if k >= 20}:
            # Each count, given their sum, is binomial with 1/2 where the distributions are equal.
            assert binomtest(a[text], a[text] + b[text]).pvalue > 1e-3, (text, a[text], b[text])


def test_many_jobs_do_not_come_back_at_once() -> None:
    """Waits grow and differ by chance; a server that names one is taken at its word, and no sooner."""

    def waits(attempt: int, **headers: str) -> list[float]:
        error = RuntimeError("full")
        error.response = SimpleNamespace(headers=headers)  # type: ignore[attr-defined]
        outcome = SimpleNamespace(exception=lambda: error)
        state = SimpleNamespace(attempt_number=attempt, outcome=outcome)
        return [engines._pause(state) for _ in range(400)]

    for attempt, most in ((1, 1), (3, 4), (5, 16), (30, 60)):
        drawn = waits(attempt)
        assert 0 <= min(drawn) < 0.1 * most and 0.9 * most < max(drawn) <= most
    for told, least in (("7", 7.0), ("1e9", engines.LONGEST_PAUSE), ("soon", 0.0)):
        drawn = waits(1, **{"retry-after": told})
        assert least <= min(drawn) and max(drawn) <= least + 1 and len(set(drawn)) > 300
