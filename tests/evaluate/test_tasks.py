"""Each task is what its docstring says."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from small_run import write_text

from miras.data import load_tokenizer
from miras.errors import UsageError
from miras.evaluate.tasks import (
    MQAR,
    TASKS,
    Examples,
    Haystack,
    LanguageTask,
    Memorisation,
    Needle,
    NoisyRecall,
    Parity,
    Permutations,
    Regression,
    SelectiveCopy,
    SyntheticTask,
    TokenTask,
    task,
)
from miras.evaluate.tasks.base import IGNORE
from miras.evaluate.tasks.needle import ask
from miras.evaluate.tasks.settings import changed, shown
from miras.hf import MirasConfig, MirasForCausalLM

SYNTHETIC = {name: t for name, t in TASKS.items() if isinstance(t, SyntheticTask)}


def draw(task, level, count=64, seed=0):
    return task.draw(np.random.default_rng(seed), level, count)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_seeds_reproduce_and_training_is_not_the_test(name):
    small = dataclasses.replace(SYNTHETIC[name], examples=4)
    first, again, other = (small.build(seed, 512) for seed in (1, 1, 2))
    for _ in range(3):
        ours, theirs = next(first.train), next(again.train)
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.targets, theirs.targets)
    assert list(first.test) == list(small.test)
    for level, examples in first.test.items():
        assert torch.equal(examples.inputs, again.test[level].inputs)
        assert not torch.equal(examples.inputs, other.test[level].inputs)
    assert not torch.equal(small.build(1).test[small.test[0]].inputs, draw(small, small.test[0], 4, seed=1).inputs)


@pytest.mark.parametrize("name", [name for name, t in SYNTHETIC.items() if isinstance(t, TokenTask)])
def test_shapes_and_ranges(name):
    asked = SYNTHETIC[name]
    for level in (*asked.train, *asked.test):
        inputs, targets, *_ = draw(asked, level, 4)
        assert inputs.shape == targets.shape == (4, asked.length(level))
        assert 0 <= inputs.min() and inputs.max() < asked.tokens
        answers = targets[targets != IGNORE]
        assert len(answers) and 0 <= answers.min() and answers.max() < asked.tokens
        assert set(asked.named(level)) == set(asked.level)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_every_definition_has_a_source(name):
    assert re.search(r"arXiv \d{4}\.\d{5}", type(SYNTHETIC[name]).__doc__ or "")


def test_score_counts_only_what_is_asked():
    targets = torch.tensor([[IGNORE, 3, 4, IGNORE], [1, IGNORE, IGNORE, 1]])
    predicted = torch.tensor([[9, 3, 9, 9], [1, 9, 9, 1]])
    assert TokenTask.score(predicted, targets) == 0.75


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_readings_are_of_one_instrument_but_for_those_that_are_corrupted(rate):
    asked = Regression(states=3, readings=2, span=40)
    inputs, targets = (x.double() for x in draw(asked, rate, 200))
    assert inputs.shape == (200, 40, 8) and targets.shape == (200, 40, 2)
    x, asked_of = inputs[..., 5:], ~targets.isnan().any(-1)
    assert not inputs[:, 0, :5].any() and torch.equal(inputs[:, 1:, :3], x[:, :-1])
    seen = asked_of[..., None]
    w = torch.linalg.lstsq(torch.where(seen, x, 0.0), torch.where(seen, targets, 0.0)).solution
    y = x @ w
    torch.testing.assert_close(y[asked_of], targets[asked_of], rtol=0, atol=1e-5)
    assert w.var().item() == pytest.approx(1 / 3, rel=0.2)
    noise = inputs[:, 1:, 3:5] - y[:, :-1]
    wrong = (noise.abs() > 1e-5).any(-1)
    assert torch.equal(wrong, ~asked_of[:, 1:]) and asked_of[:, 0].all()
    assert wrong.double().mean().item() == pytest.approx(rate, abs=0.02)
    if rate:
        # Typical noise is of the size of a reading, the largest of some hundreds is many times that.
        size = noise[wrong].norm(dim=-1)
        assert 0.7 < size.median() < 1.4 and size.max() > 50


def test_the_error_of_a_regression_is_that_of_the_second_half():
    targets, predicted = torch.ones(3, 8, 2), torch.zeros(3, 8, 2)
    assert Regression.score(predicted, targets) == 1.0
    predicted[:, 4:] = 1.5
    assert Regression.score(predicted, targets) == 0.25
    predicted[0, 5], targets[0, 5] = 1e9, torch.nan
    assert Regression.score(predicted, targets) == 0.25, "nothing was asked there"


@pytest.mark.parametrize("level", [(64, 4), (64, 16), (128, 32)])
def test_every_mqar_answer_stood_behind_its_key(level):
    length, pairs = level
    inputs, targets, *_ = draw(MQAR(), level)
    for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert 1 <= min(keys) and max(keys) < 4096 <= min(values)
        asked = [t for t in range(length) if answers[t] != IGNORE]
        assert len(asked) == pairs and min(asked) >= 2 * pairs and all(t % 2 == 0 for t in asked)
        assert {tokens[t]: answers[t] for t in asked} == dict(zip(keys, values, strict=True))


def test_mqar_gaps_follow_the_power_law():
    _, targets, *_ = draw(MQAR(8, train=((64, 1),), test=((64, 1),)), (64, 1), 20_000)
    gaps = ((targets != IGNORE).nonzero()[:, 1] - 2) // 2
    p = np.arange(1, 32) ** (0.01 - 1.0)
    seen = np.bincount(gaps.numpy(), minlength=31) / 20_000
    assert np.abs(seen - p / p.sum()).max() < 0.01


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("noise", ["value", "token", "heavy", "inside"])
def test_noise_is_as_frequent_as_asked_and_answers_are_clean(noise, rate):
    asked = NoisyRecall()
    clean = {}
    inputs, targets, size, inside = draw(asked, (noise, rate), 200)
    assert inside == (noise == "inside")
    shown_tokens = 2 * asked.pairs * asked.repeats
    queries, answers = inputs[:, shown_tokens::2], targets[:, shown_tokens::2]
    wrong = np.zeros(2)
    for row in range(200):
        clean = dict(zip(queries[row].tolist(), answers[row].tolist(), strict=True))
        assert len(clean) == asked.pairs and len(set(clean.values())) == asked.pairs
        pairs = inputs[row, :shown_tokens].reshape(-1, 2).tolist()
        wrong += [sum(k not in clean for k, _ in pairs), sum(clean.get(k) != v for k, v in pairs if k in clean)]
        if rate == 0:
            assert all(sum(k == key for k, _ in pairs) == asked.repeats for key in clean)
    wrong /= 200 * asked.pairs * asked.repeats
    if noise in ("heavy", "inside"):
        assert size is not None and not wrong.any()
        assert (size[:, 1:shown_tokens:2] > 0).float().mean() == pytest.approx(rate, abs=0.02)
        assert not size[:, 0:shown_tokens:2].any() and not size[:, shown_tokens:].any()
        assert rate == 0 or size.max() > 20, "a tail of 1.5 degrees of freedom"
    else:
        assert size is None
        # A random token may happen to be a key of the sequence.
        assert wrong[0] == pytest.approx(rate if noise == "token" else 0, abs=0.03)
        assert wrong[1] == pytest.approx(rate if noise == "value" else rate * (1 - rate), abs=0.03)


def test_selective_copy_repeats_the_items_in_order():
    asked = SelectiveCopy()
    inputs, targets, *_ = draw(asked, (64, 8))
    for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        items = [token for token in tokens if token < 14]
        assert len(items) == 8 and tokens.index(15) == 64 - 8 - 1
        assert answers == [IGNORE] * 56 + items


def test_the_dictionary_is_one_and_the_same():
    asked = Memorisation()
    learned = {}
    for seed in (0, 1):
        inputs, targets, *_ = draw(asked, 32, 256, seed)
        assert (inputs[:, 1::2] == 255).all() and (targets[:, 0::2] == IGNORE).all()
        for key, value in zip(inputs[:, 0::2].flatten().tolist(), targets[:, 1::2].flatten().tolist(), strict=True):
            assert learned.setdefault(key, value) == value
    assert len(learned) == len(set(learned.values())) == 127
    assert learned != {k: v for k, v in learned.items() if v == 127 + k}


def test_parity():
    inputs, targets, *_ = draw(Parity(), 40)
    for t in range(40):
        assert torch.equal(targets[:, t], inputs[:, : t + 1].sum(1) % 2)


@pytest.mark.parametrize("degree", [3, 5])
def test_permutations_are_composed(degree):
    elements = list(itertools.permutations(range(degree)))
    inputs, targets, *_ = draw(Permutations(degree), 20, 8)
    for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        where = list(range(degree))  # where each thing is after all permutations so far
        for token, answer in zip(tokens, answers, strict=True):
            where = [elements[token][place] for place in where]
            assert elements[answer] == tuple(where)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MQAR(train=((64, 17),)), "4 tokens a pair"),
        (lambda: MQAR(vocabulary=30, test=((64, 16),), train=((64, 16),)), "different keys"),
        (lambda: NoisyRecall(test=(("value", 1.5),)), "rates from 0 to 1"),
        (lambda: NoisyRecall(test=(("loud", 0.1),)), "expected value, token, heavy or inside"),
        (lambda: SelectiveCopy(train=((32, 16),)), "do not fit"),
        (lambda: Memorisation(train=(31,)), "even lengths"),
        (lambda: Parity(test=(0,)), "at least 1"),
        (lambda: Permutations(6), "degree from 2 to 5"),
        (lambda: Needle(depths=(2.0,)), "depths from 0 to 1"),
        (lambda: Haystack(train=(("word", 512),)), "expected passkey, number or uuid"),  # type: ignore[arg-type]
        (lambda: task("mqra"), "Did you mean 'mqar'"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_settings_are_words_of_a_command_line():
    asked = changed(MQAR(), {"vocabulary": "64", "power": "1e-1", "test": "[64,4],[32,2]", "train": "[32,2]"})
    assert asked == MQAR(vocabulary=64, power=0.1, test=((64, 4), (32, 2)), train=((32, 2),))
    assert changed(Needle(), {"kind": "uuid", "lengths": "512"}) == Needle("uuid", lengths=(512,))
    depths = changed(Needle(), {"depths": "0,1"}).depths
    assert [type(depth) for depth in depths] == [float, float], "0 is 0.0, also as a seed of random numbers"
    for asked in TASKS.values():
        given = {f.name: shown(getattr(asked, f.name)) for f in dataclasses.fields(asked)}  # type: ignore[arg-type]
        assert changed(asked, given) == asked
    for name, text in (("vocabulary", "many"), ("vocabulary", "1.5"), ("test", "64,4"), ("train", ""), ("test", "[6]")):
        with pytest.raises(UsageError, match=re.escape(f"--set {name}={text}: expected something like {name}=")):
            changed(MQAR(), {name: text})


# -- needles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("kind", ["passkey", "number", "uuid"])
def test_the_needle_is_where_the_depth_says(kind, words):
    tokenizer = load_tokenizer("bytes")
    asked = Needle(kind, words, lengths=(1000, 3000), depths=(0.0, 0.5, 1.0), examples=2)
    again = {(length, depth): prompts for length, depth, prompts in asked.build(tokenizer, 0)}
    values = set()
    for length, depth, prompts in asked.build(tokenizer, 0):
        assert prompts == again[length, depth]
        for prompt in prompts:
            assert len(prompt.tokens) == length
            text, (first, end) = tokenizer.decode(prompt.tokens), prompt.needle
            needle = tokenizer.decode(prompt.tokens[first:end])
            found = re.fullmatch(r"One of the special magic (\w+)s for ([\w-]+) is: ([\w-]+)\.\n", needle)
            assert found and found[1] == ("uuid" if kind == "uuid" else "number")
            assert text.endswith(f"special magic {found[1]} for {found[2]} mentioned in the provided text is")
            said = [tokenizer.decode(candidate) for candidate in prompt.candidates]
            assert said[0] == f" {found[3]}" and len(set(said)) == 10
            assert not any(wrong[1:] in text for wrong in said[1:])
            hay = length - (end - first)
            head, tail = text.index("afterwards.\n") + 12, len(text) - text.index("\nWhat is the special")
            assert (first - head) / (hay - head - tail) == pytest.approx(depth, abs=0.1 if length == 3000 else 0.4)
            values.add(found[3])
    assert len(values) == 12
    assert next(asked.build(tokenizer, 1))[2] != again[1000, 0.0]


def test_too_short_a_prompt_is_refused():
    with pytest.raises(UsageError, match="shorter than its question"):
        next(Needle(lengths=(100,)).build(load_tokenizer("bytes"), 0))
    with pytest.raises(UsageError, match="shorter than its question"):
        draw(Haystack(), ("passkey", 300), 1)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return MirasForCausalLM(MirasConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)).eval()


def test_answers_are_scored_as_by_hand(untrained, words, monkeypatch):
    monkeypatch.setattr("miras.evaluate.tasks.needle.PIECE", 100)
    asked = Needle("number", words, lengths=(600,), depths=(0.5,), examples=2, distractors=3)
    _, _, prompts = next(asked.build(load_tokenizer("bytes"), 0))
    margins, found = [], []
    for prompt in prompts:
        said = []
        for candidate in prompt.candidates:
            with torch.no_grad():
                logits = untrained(torch.tensor([prompt.tokens + candidate])).logits[0, len(prompt.tokens) - 1 : -1]
            said.append(logits.log_softmax(-1).gather(1, torch.tensor(candidate)[:, None]).sum().item())
        margins.append(said[0] - sum(said[1:]) / 3)
        found.append(said[0] > max(said[1:]))
    scores = ask(untrained, prompts)
    assert scores["margin"] == pytest.approx(sum(margins) / 2, abs=1e-4)
    assert scores["found"] == sum(found) / 2 and scores["exact"] == 0


def test_a_model_that_knows_the_answer_is_exact(untrained, words):
    prompts = next(Needle("number", words, lengths=(600,), examples=2).build(load_tokenizer("bytes"), 0))[2]
    right = torch.tensor([prompt.candidates[0] for prompt in prompts])

    class Knows(torch.nn.Module):
        device, config = untrained.device, untrained.config

        def forward(self, tokens, past_key_values, use_cache, logits_to_keep=0):
            untrained(tokens, past_key_values=past_key_values, use_cache=True)
            answers = right[:, :1] if logits_to_keep else right[:, 1:].repeat_interleave(10, 0)
            return type("Out", (), {"logits": 9.0 * torch.nn.functional.one_hot(answers, 257)})

    scores = ask(Knows(), prompts)  # type: ignore[arg-type]
    assert scores["exact"] == scores["found"] == 1 and scores["margin"] > 10


@pytest.mark.parametrize("kind", ["passkey", "number", "uuid"])
def test_a_learned_needle_is_a_prompt_and_its_answer(kind, words):
    inputs, targets, *_ = draw(Haystack(words), (kind, 1500), 16)
    depths, values = [], set()
    for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        text = bytes(tokens).decode()
        said = bytes(token for token in answers if token != IGNORE).decode()
        # What is asked at a token is the next one: the prompt, and behind it all of the answer but its end.
        assert text.endswith("mentioned in the provided text is " + said[:-1]) and answers[-1] == ord(said[-1])
        first = re.search(r"magic \w+s for ([\w-]+) is: ([\w-]+)\.\n", text)
        assert first and first[2] == said and f"for {first[1]} mentioned" in text
        depths.append(first.start() / 1500)
        values.add(said)
    assert len(values) == 16 and max(depths) - min(depths) > 0.3


def test_which_tasks_are_of_trained_models():
    assert {name for name, t in TASKS.items() if isinstance(t, LanguageTask)} == {
        *("perplexity", "positions", "passkey", "needle_number", "needle_uuid")
    }
    assert Examples(*(torch.arange(6).view(3, 2),) * 2).part(1, 3).inputs.tolist() == [[2, 3], [4, 5]]
