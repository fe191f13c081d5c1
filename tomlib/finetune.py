"""Fine-tuning the student on the teacher's answers: rows, shared-prefix LoRA, adapters.

Rows of one scenario have the same prompt, and the prompt is most of a row; prompts of one context
begin alike. So a training sequence is a tree: what the prompts of a context share, then each prompt's
own part followed by its answers. A prompt sees what is shared and itself, an answer its prompt and
itself; positions count along a branch. Loss and gradients are those of the rows taken one by one; what
is shared is paid for once, forward and backward.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tomlib import stats
from tomlib.errors import TomError
from tomlib.ledger import hold
from tomlib.models import Card, card
from tomlib.profiles import Run
from tomlib.prompts import Wording, messages, opening, prompt_id
from tomlib.scenarios import Scenario
from tomlib.sharing import (
    common_start,
    continuation,
    free_memory,
    load_transformers,
    plain_attention,
    prompt_tokens,
)
from tomlib.weights import weights_id

ANSWERS_PER_PROMPT = 16
"""Most answers that follow one prompt in a training sequence."""

CHECKPOINT_SECONDS = 60.0

ROW_COLUMNS = ["context", "game", "answer", "prompt", "text", "ended", "weight", "held_out"]


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA adapter on disk."""

    folder: Path
    fingerprint: str
    """First 16 hex of the sha256 of everything that decides the training."""

    @property
    def whole(self) -> bool:
        """Whether its weights are there: of what chapters try, a shipped run has the record alone."""
        return (self.folder / "adapter_model.safetensors").is_file()

    @property
    def log(self) -> pd.DataFrame:
        """One row per optimizer step: `step, epoch, loss, heldout_loss, learning_rate, seconds`."""
        return pd.read_csv(self.folder / "log.csv")

    @property
    def record(self) -> dict[str, Any]:
        """What was trained on what, and how: the folder's `training.json`."""
        record: dict[str, Any] = json.loads((self.folder / "training.json").read_text("utf-8"))
        return record


# --- rows -----------------------------------------------------------------------------------------


def rows(run: Run, draws: pd.DataFrame) -> pd.DataFrame:
    """Training rows from a teacher's draws (paper, section "Fine-tuning").

    A row is (system prompt, game prompt, answer); only draws whose choice could be read are used.
    Equal answers to the same prompt are one row with their number as weight.

    Args:
        run: Gives wording, held-out share and seed.
        draws: As from `collect`, of two-player scenarios.

    Returns:
        Columns `ROW_COLUMNS`; `text` goes on from the opening, `ended` says whether the model ended
        it (or it was cut at the token limit).
    """
    usable = draws[draws["outcome"] == "ok"]
    where = {s.key: s for s in run.scenarios(list(dict.fromkeys(draws["split"])))}
    limit = {form: run.profile.tokens(form) for form in set(usable["answer"])}
    prompts = {
        (key, form): prompt_id(scenario, form, run.wording)
        for key, scenario in where.items()
        for form in limit
    }
    built = []
    for draw in usable.to_dict("records"):
        key = (draw["split"], draw["context"], draw["game"])
        scenario, form, text = where[key], str(draw["answer"]), str(draw["text"])
        start = opening(scenario, form, run.wording)
        cut = pd.notna(draw["new_tokens"]) and int(draw["new_tokens"]) >= limit[form]
        if form == "choice" or not text.startswith(start):
            # Stopped at the letter, or of a server that does not go on with a started answer.
            text, cut = _as_asked(start, form, draw), False
        built.append(
            (
                scenario.context.name,
                scenario.game.name,
                form,
                prompts[key, form],
                text.removeprefix(start),
                not cut,
            )
        )
    frame = pd.DataFrame(built, columns=ROW_COLUMNS[:6])
    frame = frame.groupby(ROW_COLUMNS[:6], sort=False).size().rename("weight").reset_index()
    chance = np.random.default_rng(run.profile.seed).permutation(len(frame))
    frame["held_out"] = chance < round(run.profile.held_out * len(frame))
    return frame


def _as_asked(start: str, form: str, draw: Mapping[Any, Any]) -> str:
    """What a draw says, in the words that the answer form asks for."""
    said = {"choice": draw["choice"]}
    if form == "choice+motivation":
        said["motivation"] = draw["motivation"] or ""
    if form == "reasoning+choice":
        said = {"reasoning": draw["motivation"] or "", **said}
    text = json.dumps(said, ensure_ascii=False)
    if not text.startswith(start):
        raise TomError(f"wordings.toml: answers of the form {form!r} cannot start with {start!r}")
    return text


def letter_rows(run: Run, counts: pd.DataFrame) -> pd.DataFrame:
    """Training rows from counts of choices: one row per scenario and letter, weighted by its count.

    Args:
        run: Gives the wording; copies of the prompts in other words, to which the same distribution
            is carried over (`published_copies`); and whether the counts or their additive fit
            (`published_targets`) are the weights.
        counts: Columns `split, context, game, cooperate, defect`.

    Returns:
        Columns `ROW_COLUMNS`; nothing is held out.
    """
    where = {s.key: s for s in run.scenarios(list(dict.fromkeys(counts["split"])))}
    keys = zip(counts["split"], counts["context"], counts["game"], strict=True)
    counts = counts[[key in where for key in keys]]
    if run.profile.published_targets == "additive":
        counts = stats.additive(counts)
    built = []
    for wording in (run.wording, *run.copies):
        for cell in counts.to_dict("records"):
            scenario = where[(cell["split"], cell["context"], cell["game"])]
            prompt = prompt_id(scenario, "choice", wording)
            shares = cell["cooperate"], cell["defect"]
            for letter, n in zip("DC" if wording.relabelled else "CD", shares, strict=True):
                said = f'{letter}"}}'
                built.append(
                    (cell["context"], cell["game"], "choice", prompt, said, True, n, False)
                )
    return pd.DataFrame(built, columns=ROW_COLUMNS)


# --- the shared-prefix loss -----------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One prompt and answers to it, as token ids; each answer counts by its weight."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]

    @property
    def mass(self) -> float:
        """Weighted number of answer tokens: what the loss is divided by, summed over a batch."""
        return sum(w * len(a) for w, a in zip(self.weights, self.answers, strict=True))

    @property
    def tokens(self) -> int:
        """Tokens of the training sequence: the prompt once, and every answer."""
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class _Branch:
    """Where a prompt's own part and its answers stand in the sequence."""

    start: int
    answers: int
    """Where the own part ends and the answers begin."""
    lengths: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.answers + sum(self.lengths)


@dataclass(frozen=True)
class _Layout:
    """The sequence whose forward pass is under way: what prompts share, then each prompt's own."""

    shared: int
    branches: tuple[_Branch, ...]


_layouts: list[_Layout] = []


def _answers_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """The tree's attention without a mask over all of it: no product is made only to be hidden.

    What prompts share attends to itself, causally; a prompt's own part to both; an answer to its
    prompt and, causally, to itself. query `[1, heads, tokens, d]`, key and value
    `[1, kv heads, tokens, d]`.
    """
    import torch
    import torch.nn.functional as F

    plain_attention(type(module).__name__, options, query.shape[2])
    layout = _layouts[-1]
    n = layout.shared
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, 1)
    value = value.repeat_interleave(group, 1)
    scale = scaling if scaling is not None else query.shape[3] ** -0.5

    def prompt_part(start: int, stop: int, keys: Any, values: Any) -> Any:
        seen, new = keys.shape[2], stop - start
        later = None
        if seen > new:
            later = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)
        return F.scaled_dot_product_attention(
            query[:, :, start:stop], keys, values, later, is_causal=later is None, scale=scale
        )

    parts = [prompt_part(0, n, key[:, :, :n], value[:, :, :n])] if n else []
    for branch in layout.branches:
        own = slice(branch.start, branch.answers)
        keys = torch.cat([key[:, :, :n], key[:, :, own]], 2)
        values = torch.cat([value[:, :, :n], value[:, :, own]], 2)
        parts.append(prompt_part(own.start, own.stop, keys, values))
        tail = slice(branch.answers, branch.stop)
        q, k, v = (x[0, :, tail] for x in (query, key, value))
        parts.append(_answers(q, k, v, keys[0], values[0], branch.lengths, scale)[None])
    return torch.cat(parts, 2).transpose(1, 2), None


def _answers(
    query: Any, key: Any, value: Any, keys: Any, values: Any, lengths: tuple[int, ...], scale: float
) -> Any:
    """Attention of one prompt's answers, padded to one length, side by side as a batch.

    query, key, value `[heads, tokens, d]` of the answers, keys and values `[heads, n, d]` of their
    prompt.
    """
    import torch

    n, longest = keys.shape[1], max(lengths)
    place, keep = _padding(lengths, longest, query.device)
    # index_select: the gradient of plain indexing adds up one element after the other.
    q, k, v = (x.index_select(1, place).unflatten(1, (-1, longest)) for x in (query, key, value))
    shared = (q.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, (-1, longest))
    later = torch.ones(longest, longest, dtype=torch.bool, device=q.device).triu(1)
    own = (q @ k.transpose(2, 3)).masked_fill(later, -torch.inf)
    weight = torch.softmax(torch.cat([shared, own], -1) * scale, -1, dtype=torch.float32)
    weight = weight.to(q.dtype)
    seen = (weight[..., :n].flatten(1, 2) @ values).view(q.shape)
    return (seen + weight[..., n:] @ v).flatten(1, 2).index_select(1, keep)


def _padding(lengths: tuple[int, ...], longest: int, device: Any) -> tuple[Any, Any]:
    """Indices `[answers * longest]` into the answers' tokens, and `[tokens]` back into the padded."""
    import torch

    start = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    inside = np.arange(longest)[None] < np.asarray(lengths)[:, None]
    # What pads an answer is its own first token; nothing that counts looks at it.
    place = np.where(inside, start[:, None] + np.arange(longest)[None], start[:, None])
    keep = np.flatnonzero(inside.ravel())
    return torch.as_tensor(place.ravel(), device=device), torch.as_tensor(keep, device=device)


@contextmanager
def _answering(model: Any, layout: _Layout) -> Iterator[None]:
    """Let the model's attention follow `layout` for the length of a forward pass."""
    from transformers import AttentionInterface

    AttentionInterface.register("tom_answers", _answers_attention)
    config = getattr(model, "module", model).config  # wrapped, where processes train together
    before = config._attn_implementation
    config._attn_implementation = "tom_answers"
    _layouts.append(layout)
    try:
        yield
    finally:
        _layouts.pop()
        config._attn_implementation = before


HEAD_ROWS = 256
"""Positions whose logits are held at a time: a vocabulary is wide."""


def _linear_nll(hidden: Any, head: Any, targets: Any, back: Any, weights: Any, scale: float) -> Any:
    """Weighted negative log-likelihood of targets under `hidden @ head.T / scale`, logits never kept.

    The gradient with respect to `hidden` is made in the forward pass, while the logits are there.
    hidden `[positions, width]`, head `[vocabulary, width]` (frozen), targets, back (which position
    predicts the target) and weights `[targets]`.
    """
    import torch

    class LinearNLL(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, states: Any) -> Any:
            total = torch.zeros((), dtype=torch.float32, device=states.device)
            grad = torch.empty_like(states) if states.requires_grad else None
            # One buffer for all: a fresh one each time costs as much as an eighth of the product.
            room = states.new_empty(min(len(states), HEAD_ROWS), len(head))
            for at in range(0, len(states), HEAD_ROWS):
                some = states[at : at + HEAD_ROWS]
                mine = (back >= at) & (back < at + len(some))
                row, word, weight = back[mine] - at, targets[mine], weights[mine]
                logits = torch.mm(some, head.T, out=room[: len(some)]).float()
                if scale != 1.0:
                    logits.div_(scale)
                said = logits[row, word]
                # In place and by hand: each pass over the logits reads all of a vocabulary's memory.
                top = logits.amax(-1)
                p = logits.sub_(top[:, None]).exp_()
                mass = p.sum(-1)
                total += (weight * ((top + mass.log())[row] - said)).sum()
                if grad is not None:
                    heavy = torch.zeros_like(mass).index_add_(0, row, weight)
                    pull = (p.to(head.dtype) @ head).float().mul_((heavy / mass)[:, None])
                    pull.index_add_(0, row, head[word].float() * -weight[:, None])
                    grad[at : at + HEAD_ROWS] = pull / scale
            ctx.grad = grad
            return total

        @staticmethod
        def backward(ctx: Any, outer: Any) -> Any:
            return ctx.grad * outer

    return LinearNLL.apply(hidden)


def group_nll(
    model: Any, groups: Sequence[Group], temperature: float = 1.0, head: Any = None
) -> Any:
    """Weighted sum of the answers' negative log-likelihoods, in nats, from one forward pass.

    Args:
        model: A causal language model (adapter included).
        groups: Prompts and their answers; what the prompts have in common is read once.
        temperature: Divides the logits; 1 is plain SFT.
        head: The frozen output weights `[vocabulary, width]` where `headless` took them off the
            model; the model's own output layer otherwise.

    Returns:
        A scalar tensor with gradient.
    """
    import torch

    first = next(model.parameters())
    device = first.device
    shared = _in_common(groups)
    ids = list(groups[0].prompt[:shared])
    place = list(range(shared))
    branches: list[_Branch] = []
    targets: list[int] = []
    weights: list[float] = []
    predictor: list[int] = []
    for group in groups:
        start, n = len(ids), len(group.prompt)
        answers = start + n - shared
        ids += group.prompt[shared:]
        place += range(shared, n)
        for answer, weight in zip(group.answers, group.weights, strict=True):
            # The last token of an answer predicts nothing that counts, but keeps the layout plain.
            predictor += [answers - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            ids += answer
            place += range(n, n + len(answer))
            targets += answer
            weights += [weight] * len(answer)
        branches.append(_Branch(start, answers, tuple(map(len, group.answers))))
    used, back = np.unique(predictor, return_inverse=True)
    with _answering(model, _Layout(shared, tuple(branches))):
        out = model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([place], device=device),
            logits_to_keep=torch.as_tensor(used, device=device),
            use_cache=False,
        ).logits[0]
    weight = torch.tensor(weights, device=device)
    target = torch.tensor(targets, device=device)
    where = torch.as_tensor(back, device=device)
    if head is not None:
        return _linear_nll(out, head, target, where, weight, temperature)
    logits = out.float() / temperature
    # Not log_softmax: its sum over a vocabulary loses digits in fp32.
    return (weight * (torch.logsumexp(logits, -1)[where] - logits[where, target])).sum()


def headless(model: Any) -> Any:
    """Take the output layer off a model, so that the loss can be made without keeping logits.

    Returns:
        The layer's frozen weights for `group_nll`, or None where the model is left as it is: the
        layer is no plain one, or something stands between it and the logits.
    """
    import torch

    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or layer.bias is not None:
        return None
    probe = torch.arange(4, device=layer.weight.device)[None]
    with torch.no_grad():
        before = model(input_ids=probe, use_cache=False).logits
    weight = layer.weight.detach()
    model.set_output_embeddings(torch.nn.Identity())
    with torch.no_grad():
        after = model(input_ids=probe, use_cache=False).logits
    if after.shape[-1] == weight.shape[1] and torch.allclose(before, after @ weight.T, atol=1e-3):
        return weight
    model.set_output_embeddings(layer)
    return None


def _in_common(groups: Sequence[Group]) -> int:
    """How many tokens the prompts of several groups share at the start."""
    first = list(groups[0].prompt)
    return min((common_start(first, list(g.prompt)) for g in groups[1:]), default=0)


def _passes(groups: Sequence[Group], model: Any) -> list[list[Group]]:
    """The groups of each forward and backward pass: those that share half their prompt, or more.

    A pass is kept to what the free memory holds; a group that alone would not fit is cut.
    """
    config = model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    # What a layer keeps for its backward pass: a dozen states and four of the inner layer's width.
    each = 4 * layers * (12 * width + 4 * getattr(config, "intermediate_size", 4 * width))
    room = max(1, int(0.5 * free_memory(next(model.parameters()).device) / each))
    built: list[list[Group]] = []
    for group in groups:
        parts = min(len(group.answers), max(1, math.ceil(group.tokens / room)))
        size = math.ceil(len(group.answers) / parts)
        for at in range(0, len(group.answers), size):
            here = slice(at, at + size)
            part = Group(group.prompt, group.answers[here], group.weights[here])
            for some in built:
                joined = [*some, part]
                shared = _in_common(joined)
                tokens = sum(g.tokens for g in joined) - shared * len(some)
                if 2 * shared >= len(part.prompt) and tokens <= room:
                    some.append(part)
                    break
            else:
                built.append([part])
    return built


def groups_of(
    run: Run, tokenizer: Any, frame: pd.DataFrame, objective: str, per_prompt: int, rng: Any
) -> list[Group]:
    """The rows as training groups: shuffled within and over prompts by `rng`.

    Args:
        run: Gives scenarios and wording.
        tokenizer: The student's.
        frame: Rows as from `rows` or `letter_rows`.
        objective: `sft`: whole answers and the end token. `distill`: the first token only, weights
            normalized to the distribution over answers.
        per_prompt: Most answers in a group.
        rng: A numpy Generator; None keeps file order. Prompts of one context stay side by side,
            with one group each, for they are read in one pass.
    """
    where = {prompt_id(s, a, w): (s, a, w) for s, a, w in _prompts(run, frame)}
    rounds: dict[tuple[str, int], list[Group]] = {}
    for prompt, part in frame.groupby("prompt", sort=False):
        scenario, answer, wording = where[str(prompt)]
        head = tuple(prompt_tokens(tokenizer, messages(scenario, answer, wording)))
        if rng is not None:
            part = part.iloc[rng.permutation(len(part))]
        weighed: dict[tuple[int, ...], float] = {}
        for row in part.to_dict("records"):
            tail, weight = continuation(tokenizer, str(row["text"])), float(row["weight"])
            if objective == "distill":
                tail, weight = tail[:1], weight / float(part["weight"].sum())
            elif row["ended"]:
                tail = [*tail, tokenizer.eos_token_id]
            weighed[tuple(tail)] = weighed.get(tuple(tail), 0.0) + weight
        tails = list(weighed.items())
        for at in range(0, len(tails), per_prompt):
            some = tails[at : at + per_prompt]
            group = Group(head, tuple(t for t, _ in some), tuple(w for _, w in some))
            rounds.setdefault((scenario.context.name, at), []).append(group)
    built = list(rounds.values())
    if rng is not None:
        built = [built[i] for i in rng.permutation(len(built))]
        built = [[part[i] for i in rng.permutation(len(part))] for part in built]
    return [group for part in built for group in part]


def _prompts(run: Run, frame: pd.DataFrame) -> Iterator[tuple[Scenario, str, Wording]]:
    forms = list(dict.fromkeys(frame["answer"]))
    for scenario in run.scenarios("in_sample"):
        for form in forms:
            for wording in (run.wording, *run.copies):
                yield scenario, form, wording


def _batches(groups: Sequence[Group], size: int, by_rows: bool) -> Iterator[list[Group]]:
    """Consecutive groups until `size` rows, by their weights, or `size` groups are together."""
    batch: list[Group] = []
    filled = 0.0
    for group in groups:
        batch.append(group)
        filled += sum(group.weights) if by_rows else 1
        if filled >= size:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What decides a training besides base weights and rows."""

    objective: str
    learning_rate: float
    epochs: int
    batch: int
    batch_by_rows: bool
    r: int
    alpha: int
    dropout: float
    modules: tuple[str, ...]
    temperature: float
    seed: int
    max_steps: int


def settings(run: Run, arm: str) -> Settings:
    """The settings of an arm (`family` or `published`) of a run.

    Raises:
        TomError: An unknown arm.
    """
    p = run.profile
    if arm not in run.arms:
        raise TomError(f"arm {arm!r}: profile {p.name!r} has {', '.join(run.arms)}")
    family = arm == "family"
    objective = p.objective if family else p.published_objective
    return Settings(
        objective=objective,
        learning_rate=p.learning_rate if family else p.published_learning_rate,
        epochs=p.epochs if family else p.published_epochs,
        batch=p.batch_rows if family else p.published_batch,
        batch_by_rows=family,
        r=p.lora_r,
        alpha=p.lora_alpha,
        dropout=p.lora_dropout,
        modules=p.lora_modules,
        # Distillation matches the distribution that sampling will have.
        temperature=p.temperature if objective == "distill" else 1.0,
        seed=p.seed,
        max_steps=p.max_steps,
    )


def fingerprint(student: Card, how: Settings, frame: pd.DataFrame) -> str:
    """First 16 hex of the sha256 of base weights, settings and rows."""
    said = {
        "base": weights_id(student),
        "settings": how.__dict__ | {"modules": sorted(how.modules)},
        "rows": frame[ROW_COLUMNS[3:]].to_dict("records"),
        "order": "by context",
    }
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_adapter(run: Run, arm: str, mark: str, *, whole: bool = False) -> Adapter | None:
    """The finished adapter of that fingerprint: the shipped one, else the run's own, else None.

    Args:
        run: Folders.
        arm: `family` or `published`.
        mark: The fingerprint.
        whole: Only one that has its weights.
    """
    for base in (run.shipped, run.folder):
        folder = base / "adapters" / f"{arm}-{mark}" if base else None
        if folder and (folder / "training.json").is_file():
            found = Adapter(folder, mark)
            if found.whole or not whole:
                return found
    return None


def check_base(folder: Path, student: Card) -> None:
    """Refuse an adapter that was trained on other weights.

    Raises:
        TomError: It belongs to another base model, or has no readable record.
    """
    path = folder / "training.json"
    try:
        record = json.loads(path.read_text("utf-8"))
        base, name = record["base"], record["student"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TomError(f"{path}: no readable training record ({type(error).__name__})") from None
    if base != weights_id(student):
        raise TomError(
            f"{folder}: this adapter belongs to {name!r} ({str(base)[:12]}), not to "
            f"{student.name!r} ({weights_id(student)[:12]}); train one or name its own student"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # never a pickle in its place
        raise TomError(f"{weights}: no such file; remove {folder} to train the adapter again")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if record.get("sha256", found) != found:
        raise TomError(f"{weights}: altered; restore it, or remove {folder} to train it again")


def train(
    run: Run, arm: str, frame: pd.DataFrame, *, whole: bool = False, progress: bool = True
) -> Adapter:
    """The arm's adapter: found by its fingerprint, else trained, from its last checkpoint if any.

    Args:
        run: Profile and folders.
        arm: `family` or `published`.
        frame: Rows as from `rows` or `letter_rows`.
        whole: Train it too where only its record is there.
        progress: Whether to show a bar.

    Raises:
        TomError: No rows; the loss is not finite; the disk is full.
    """
    student = card(run.profile.student)
    how = settings(run, arm)
    if frame.empty or not (~frame["held_out"]).any():
        raise TomError(f"arm {arm!r}: no training rows; ask the teacher first (chapter 02)")
    mark = fingerprint(student, how, frame)
    found = find_adapter(run, arm, mark, whole=whole)
    name = f"{arm}-{mark}"
    if found is None:
        # Of several processes that train together, the first holds the lock for all.
        alone = int(os.environ.get("RANK", "0")) == 0
        place = run.folder / "locks" / f"adapters--{name}"
        with hold(place, run.folder / "adapters" / name) if alone else nullcontext():
            found = find_adapter(run, arm, mark, whole=whole)
            if found is None:
                return _train(run, arm, frame, student, how, mark, progress)
    if found.whole:
        check_base(found.folder, student)
    return found


def _train(
    run: Run, arm: str, frame: pd.DataFrame, student: Card, how: Settings, mark: str, progress: bool
) -> Adapter:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import broadcast
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from tqdm.auto import tqdm

    folder = run.folder / "adapters" / f"{arm}-{mark}"
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    if run.profile.threads:
        torch.set_num_threads(run.profile.threads)
    accelerator = Accelerator()
    torch.manual_seed(how.seed)
    base, tokenizer = load_transformers(student)
    head = headless(base)
    config = LoraConfig(
        r=how.r,
        lora_alpha=how.alpha,
        lora_dropout=how.dropout,
        target_modules=list(how.modules),
        task_type="CAUSAL_LM",
    )
    try:
        bare = get_peft_model(base, config)
    except ValueError as error:
        raise TomError(f"lora_modules = {list(how.modules)}: {error}") from None
    optimizer = torch.optim.AdamW(
        [p for p in bare.parameters() if p.requires_grad], lr=how.learning_rate, weight_decay=0.0
    )
    model, optimizer = accelerator.prepare(bare, optimizer)
    kept, out = frame[~frame["held_out"]], frame[frame["held_out"]]
    held_out = groups_of(run, tokenizer, out, how.objective, ANSWERS_PER_PROMPT, None)

    per_prompt = min(ANSWERS_PER_PROMPT, how.batch) if how.batch_by_rows else ANSWERS_PER_PROMPT

    def epoch_batches(epoch: int) -> list[list[Group]]:
        rng = np.random.default_rng([how.seed, epoch])
        groups = groups_of(run, tokenizer, kept, how.objective, per_prompt, rng)
        return list(_batches(groups, how.batch, how.batch_by_rows))

    batches = [(epoch, b) for epoch in range(how.epochs) for b in epoch_batches(epoch)]
    if how.max_steps:
        batches = batches[: how.max_steps]
    names = [name for name, p in bare.named_parameters() if p.requires_grad]
    done, log = _resume(part, bare, optimizer, names)
    seconds = log[-1]["seconds"] if log else 0.0
    began = saved = time.monotonic()
    bar = tqdm(
        total=len(batches),
        initial=done,
        desc=f"train {arm}",
        unit="step",
        disable=not (progress and accelerator.is_main_process),
    )
    if not log and held_out:
        log.append(_log_row(0, 0, math.nan, _mean_nll(model, head, held_out, how), 0.0, 0.0))
    for step in range(done, len(batches)):
        epoch, batch = batches[step]
        rate = how.learning_rate * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for g in optimizer.param_groups:
            g["lr"] = rate
        torch.manual_seed(how.seed * 1_000_003 + step)  # dropout, if any, is the step's own
        model.train()
        loss = _backward(accelerator, model, head, batch, how)
        if not math.isfinite(loss):
            raise TomError(
                f"arm {arm!r}: the loss is {loss} at step {step + 1}; lower the learning rate"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends_epoch = step + 1 == len(batches) or batches[step + 1][0] != epoch
        value = _mean_nll(model, head, held_out, how) if ends_epoch and held_out else math.nan
        now = time.monotonic()
        log.append(_log_row(step + 1, epoch + 1, loss, value, rate, seconds + now - began))
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")
        # All processes save together, by the clock of the first.
        due = torch.tensor(float(now - saved > CHECKPOINT_SECONDS), device=accelerator.device)
        if broadcast(due):
            _checkpoint(part, bare, optimizer, names, step + 1, log, accelerator.is_main_process)
            saved = now
    bar.close()
    state = {k: _whole(v).half() for k, v in get_peft_model_state_dict(bare).items()}
    if accelerator.is_main_process:
        record = {
            "arm": arm,
            "fingerprint": mark,
            "student": student.name,
            "base": weights_id(student),
            "settings": how.__dict__ | {"modules": list(how.modules)},
            "rows": int(kept["weight"].sum()),
            "distinct_rows": len(kept),
            "held_out_rows": int(out["weight"].sum()),
            "steps": len(batches),
            "seconds": round(log[-1]["seconds"], 1),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "processes": accelerator.num_processes,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _finish(part, folder, state, config, record, pd.DataFrame(log))
    accelerator.wait_for_everyone()
    return Adapter(folder, mark)


def _backward(accelerator: Any, model: Any, head: Any, batch: list[Group], how: Settings) -> float:
    """Gradients of a batch's mean loss per answer token, shared out over the processes."""
    import torch

    world, rank = accelerator.num_processes, accelerator.process_index
    mine = _passes(batch[rank::world], accelerator.unwrap_model(model))
    if world > 1:  # every process takes part in every exchange of gradients and of a model's parts
        counts = accelerator.gather(torch.tensor([len(mine)], device=accelerator.device))
        idle = Group(batch[0].prompt, batch[0].answers[:1], (0.0,))
        mine += [[idle]] * (int(counts.max()) - len(mine))
    mass = sum(g.mass for g in batch)
    total = torch.zeros((), device=accelerator.device)
    for at, groups in enumerate(mine):
        last = at + 1 == len(mine)
        with nullcontext() if last else accelerator.no_sync(model):
            nll = group_nll(model, groups, how.temperature, head) / mass
            accelerator.backward(nll * world)
            total += nll.detach()
    return float(accelerator.reduce(total, "sum"))


def _mean_nll(model: Any, head: Any, groups: Sequence[Group], how: Settings) -> float:
    """Mean negative log-likelihood per answer token, in nats, without gradients."""
    import torch

    model.eval()
    with torch.no_grad():  # not inference_mode: sharded parameters outlive the pass
        passes = _passes(groups, getattr(model, "module", model))
        total = sum(float(group_nll(model, some, how.temperature, head)) for some in passes)
    return total / sum(g.mass for g in groups)


def _log_row(
    step: int, epoch: int, loss: float, heldout: float, rate: float, seconds: float
) -> dict[str, float]:
    return {
        "step": step,
        "epoch": epoch,
        "loss": loss,
        "heldout_loss": heldout,
        "learning_rate": rate,
        "seconds": round(seconds, 2),
    }


# --- checkpoints: safetensors only, replaced in one step -----------------------------------------


def _whole(tensor: Any) -> Any:
    """A tensor that lies in parts on several processes, put together on each of them."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(tensor: Any, parameter: Any) -> Any:
    """A whole tensor as the parameter lies: on its device, and in parts where that is in parts."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def _checkpoint(
    part: Path,
    model: Any,
    optimizer: Any,
    names: list[str],
    step: int,
    log: list[dict[str, float]],
    write: bool = True,
) -> None:
    params = dict(model.named_parameters())
    tensors = {f"param.{n}": _whole(params[n]) for n in names}
    for n in names:
        for key, value in optimizer.state[params[n]].items():
            tensors[f"{key}.{n}"] = _whole(value).float()
    if write:
        meta = {"step": str(step), "log": json.dumps(log)}
        _save_tensors(tensors, part / "checkpoint.safetensors", meta)


def _resume(
    part: Path, model: Any, optimizer: Any, names: list[str]
) -> tuple[int, list[dict[str, float]]]:
    """Put the last checkpoint back: (steps done, log). A checkpoint is whole or not there."""
    import torch
    from safetensors import safe_open

    path = part / "checkpoint.safetensors"
    if not path.is_file():
        return 0, []
    try:
        with safe_open(str(path), "pt") as held:
            meta = held.metadata()
            tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118
        params = dict(model.named_parameters())
        with torch.no_grad():
            for n in names:
                params[n].copy_(_like(tensors[f"param.{n}"], params[n]))
                optimizer.state[params[n]] = {
                    key: tensors[f"{key}.{n}"]
                    if key == "step"
                    else _like(tensors[f"{key}.{n}"], params[n])
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return int(meta["step"]), json.loads(meta["log"])
    except Exception as error:
        raise TomError(
            f"{path}: damaged checkpoint ({type(error).__name__}); remove it to train from the start"
        ) from None


def _save_tensors(tensors: dict[str, Any], path: Path, meta: dict[str, str]) -> None:
    from safetensors.torch import save

    data = save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata=meta)
    _write(path, data)


def _finish(
    part: Path,
    folder: Path,
    state: dict[str, Any],
    config: Any,
    record: dict[str, Any],
    log: pd.DataFrame,
) -> None:
    """Adapter, log and record, then one rename: a finished folder is always complete."""
    weights = part / "adapter_model.safetensors"
    _save_tensors(state, weights, {"format": "pt"})
    record = record | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    config.base_model_name_or_path = record["student"]
    config.inference_mode = True
    try:
        config.save_pretrained(str(part))
    except OSError as error:
        raise TomError(f"{part}: cannot write the adapter ({error.strerror})") from None
    _write(part / "log.csv", log.to_csv(index=False).encode())
    _write(part / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    (part / "checkpoint.safetensors").unlink(missing_ok=True)
    if folder.is_dir():  # a record alone
        shutil.rmtree(folder)
    os.replace(part, folder)


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step.

    Raises:
        TomError: The disk is full or read-only.
    """
    file = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        if file is not None:  # half a file would only fill the disk further
            Path(file.name).unlink(missing_ok=True)
        raise TomError(
            f"{path}: cannot write ({error.strerror}); free some space and go on"
        ) from None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
