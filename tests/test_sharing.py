"""Shared-prefix sampling and exact readout against the plain model, on real weights."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from tomlib.errors import TomError
from tomlib.prompts import load_wording, messages
from tomlib.scenarios import find
from tomlib.sharing import (
    SharedPrefixReader,
    _choose,
    continuation,
    plain_attention,
    prompt_tokens,
)

WORDING = load_wording("replies")


@pytest.fixture
def reader(smol_model: tuple[Any, Any]) -> SharedPrefixReader:
    return SharedPrefixReader(*smol_model)


def _prompts(reader: SharedPrefixReader, answer: str = "choice+motivation") -> list[list[int]]:
    chosen = [find("IR/stag_hunt"), find("IR/snowdrift"), find("biz/stag_hunt")]
    return [prompt_tokens(reader.tokenizer, messages(s, answer, WORDING)) for s in chosen]


def test_reading_only_what_is_new_gives_the_plain_model_s_logits(reader: Any) -> None:
    import torch

    for tokens in _prompts(reader):
        with torch.inference_mode():
            plain = reader.model(torch.tensor([tokens])).logits[0, -1]
        assert (reader.read(tokens).logits - plain).abs().max() < 1e-3


def test_every_draw_is_the_one_that_the_plain_model_gives_alone(reader: Any) -> None:
    """Draws of three prompts in one batch, each redone by plain forward passes over its own text."""
    import torch

    prompts = _prompts(reader)
    owner, seeds = [0, 0, 0, 1, 1, 2, 2, 2], list(range(8))
    drawn = reader.sample(prompts, owner, seeds, temperature=0.8, max_new_tokens=12)
    for (said, finish), at, seed in zip(drawn, owner, seeds, strict=True):
        text = torch.tensor([prompts[at] + said])
        with torch.inference_mode():
            logits = reader.model(text).logits[0, len(prompts[at]) - 1 :].float()
        uniform = np.random.Generator(np.random.Philox(seed)).random(12)
        again = [
            int(_choose(logits[i : i + 1], np.array([0]), uniform[i : i + 1], 0.8, 1.0)[0])
            for i in range(min(len(logits), 12))
        ]
        assert again[: len(said)] == said
        assert finish == ("stop" if len(said) < 12 else "length")
        assert len(said) == 12 or again[len(said)] in reader.ends


def test_a_draw_does_not_depend_on_the_others(reader: Any) -> None:
    prompts = _prompts(reader)[:1]
    many = reader.sample(prompts, [0] * 6, [5, 6, 7, 8, 9, 10], temperature=0.8, max_new_tokens=8)
    one = reader.sample(prompts, [0], [8], temperature=0.8, max_new_tokens=8)
    assert one[0] == many[3]


def test_sampled_letters_follow_the_exact_probabilities(reader: Any) -> None:
    """This model often echoes "C or D": only what closes the quote after the letter is a choice."""
    tokens = _prompts(reader, "choice")[0]
    p, coverage = reader.option_probabilities(tokens, ["C", "D"], 0.8)
    drawn = reader.sample(
        [tokens],
        [0] * 2000,
        list(range(2000)),
        temperature=0.8,
        max_new_tokens=2,
    )
    texts = [reader.tokenizer.decode(ids) for ids, _ in drawn]
    seen = [sum(t.startswith(f'{letter}"') or t == letter for t in texts) for letter in "CD"]
    observed = np.array([*seen, 2000 - sum(seen)])
    expected = np.array([*p, 1 - coverage]) * 2000
    assert (expected > 20).all()
    assert chisquare(observed, expected).pvalue > 1e-3


def test_option_probabilities_are_the_plain_model_s(reader: Any) -> None:
    """Contributions, by plain forward passes over each whole option and the mass of what may follow."""
    import torch

    tokens = prompt_tokens(
        reader.tokenizer, messages(find("party/public_goods"), "choice", WORDING)
    )
    options = [str(i) for i in range(11)]
    p, coverage = reader.option_probabilities(tokens, options, 0.8)
    for option, value in zip(options, p, strict=True):
        ids = reader.tokenizer(option, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = reader.model(torch.tensor([tokens + ids])).logits[0, len(tokens) - 1 :]
        q = torch.softmax(logits.double() / 0.8, -1)
        plain = float(torch.prod(torch.stack([q[i, t] for i, t in enumerate(ids)])))
        plain *= float(q[-1, reader._boundary].sum())
        assert value == pytest.approx(plain, rel=1e-3)
    assert coverage == pytest.approx(p.sum())
    assert 0 < coverage <= 1


def test_temperature_zero_is_greedy(reader: Any) -> None:
    import torch

    tokens = _prompts(reader)[0]
    (said, _), = reader.sample([tokens], [0], [1], temperature=0, max_new_tokens=6)  # fmt: skip
    out = reader.model.generate(
        torch.tensor([tokens]), max_new_tokens=6, do_sample=False, repetition_penalty=1.0
    )
    assert out[0, len(tokens) :].tolist()[: len(said)] == said


def test_repetition_penalty_is_that_of_transformers(reader: Any) -> None:
    import torch

    tokens = _prompts(reader)[0]
    ((said, _),) = reader.sample(
        [tokens], [0], [1], temperature=0, max_new_tokens=8, repetition_penalty=1.3
    )
    out = reader.model.generate(
        torch.tensor([tokens]), max_new_tokens=8, do_sample=False, repetition_penalty=1.3
    )
    assert out[0, len(tokens) :].tolist()[: len(said)] == said


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    import torch

    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    uniform = np.linspace(0.001, 0.999, 500)
    chosen = _choose(logits, np.zeros(500, dtype=int), uniform, 1.0, 0.75)
    assert set(chosen.tolist()) == {0, 1}
    assert (chosen == 0).float().mean() == pytest.approx(0.5 / 0.8, abs=0.01)


def test_a_continuation_gets_no_space_of_its_own(smol_model: tuple[Any, Any]) -> None:
    """SentencePiece's way (Llama 2): alone, "C" would become a word with a space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "\u2581", "\u2581C", "C", "D", '"', "}", "<0x0A>", '"}']
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, [("\u2581", "C"), ('"', "}")], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    llama = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    alone = llama('C"}', add_special_tokens=False)["input_ids"]
    assert llama.convert_ids_to_tokens(alone)[0] == "\u2581C"
    assert llama.convert_ids_to_tokens(continuation(llama, 'C"}')) == ["C", '"}']
    for text in ('C"}', "10", 'D", "motivation": "Because."}'):
        own = smol_model[1](text, add_special_tokens=False)["input_ids"]
        assert continuation(smol_model[1], text) == own


def test_exact_probabilities_follow_top_p_and_the_penalty(reader: Any) -> None:
    """What is read is what is drawn, also with a nucleus and a repetition penalty."""
    tokens = _prompts(reader, "choice")[0]
    decoding = {"temperature": 0.8, "top_p": 0.7, "repetition_penalty": 1.2}
    p, _ = reader.option_probabilities(tokens, ["C", "D"], *decoding.values())
    plain, _ = reader.option_probabilities(tokens, ["C", "D"], 0.8)
    assert abs(p - plain).max() > 0.02
    drawn = reader.sample([tokens], [0] * 2000, list(range(2000)), max_new_tokens=2, **decoding)
    texts = [reader.tokenizer.decode(ids) for ids, _ in drawn]
    seen = np.array([sum(t.startswith(f'{x}"') or t == x for t in texts) for x in "CD"]) / 2000
    assert abs(seen - p).max() < 4 * np.sqrt(0.25 / 2000)
    greedy, _ = reader.option_probabilities(tokens, ["C", "D"], 0.0)
    assert sorted(greedy.round(6)) in ([0, 0], [0, 1])


def test_attention_that_is_more_than_softmax_is_refused() -> None:
    plain_attention("Any", {"sliding_window": None, "softcap": None}, 500)
    plain_attention("Any", {"sliding_window": 4096}, 500)
    for options in ({"sliding_window": 128}, {"softcap": 50.0}, {"s_aux": 1}):
        with pytest.raises(TomError, match=next(iter(options))):
            plain_attention("Any", options, 500)
