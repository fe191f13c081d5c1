"""LangChain chat models that play the games: Transformers, llama.cpp, any OpenAI-compatible endpoint.

`open_engine` gives an `Engine`: a LangChain `BaseChatModel` with a name, and how to close it.
`ask` draws completions from it: from our own chat model as one batch (`sharing`), from a server in
calls that are made again where that may help.
"""

import gc
import os
import random
import re
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from tomlib.errors import TomError, short, without
from tomlib.models import Card, engine_of
from tomlib.sharing import Decided, load_transformers, pack, prompt_tokens, shared_prefix_chat
from tomlib.weights import fetch

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import BaseMessage


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
    address: str = ""
    """Where a server is, for its errors."""
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
    kind = engine_of(card, engine)
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
    if opening and engine.prefill == "none":  # the answer is the server's from its first character
        said, opening = said[:-1], ""
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
        where = f" at {engine.address}" if engine.address else ""
        raise kind(f"{engine.name}{where}: no answer: {short(error, engine.secret)}") from None


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
    text = without(secret, generation.text)
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
        raise TomError(f"{card.name}: llama.cpp could not load {path}: {short(error)}") from None
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
        # They say how many tokens a draw has; hosted services may refuse to be asked.
        logprobs=None if card.prefill == "none" else True,
        top_logprobs=None if card.prefill == "none" else 1,
        timeout=_patience("TOM_TIMEOUT", 600),
        max_retries=0,  # `served` does that
    )
    return Engine(
        chat,
        f"endpoint ({card.model_id or card.name})",
        parallel,
        prefill=card.prefill,
        attempts=_patience("TOM_ATTEMPTS", 8),
        address=card.base_url,
        secret=key if card.api_key_env else "",
    )


# --- Transformers ---------------------------------------------------------------------------------


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
            raise TomError(f"{adapter}: the adapter cannot be loaded: {short(error)}") from None
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
