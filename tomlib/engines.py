"""LangChain chat models that play the games: Transformers, llama.cpp, any OpenAI-compatible endpoint.

`open_engine` gives an `Engine`: a LangChain `BaseChatModel` with a name, and how to close it.
`ask` draws completions from it. Nearly all of the work in such a study is the same prompt read again,
so our own chat model, `SharedPrefixChat`, reads a prompt once whatever the number of draws:

- the tokens that a prompt has in common with the one before it (a context's system prompt) are kept;
- the prompt's keys and values are stored once and attended to by all draws as one matrix product;
- draws that have said the same so far are one row of the batch, so that 300 one-letter choices cost
  one prompt and a step over the few distinct letters;
- finished draws leave the batch; where only the choice is wanted, a draw is finished once decided.
"""

import gc
import os
import random
import re
import secrets
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from tomlib.errors import TomError
from tomlib.models import Card, fetch, transformers_folder

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import BaseMessage

Decided = Callable[[str], bool]
"""Whether a completion (without its opening) has said all that is wanted."""


@dataclass(frozen=True)
class Completion:
    """One draw's text as the engine gave it, without the opening."""

    text: str
    finish: str
    """`stop` (the model ended it, or all that is wanted is said) or `length` (cut)."""
    new_tokens: int
    """Tokens generated; on a server that gives no log probabilities, a share of its call's."""
    seed: int
    """The seed that this draw (or, on a server, its request) was made with."""


@dataclass
class Engine:
    """A chat model that is ready to play."""

    chat: "BaseChatModel"
    name: str
    """Engine and version, as recorded in each draw."""
    parallel: int
    """Draws that a server makes at a time; less once it has run out of context."""
    prefill: str = "native"
    """How the server goes on with a started answer: native, continue_final_message or none."""
    close: Callable[[], None] = field(default=lambda: None)
    per_call: int = 1 << 30
    """Draws that one call may ask a server for; less once it has given fewer."""
    attempts: int = 8
    """How often a call that failed is made before it is an error."""
    secret: str = field(default="", repr=False)
    """The server's key: whatever the server says, it is taken out before anything is recorded."""

    @property
    def local(self) -> bool:
        """Whether it is our own, on this machine: a draw then depends on its own seed alone."""
        return hasattr(self.chat, "reader")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_engine(
    card: Card,
    adapter: Path | None = None,
    *,
    engine: str = "",
    threads: int | None = None,
    parallel: int = 32,
    context: int = 1024,
    quantize: str = "",
) -> Engine:
    """Load a model and make it ready to play.

    Args:
        card: Which model.
        adapter: Folder of a LoRA adapter to put on it (Transformers only).
        engine: `transformers`, `llamacpp` or `endpoint`; the card's own unless given.
        threads: CPU threads; all of the machine's cores unless given.
        parallel: Draws per request on a server.
        context: Tokens that one draw may need in all, prompt included (llama.cpp).
        quantize: `nf4` loads the weights in 4 bits (paper, student inference; needs a GPU).

    Raises:
        TomError: The engine is unknown, is not installed, or cannot take the adapter.
    """
    kind = engine or card.engine
    if adapter is not None and kind != "transformers":
        raise TomError(f"{card.name}: engine {kind!r} cannot take an adapter; use 'transformers'")
    try:
        if kind == "transformers":
            return _open_transformers(card, adapter, threads, quantize)
        if kind == "llamacpp":
            return _open_llamacpp(card, threads, parallel, context)
        if kind == "endpoint":
            return _open_endpoint(card, parallel)
    except ImportError as error:
        raise TomError(
            f"{card.name}: engine {kind!r} needs the package {error.name!r}: "
            "pip install -e '.[models]'"
        ) from None
    raise TomError(f"{card.name}: unknown engine {kind!r} (transformers, llamacpp, endpoint)")


@dataclass(frozen=True)
class Request:
    """A prompt, and one seed per draw that is wanted of it."""

    messages: "Sequence[BaseMessage]"
    seeds: Sequence[int]
    decided: Decided | None = None
    """Where given, a draw may stop as soon as this is true of its text."""


def ask(
    engine: Engine,
    requests: Sequence[Request],
    *,
    temperature: float,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    repetition_penalty: float = 1.0,
) -> list[list[Completion]]:
    """The completions of each request, one per seed.

    Args:
        engine: Who answers.
        requests: Messages as from `prompts.messages`: the last one, if an AIMessage, is the fixed
            opening.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 is off.
        max_new_tokens: Most tokens per draw.
        repetition_penalty: As in Transformers; 1 is off.

    Raises:
        TomError: The server gave no answer, or an unreadable one.
    """
    reader = getattr(engine.chat, "reader", None)
    if reader is None:
        options = _server_options(engine, temperature, top_p, max_new_tokens, repetition_penalty)
        return _ask_server(engine, requests, options)
    drawn = reader.sample(
        [prompt_tokens(reader.tokenizer, r.messages) for r in requests],
        [i for i, r in enumerate(requests) for _ in r.seeds],
        [seed for r in requests for seed in r.seeds],
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        decided=[r.decided for r in requests],
    )
    flat = iter(drawn)
    return [
        [
            Completion(reader.tokenizer.decode(ids), finish, len(ids), seed)
            for seed, (ids, finish) in zip(r.seeds, flat, strict=False)
        ]
        for r in requests
    ]


def _server_options(
    engine: Engine, temperature: float, top_p: float, max_new_tokens: int, penalty: float
) -> dict[str, Any]:
    """Decoding as asked for, in the server's dialect: servers cut the distribution by default."""
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_new_tokens,
    }
    extra: dict[str, Any] = {}
    if engine.prefill == "native":  # llama.cpp: top-k 40 and min-p 0.05 unless told otherwise
        extra = {"top_k": 0, "min_p": 0.0, "repeat_penalty": penalty}
        if penalty != 1.0:  # as in Transformers, over all that was said; the server's own is 64
            extra["repeat_last_n"] = 1 << 16
    elif engine.prefill == "continue_final_message":  # vLLM, SGLang: what the model's folder says
        extra = {"top_k": -1, "min_p": 0.0, "repetition_penalty": penalty}
        extra |= {"continue_final_message": True, "add_generation_prompt": False}
    elif penalty != 1.0:
        extra = {"repetition_penalty": penalty}
    return options | {"extra_body": extra}


def _ask_server(
    engine: Engine, requests: Sequence[Request], options: dict[str, Any]
) -> list[list[Completion]]:
    """Draws from a server: `engine.parallel` at a time, until all are there.

    A server reads a prompt once for all draws of a call. One that gives fewer than it was asked for
    (many know no `n`) is asked again for the rest, by then one draw per call; its first call for a
    prompt ends before the others begin, so that it can go by what it has kept of the prompt. One
    that runs out of context gets half as many at a time.
    """
    out: list[dict[int, Completion]] = [{} for _ in requests]
    todo = deque((r, list(range(len(request.seeds)))) for r, request in enumerate(requests))
    running: dict[Future[Any], tuple[int, list[int]]] = {}
    beside: dict[Future[Any], int] = {}  # the most draws in flight while a call was
    pool = ThreadPoolExecutor(engine.parallel)
    over = Event()
    try:
        while todo or running:
            flying = sum(len(some) for _, some in running.values())
            reading = {r for r, _ in running.values() if not out[r]}
            for _ in range(len(todo)):
                if flying >= engine.parallel:
                    break
                r, wanted = todo.popleft()
                if r in reading:
                    todo.append((r, wanted))
                    continue
                n = min(len(wanted), engine.per_call, engine.parallel - flying)
                some, rest = wanted[:n], wanted[n:]
                if rest:
                    todo.append((r, rest))
                call = pool.submit(_call, engine, requests[r], some, options, over)
                flying += n
                running[call] = r, some
                reading.add(r)
            beside |= {call: max(flying, beside.get(call, 0)) for call in running}
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for call in done:
                (r, some), level = running.pop(call), beside.pop(call)
                try:
                    got = call.result()
                except TomError as error:
                    if "ontext size" not in str(error) or level == 1:
                        raise
                    engine.parallel = max(1, min(engine.parallel, level // 2))
                    got = []
                else:
                    if len(got) < len(some):
                        engine.per_call = max(1, min(engine.per_call, len(got)))
                out[r] |= dict(zip(some, got, strict=False))
                if some[len(got) :]:
                    todo.appendleft((r, some[len(got) :]))
    finally:
        over.set()  # an error, or Ctrl-C: nobody waits for, or pays for, what is still tried
        pool.shutdown(wait=False, cancel_futures=True)
    return [[drawn[i] for i in sorted(drawn)] for drawn in out]


def _call(
    engine: Engine, request: Request, some: Sequence[int], options: dict[str, Any], over: Event
) -> list[Completion]:
    """One call for some of a request's draws; at least one, and no more than asked for."""
    said = list(request.messages)
    opening = str(said[-1].content) if said[-1].type == "ai" else ""
    if opening and engine.prefill == "none":
        said = said[:-1]
    seed = request.seeds[some[0]]
    try:
        result = served(engine, said, over, n=len(some), seed=seed, **options)
    except _Refused as error:
        if len(some) == 1 or "ontext size" in str(error):
            raise
        # Some servers refuse `n` outright; if it is the request that they refuse, this fails too.
        result = served(engine, said, over, n=1, seed=seed, **options)
    given = result.generations[0][: len(some)]
    used = ((result.llm_output or {}).get("token_usage") or {}).get("completion_tokens") or 0
    used = used if isinstance(used, int) and used > 0 else 0
    each = min(round(used / len(result.generations[0])), options["max_tokens"])
    most = options["max_tokens"]
    return [_completion(g, seed, opening, each, most, engine.secret) for g in given]


class _Refused(TomError):
    """The server does not take the request as it is."""


def served(engine: Engine, said: Sequence[Any], over: Event | None = None, **options: Any) -> Any:
    """One answered call to a server; what may pass (a full or broken server) is tried again.

    A server that says when to come back (`Retry-After`) is taken at its word; else the waits grow,
    each by chance, so that many jobs do not come back at once.

    Args:
        engine: Who is asked.
        said: Messages.
        over: Once set, nothing is tried again.
        **options: Of the request.

    Returns:
        LangChain's `LLMResult`, with one message at least.

    Raises:
        TomError: Refused, or no answer after `engine.attempts`.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_when_event_set
    from tenacity.nap import sleep_using_event

    over = over or Event()
    again = Retrying(
        stop=stop_after_attempt(engine.attempts) | stop_when_event_set(over),
        sleep=sleep_using_event(over),
        retry=retry_if_exception(_passes),
        wait=_pause,
        reraise=True,
    )
    try:
        return again(_generate, engine, list(said), options, over)
    except Exception as error:
        kind = _Refused if getattr(error, "status_code", None) in (400, 422) else TomError
        raise kind(f"{engine.name}: no answer: {_short(error, engine.secret)}") from None


def _generate(engine: Engine, said: list[Any], options: dict[str, Any], over: Event) -> Any:
    if over.is_set():  # what waited for its next attempt was woken by it
        raise TomError("stopped")
    result = engine.chat.generate([said], **options)
    if not result.generations or not result.generations[0]:
        raise ValueError("the server sent no choices")
    return result


def _passes(error: BaseException) -> bool:
    """Whether an error may pass: not a refusal (wrong key, unknown model), nor a full context."""
    if not isinstance(error, Exception) or "ontext size" in str(error):
        return False
    if getattr(error, "code", None) == "insufficient_quota":
        return False
    status = getattr(error, "status_code", None)
    return status is None or status in (408, 409, 425, 429) or status >= 500


def _pause(state: Any) -> float:
    """Seconds until the next attempt."""
    from tenacity import wait_random_exponential

    error = state.outcome.exception()
    headers = getattr(getattr(error, "response", None), "headers", {})
    told = _seconds(headers.get("retry-after", ""))
    if told is not None:
        return min(told, LONGEST_PAUSE) + random.random()
    return float(wait_random_exponential(multiplier=1, max=60)(state))


LONGEST_PAUSE = 600.0
"""Most seconds that a server may ask to be left alone for."""


def _seconds(told: str) -> float | None:
    """A `Retry-After` header, in seconds from now: a number or a date; None where it is neither.

    >>> _seconds("20"), _seconds("Wed, 21 Oct 2015 07:28:00 GMT"), _seconds("soon")
    (20.0, 0.0, None)
    """
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _completion(
    generation: Any, seed: int, opening: str, each: int, most: int, secret: str = ""
) -> Completion:
    """`each` is a draw's share of the tokens of its call, for servers that do not say more."""
    info = dict(generation.generation_info or {}) | dict(generation.message.response_metadata or {})
    text = _without(secret, generation.text)
    if opening and text.startswith(opening):  # llama.cpp gives the prefilled opening back
        text = text[len(opening) :]
    finish = "length" if info.get("finish_reason") == "length" else "stop"
    tokens = info.get("new_tokens")
    if tokens is None and isinstance(info.get("logprobs"), dict):
        content = info["logprobs"].get("content")
        tokens = len(content) if isinstance(content, list) and content else None
    if tokens is None:
        tokens = most if finish == "length" else each
    return Completion(text, finish, tokens, seed)


def _short(error: Exception, secret: str = "") -> str:
    line = " ".join(_without(secret, str(error)).split())
    return f"{type(error).__name__}: {line[:300]}"


def _without(secret: str, text: str) -> str:
    return text.replace(secret, "***") if secret else text


def _patience(name: str, default: int) -> int:
    """A whole number above 0 from the environment: seconds until an answer, or attempts."""
    text = os.environ.get(name, "")
    if text and not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise TomError(f"{name} = {text[:40]!r} must be a whole number above 0")
    return int(text) if text else default


# --- llama.cpp and endpoints ----------------------------------------------------------------------


def llamacpp_parameters(
    path: Path, parallel: int, context: int, threads: int | None, key: str
) -> Any:
    """How llama.cpp's server is set up: slots with room for their prompt and answer, on any port."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = parallel
    # One pool of cells for all slots: the shared prompt takes its cells once per slot at worst.
    params.kv_unified = True
    params.n_ctx = parallel * context
    params.port = 0
    params.verbosity = 0
    params.warmup = False
    if threads:
        params.cpuparams.n_threads = threads
    params.api_keys = [key]
    return params


def _open_llamacpp(card: Card, threads: int | None, parallel: int, context: int) -> Engine:
    """llama.cpp's own OpenAI-compatible server, in this process, on loopback with a random key."""
    import xllamacpp
    from langchain_openai import ChatOpenAI

    path = fetch(card)
    key = secrets.token_urlsafe(16)
    try:
        server = xllamacpp.Server(llamacpp_parameters(path, parallel, context, threads, key))
    except Exception as error:
        raise TomError(f"{card.name}: llama.cpp could not load {path}: {_short(error)}") from None
    chat = ChatOpenAI(
        base_url=f"{server.listening_address}/v1",
        api_key=key,  # type: ignore[arg-type]
        model=card.name,
        logprobs=True,
        top_logprobs=1,
        timeout=3600,
        max_retries=0,  # `served` does that
    )
    holder = [server]
    return Engine(
        chat,
        f"llama.cpp (xllamacpp {version('xllamacpp')})",
        parallel,
        secret=key,
        close=holder.clear,
    )


def _open_endpoint(card: Card, parallel: int) -> Engine:
    """A server that speaks the OpenAI protocol; its key comes from the environment."""
    from langchain_openai import ChatOpenAI

    key = os.environ.get(card.api_key_env) if card.api_key_env else "none"
    if not key:
        raise TomError(f"{card.name}: set the environment variable {card.api_key_env} to the key")
    chat = ChatOpenAI(
        base_url=card.base_url,
        api_key=key,  # type: ignore[arg-type]
        model=card.model_id or card.name,
        logprobs=True,
        top_logprobs=1,
        timeout=_patience("TOM_TIMEOUT", 600),
        max_retries=0,  # `served` does that
    )
    return Engine(
        chat,
        f"endpoint ({card.model_id or card.name})",
        parallel,
        prefill=card.prefill,
        attempts=_patience("TOM_ATTEMPTS", 8),
        secret=key if card.api_key_env else "",
    )


# --- Transformers with a shared prefix ------------------------------------------------------------


def _open_transformers(
    card: Card, adapter: Path | None, threads: int | None, quantize: str
) -> Engine:
    import torch

    if threads:
        torch.set_num_threads(threads)
    model, tokenizer = load_transformers(card, quantize=quantize)
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except Exception as error:  # the library's own, safetensors', torch's
            raise TomError(f"{adapter}: the adapter cannot be loaded: {_short(error)}") from None
        if not quantize:
            model = model.merge_and_unload()
    model.eval()
    if not quantize and model.device.type == "cpu":
        pack(model)
    chat = shared_prefix_chat(model, tokenizer)

    def close() -> None:
        chat.__dict__.clear()
        gc.collect()

    return Engine(chat, f"transformers {version('transformers')}", 1 << 30, close=close)


def load_transformers(card: Card, *, quantize: str = "") -> tuple[Any, Any]:
    """A card's model and tokenizer: fp32 on a CPU, bf16 on a GPU, or 4-bit NF4.

    Raises:
        TomError: The weights cannot be had, or NF4 is asked for without a GPU.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(transformers_folder(card))
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": torch.bfloat16 if gpu else torch.float32}
    if quantize == "nf4":
        if not gpu:
            raise TomError(f"{card.name}: 4-bit NF4 needs a GPU; set quantize = '' in the profile")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif quantize:
        raise TomError(f"quantize = {quantize!r}: only '' and 'nf4' are known")
    if gpu:
        from accelerate import PartialState

        state = PartialState()  # `accelerate launch`: each process has a GPU of its own
        options["device_map"] = {"": state.device} if state.num_processes > 1 else "auto"
    options |= {"use_safetensors": True, "attn_implementation": "sdpa"}
    try:
        return (
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )
    except Exception as error:  # the library's own, safetensors', torch's
        raise TomError(f"{card.name}: {folder} cannot be loaded: {_short(error)}") from None


def pack(model: Any) -> None:
    """Lay a model's weights out as oneDNN's kernels read them, in place, for inference on a CPU.

    Otherwise every product of a few dozen rows first packs the whole weight anew, which costs as much
    as the product. The plain weights are given up; a packed model cannot be trained.
    """
    import torch

    if not torch.backends.mkldnn.is_available():
        return

    class Packed(torch.nn.Module):  # type: ignore[misc]
        weight: Any
        bias: Any

        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            plain = linear.weight.detach()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(plain, PACKED_ROWS)
            self.bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, x: Any) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child.weight.dtype == torch.float32:
                setattr(module, name, Packed(child))


PACKED_ROWS = 64
"""Rows of a product that the packed layout is chosen for."""


def free_memory(device: Any) -> int:
    """Bytes that can still be had on a device: free on the GPU, available on the machine."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def prompt_text(tokenizer: Any, messages: "Sequence[BaseMessage]") -> str:
    """Messages in the model's own chat template, the last AIMessage as the start of the answer."""
    roles = {"system": "system", "human": "user", "ai": "assistant"}
    said = [{"role": roles[m.type], "content": str(m.content)} for m in messages]
    opening = said.pop()["content"] if said[-1]["role"] == "assistant" else ""
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return text + opening


def prompt_tokens(tokenizer: Any, messages: "Sequence[BaseMessage]") -> list[int]:
    """Token ids of `prompt_text`, the same for asking, training and scoring."""
    text = prompt_text(tokenizer, messages)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on from another, as a model would generate them.

    Taken alone, a text gets a space put before it by many tokenizers (SentencePiece's).
    """
    line = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    both = list(tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
    if both[: len(line)] == line:
        return both[len(line) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Prefix:
    """A prompt that has been read: its keys and values, once, and what comes next."""

    tokens: list[int]
    keys: list[Any]
    """Per layer, `[kv heads, prompt, head dim]`."""
    values: list[Any]
    logits: Any
    """`[vocabulary]` after the last token, fp32."""

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in [*self.keys, *self.values])


class _Branches:
    """A Transformers cache for rows that branch off prefixes: holds the rows' own tokens only.

    Rows are ordered by prefix, so that each prefix meets its rows as one block. Speaks the part of
    the cache protocol that a decoder's forward pass uses.
    """

    is_compileable = False

    def __init__(self, prefixes: Sequence[Prefix], owner: Sequence[int], room: int) -> None:
        like = prefixes[0].keys[0]
        heads, _, width = like.shape
        self.prefixes = list(prefixes)
        self.own(owner)
        self.length = 0
        shape = (len(owner), heads, room, width)
        # Layer by layer, for a large model's layers lie on several devices.
        self.keys = [layer.new_empty(shape) for layer in prefixes[0].keys]
        self.values = [layer.new_empty(shape) for layer in prefixes[0].keys]

    def own(self, owner: Sequence[int]) -> None:
        """Say which prefix each row branches off; in ascending order."""
        self.owner = list(owner)
        self.blocks = [
            (prefix, bisect_left(self.owner, i), bisect_right(self.owner, i))
            for i, prefix in enumerate(self.prefixes)
            if i in self.owner
        ]

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        start, stop = self.length, self.length + key.shape[2]
        self.keys[layer][:, :, start:stop] = key
        self.values[layer][:, :, start:stop] = value
        if layer == len(self.keys) - 1:
            self.length = stop
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named more than once."""
        at = list(rows)
        if at == list(range(len(self.owner))):
            return
        for part in (self.keys, self.values):
            for layer, old in enumerate(part):
                new = old.new_empty(len(at), *old.shape[1:])
                new[:, :, : self.length] = old[at, :, : self.length]
                part[layer] = new
        self.own([self.owner[row] for row in at])

    def positions(self) -> list[int]:
        """The position of the next token of each row."""
        return [len(self.prefixes[i].tokens) + self.length for i in self.owner]

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_query_offset(self, *_: Any) -> int:
        return self.length


_reading: list[_Branches] = []
"""The branches that the forward pass under way belongs to: attention is called without a cache."""


def plain_attention(model: str, options: dict[str, Any], length: int) -> None:
    """Refuse a model whose attention does more than softmax over all that came before.

    Raises:
        TomError: It has capped scores, sinks, or a window shorter than `length` tokens, which are not
            computed here.
    """
    for option in ("sliding_window", "softcap", "s_aux"):
        known = options.get(option)
        if known is not None and not (option == "sliding_window" and length <= known):
            raise TomError(
                f"{model}: its attention has {option} = {str(options[option])[:20]}, which the shared "
                "prefix does not compute; use the engine 'llamacpp' or 'endpoint', or another model"
            )


def _shared_prefix_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """One new token per row against a prefix that many rows share, then the row's own tokens.

    All rows of a prefix meet it as one matrix product, so its keys and values are neither copied nor
    read once per row. query `[rows, heads, 1, d]`, key and value `[rows, kv heads, own, d]`.
    """
    import torch

    longest = max(len(prefix.tokens) for prefix, _, _ in _reading[-1].blocks) + key.shape[2]
    plain_attention(type(module).__name__, options, longest)
    layer = module.layer_idx
    rows, heads, _, d = query.shape
    kv = key.shape[1]
    group = heads // kv
    scale = scaling if scaling is not None else d**-0.5
    q = (query * scale).view(rows, kv, group, d)
    own = torch.matmul(q, key.transpose(2, 3))
    out = torch.empty_like(q)
    for prefix, start, stop in _reading[-1].blocks:
        some, n = stop - start, len(prefix.tokens)
        flat = q[start:stop].permute(1, 0, 2, 3).reshape(kv, some * group, d)
        shared = torch.matmul(flat, prefix.keys[layer].transpose(1, 2))
        shared = shared.view(kv, some, group, n).permute(1, 0, 2, 3)
        score = torch.cat([shared, own[start:stop]], dim=-1)
        weight = torch.softmax(score, dim=-1, dtype=torch.float32).to(query.dtype)
        over = weight[..., :n].permute(1, 0, 2, 3).reshape(kv, some * group, n)
        seen = torch.matmul(over, prefix.values[layer]).view(kv, some, group, d)
        torch.matmul(weight[..., n:], value[start:stop], out=out[start:stop])
        out[start:stop] += seen.permute(1, 0, 2, 3)
    return out.view(rows, 1, heads, d), None


@contextmanager
def _attending(model: Any, branches: _Branches) -> Iterator[None]:
    """Let the model's attention read `branches` for the length of a forward pass."""
    from transformers import AttentionInterface

    AttentionInterface.register("tom_shared_prefix", _shared_prefix_attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = "tom_shared_prefix"
    _reading.append(branches)
    try:
        yield
    finally:
        _reading.pop()
        model.config._attn_implementation = before


KEPT = 0.15
"""Share of the free memory that prompts may keep once they are read."""


def common_start(a: list[int], b: list[int]) -> int:
    """How many tokens two prompts share at the start; the last of `b` is always left to read."""
    most = min(len(a), len(b) - 1)
    for i in range(most):
        if a[i] != b[i]:
            return i
    return most


class SharedPrefixReader:
    """A causal language model that reads a prompt once and branches off it.

    Args:
        model: A Transformers causal language model (rotary positions, full attention).
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._prefixes: deque[Prefix] = deque()
        self._room = int(KEPT * free_memory(model.device))
        stop = model.generation_config.eos_token_id
        ends = stop if isinstance(stop, list) else [stop]
        self.ends = {int(e) for e in [*ends, tokenizer.eos_token_id] if e is not None}

    def read(self, tokens: list[int]) -> Prefix:
        """Read a prompt; what it has in common with one read before is not read again."""
        import torch
        from transformers import DynamicCache

        for known in self._prefixes:
            if known.tokens == tokens:
                return known
        common, last = 0, None
        for known in self._prefixes:
            shared = common_start(known.tokens, tokens)
            if shared > common:
                common, last = shared, known
        cache = DynamicCache()
        if last is not None:
            for layer, (k, v) in enumerate(zip(last.keys, last.values, strict=True)):
                cache.update(k[None, :, :common], v[None, :, :common], layer)
        device = self.model.device
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([tokens[common:]], device=device),
                position_ids=torch.arange(common, len(tokens), device=device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        prefix = Prefix(
            tokens,
            [layer.keys[0] for layer in cache.layers],
            [layer.values[0] for layer in cache.layers],
            out.logits[0, -1].float(),
        )
        self._prefixes.append(prefix)
        while sum(known.size for known in self._prefixes) > self._room and len(self._prefixes) > 1:
            self._prefixes.popleft()
        return prefix

    def rows_that_fit(self, new_tokens: int) -> int:
        """Rows of a batch that the free memory holds: their own keys and values, and their logits."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        cached = 2 * config.num_hidden_layers * heads * width * new_tokens
        # Logits, their softmax and one copy; the widest layer's activations are small beside them.
        scored = 4 * config.vocab_size
        # Rows are copied when some leave the batch, so the cache counts twice; half stays free.
        each = (2 * cached + scored) * 4
        return max(1, int(0.5 * free_memory(self.model.device) / each))

    def step(self, branches: _Branches, tokens: Sequence[int]) -> Any:
        """One more token on every branch: tokens `[rows]` -> logits `[rows, vocabulary]`, fp32."""
        import torch

        device = self.model.device
        with torch.inference_mode(), _attending(self.model, branches):
            out = self.model(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                position_ids=torch.tensor(branches.positions(), device=device)[:, None],
                past_key_values=branches,
                use_cache=True,
            )
        return out.logits[:, -1].float()

    def sample(
        self,
        prompts: Sequence[list[int]],
        owner: Sequence[int],
        seeds: Sequence[int],
        *,
        temperature: float,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        repetition_penalty: float = 1.0,
        decided: Sequence[Decided | None] | None = None,
    ) -> list[tuple[list[int], str]]:
        """Draw one continuation per seed.

        Args:
            prompts: Token ids of one or more prompts.
            owner: For each draw, the number of its prompt; ascending.
            seeds: One per draw. A draw depends on its own seed, prompt and the settings alone.
            temperature: 0 is greedy.
            top_p: Nucleus; 1 is off.
            max_new_tokens: Most tokens per draw.
            repetition_penalty: As in Transformers; 1 is off.
            decided: Per prompt, when a draw may stop.

        Returns:
            Per draw: token ids without the end token, and `stop` or `length`.
        """
        most = self.rows_that_fit(max_new_tokens)
        out: list[tuple[list[int], str]] = []
        for at in range(0, len(seeds), most):
            some = list(owner[at : at + most])
            first, last = some[0], some[-1] + 1
            out += self._sample(
                prompts[first:last],
                [o - first for o in some],
                seeds[at : at + most],
                temperature,
                top_p,
                max_new_tokens,
                repetition_penalty,
                decided[first:last] if decided else None,
            )
        return out

    def _sample(
        self,
        prompts: Sequence[list[int]],
        owner: Sequence[int],
        seeds: Sequence[int],
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        repetition_penalty: float,
        decided: Sequence[Decided | None] | None,
    ) -> list[tuple[list[int], str]]:
        import torch

        prefixes = [self.read(tokens) for tokens in prompts]
        n = len(seeds)
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(s)).random(max_new_tokens) for s in seeds]
        )
        said: list[list[int]] = [[] for _ in range(n)]
        finish = ["length"] * n
        # Draws with the same prompt that have said the same so far are one row of the batch.
        row = np.asarray(owner, dtype=np.int64)
        row_owner = list(range(len(prefixes)))
        row_said: list[list[int]] = [[] for _ in prefixes]
        live = np.arange(n)
        branches: _Branches | None = None
        logits = torch.stack([prefix.logits for prefix in prefixes])
        for step in range(max_new_tokens):
            if repetition_penalty != 1.0:
                before = [
                    [*prompts[o], *words] for o, words in zip(row_owner, row_said, strict=True)
                ]
                logits = _penalized(logits, before, repetition_penalty)
            chosen = _choose(logits, row[live], uniforms[live, step], temperature, top_p)
            children: dict[tuple[int, int], int] = {}
            verdict: dict[tuple[int, int], bool] = {}
            going: list[int] = []
            for draw, token in zip(live.tolist(), chosen.tolist(), strict=True):
                at = (int(row[draw]), token)
                if token in self.ends:
                    finish[draw] = "stop"
                    continue
                said[draw].append(token)
                until = decided[owner[draw]] if decided else None
                if until is not None:
                    if at not in verdict:
                        verdict[at] = until(self.tokenizer.decode(said[draw]))
                    if verdict[at]:
                        finish[draw] = "stop"
                        continue
                row[draw] = children.setdefault(at, len(children))
                going.append(draw)
            live = np.array(going, dtype=np.int64)
            if not going or step + 1 == max_new_tokens:
                break
            parents = [parent for parent, _ in children]
            row_owner = [row_owner[parent] for parent in parents]
            row_said = [[*row_said[parent], token] for parent, token in children]
            if branches is None:
                branches = _Branches(prefixes, row_owner, max_new_tokens)
            else:
                branches.select(parents)
            logits = self.step(branches, [token for _, token in children])
        return list(zip(said, finish, strict=True))

    def option_probabilities(
        self,
        tokens: list[int],
        options: Sequence[str],
        temperature: float,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> tuple[np.ndarray, float]:
        """Exact probability that the continuation is each option, and ends there.

        Where the opening ends in a quote, an option ends with the closing quote (a model that goes on
        "C or D" has not chosen); a number ends with anything that cannot go on a number or a word.

        The prompt is read once; all options are scored as one batch that branches off it.

        Args:
            tokens: The prompt, opening included.
            options: Texts such as `["C", "D"]` or `["0", ..., "10"]`.
            temperature: The sampling temperature (> 0) at which the probabilities hold.
            top_p: Nucleus; 1 is off.
            repetition_penalty: As in Transformers; 1 is off.

        Returns:
            Probabilities `[options]` and their sum, the mass that the options cover.
        """
        import torch

        temperature = max(temperature, 1e-6)  # at 0, whatever is most likely
        prefix = self.read(tokens)
        quoted = self.tokenizer.decode(tokens[-3:]).endswith('"')
        closing = self._quote if quoted else self._boundary
        ids = [continuation(self.tokenizer, o) for o in options]
        longest = max(map(len, ids))
        branches = _Branches([prefix], [0] * len(ids), longest)

        def shares(logits: Any, said: list[list[int]]) -> Any:
            # In double: over a whole vocabulary fp32 sums are off by up to 1e-4.
            if repetition_penalty != 1.0:
                logits = _penalized(
                    logits, [[*tokens, *words] for words in said], repetition_penalty
                )
            return _nucleus(torch.softmax(logits.double() / temperature, -1), top_p)

        first = shares(prefix.logits[None], [[]])[0]
        logp = np.array([float(torch.log(first[i[0]])) for i in ids])
        ends = torch.zeros(len(ids), device=prefix.logits.device, dtype=torch.float64)
        for at in range(longest):
            feed = [i[min(at, len(i) - 1)] for i in ids]
            follow = shares(self.step(branches, feed), [i[: at + 1] for i in ids])
            for row, option in enumerate(ids):
                if at == len(option) - 1:
                    ends[row] = follow[row, closing].sum()
                elif at < len(option) - 1:
                    logp[row] += float(torch.log(follow[row, option[at + 1]]))
        p = np.exp(logp) * ends.cpu().numpy()
        return p, float(p.sum())

    @cached_property
    def _boundary(self) -> Any:
        """`[vocabulary]` bool: tokens that cannot go on a word or a number (the end included)."""
        return self._starting(lambda head: head != "" and not (head.isalnum() or head in "_.�"))

    @cached_property
    def _quote(self) -> Any:
        """`[vocabulary]` bool: tokens that start with a quote (the end included)."""
        return self._starting(lambda head: head == '"')

    def _starting(self, fits: Callable[[str], bool]) -> Any:
        import torch

        size = self.model.get_output_embeddings().weight.shape[0]
        mask = torch.zeros(size, dtype=torch.bool)
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        for i, text in enumerate(texts):
            mask[i] = i in self.ends or fits(text[:1])
        return mask.to(self.model.device)


def _choose(
    logits: Any, rows: np.ndarray, uniform: np.ndarray, temperature: float, top_p: float
) -> Any:
    """Inverse-transform sampling: draw i takes its token from row `rows[i]` with its own uniform.

    logits `[rows, vocabulary]`, rows and uniform `[draws]` -> token ids `[draws]`.
    """
    import torch

    at = torch.as_tensor(rows, device=logits.device)
    if temperature == 0:
        return logits.argmax(-1)[at]
    if len(logits) > FEW:
        # In parts, so that what is made on the way is small enough to be had without new memory.
        chosen = torch.empty_like(at)
        for start in range(0, len(logits), FEW):
            mine = np.flatnonzero((rows >= start) & (rows < start + FEW))
            if len(mine):
                some = logits[start : start + FEW], rows[mine] - start, uniform[mine]
                chosen[mine] = _choose(*some, temperature, top_p)
        return chosen
    p = _nucleus(torch.softmax(logits / temperature, -1), top_p)
    # In two levels, since a running sum over the whole vocabulary costs more than the model's step
    # where rows are many: first the block, by the blocks' sums, then the token within it.
    size = p.shape[-1]
    p = torch.nn.functional.pad(p, (0, -size % BLOCK)).view(len(p), -1, BLOCK)
    mass = p.sum(-1, dtype=torch.float64).cumsum(-1)
    u = torch.as_tensor(uniform, device=logits.device, dtype=torch.float64) * mass[at, -1]
    block = torch.searchsorted(mass[at], u[:, None], right=True)[:, 0].clamp(max=p.shape[1] - 1)
    before = torch.where(block > 0, mass[at, (block - 1).clamp(min=0)], torch.zeros_like(u))
    within = p[at, block].cumsum(-1, dtype=torch.float64)
    # Rounding may put the rest at the block's very end, where no token is.
    rest = torch.minimum(u - before, within[:, -1] * (1 - 1e-12))
    token = torch.searchsorted(within, rest[:, None], right=True)[:, 0].clamp(max=BLOCK - 1)
    return block * BLOCK + token


def _nucleus(p: Any, top_p: float) -> Any:
    """`[rows, vocabulary]`: the most probable tokens that make up `top_p`, the rest at 0."""
    import torch

    if top_p == 1:
        return p
    ordered, index = p.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0
    kept = torch.zeros_like(p).scatter(-1, index, ordered)
    return kept / kept.sum(-1, keepdim=True)


FEW = 8
"""Rows whose probabilities are held at a time."""

BLOCK = 512
"""Vocabulary entries that are summed before a draw looks for its token among them."""


def _penalized(logits: Any, before: list[list[int]], penalty: float) -> Any:
    """Divide (or, below zero, multiply) the logits of tokens that have occurred, as Transformers."""
    import torch

    logits = logits.clone()
    for row, words in enumerate(before):
        seen = torch.tensor(sorted(set(words)), device=logits.device)
        score = logits[row, seen]
        logits[row, seen] = torch.where(score < 0, score * penalty, score / penalty)
    return logits


def shared_prefix_chat(model: Any, tokenizer: Any) -> "BaseChatModel":
    """`SharedPrefixReader` as a LangChain chat model.

    `generate([messages], n=..., seed=...)` or `seeds=[...]` draws; `.reader` is the reader itself.
    Messages end with an AIMessage where the answer's opening is fixed.
    """
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import ChatGeneration, ChatResult

    class SharedPrefixChat(BaseChatModel):
        reader: Any

        @property
        def _llm_type(self) -> str:
            return "shared-prefix-transformers"

        def _generate(
            self,
            messages: list["BaseMessage"],
            stop: list[str] | None = None,
            run_manager: Any = None,
            *,
            n: int = 1,
            seed: int = 0,
            seeds: Sequence[int] | None = None,
            temperature: float = 0.8,
            top_p: float = 1.0,
            max_new_tokens: int = 128,
            repetition_penalty: float = 1.0,
            decided: Decided | None = None,
            **_: Any,
        ) -> ChatResult:
            tokens = prompt_tokens(self.reader.tokenizer, messages)
            own = list(seeds) if seeds is not None else [seed + i for i in range(n)]
            drawn = self.reader.sample(
                [tokens],
                [0] * len(own),
                own,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                repetition_penalty=repetition_penalty,
                decided=[decided],
            )
            return ChatResult(
                generations=[
                    ChatGeneration(
                        message=AIMessage(content=self.reader.tokenizer.decode(ids)),
                        generation_info={"finish_reason": finish, "new_tokens": len(ids)},
                    )
                    for ids, finish in drawn
                ]
            )

    return SharedPrefixChat(reader=SharedPrefixReader(model, tokenizer))
