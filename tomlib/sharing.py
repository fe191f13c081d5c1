"""Transformers with a shared prefix: a prompt is read once, whatever the number of draws.

Nearly all of the work in such a study is the same prompt read again. So a `SharedPrefixReader` reads
a prompt once, draws from it and reads exact probabilities off it; `shared_prefix_chat` makes it a
LangChain chat model:

- the tokens that a prompt has in common with the one before it (a context's system prompt) are kept;
- the prompt's keys and values are stored once and attended to by all draws as one matrix product;
- draws that have said the same so far are one row of the batch, so that 300 one-letter choices cost
  one prompt and a step over the few distinct letters;
- finished draws leave the batch; where only the choice is wanted, a draw is finished once decided.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tomlib.errors import TomError, short
from tomlib.models import Card
from tomlib.weights import transformers_folder

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import BaseMessage

Decided = Callable[[str], bool]
"""Whether a completion (without its opening) has said all that is wanted."""


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
        raise TomError(f"{card.name}: {folder} cannot be loaded: {short(error)}") from None


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
