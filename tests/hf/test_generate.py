"""`generate` and the cache: cached = uncached = row by row, whatever the padding, the prompt and the decoding."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from miras import variants
from miras.errors import UsageError
from miras.hf import MirasCache, MirasConfig, MirasForCausalLM

CHUNK, WINDOW, VOCAB, LAYERS, NEW = 8, 5, 29, 2, 11
# Shorter than a chunk, equal to one, longer.
LENGTHS = (3, 8, 21)
RULES = ("moneta", "yaad", "memora", "titans", "gated_deltanet")
HYBRID = "yaad,sliding_window"
MODELS = (*RULES, "transformer", HYBRID)

every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, dtype: torch.dtype = torch.float64, **options) -> MirasForCausalLM:
    """A small model, far enough from its initialisation that its tokens differ."""
    mixers = [
        variants.sliding_window(WINDOW) if part == "sliding_window" else variants.variant(part, CHUNK)
        for part in name.split(",")
    ]
    config = MirasConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        mixer=mixers,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,  # a tied output layer makes small models repeat themselves
        **options,
    )
    torch.manual_seed(0)
    model = MirasForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def draw_prompts(lengths=LENGTHS) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(1, VOCAB, (n,)) for n in lengths]


def pad(prompts: list[Tensor], side: str) -> dict[str, Tensor]:
    """A batch with the padding on one side, as a tokenizer returns it."""
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


def written(model: MirasForCausalLM, batch: dict[str, Tensor], **options) -> Tensor:
    """The tokens that `generate` adds, [rows, NEW]."""
    return model.generate(**batch, max_new_tokens=NEW, **options)[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def read_in_parts(
    model: MirasForCausalLM, batch: dict[str, Tensor], cuts: tuple[int, ...]
) -> tuple[Tensor, MirasCache]:
    """Logits and cache after several calls that go on from each other, cut before the tokens `cuts`."""
    ids, mask, cache, logits = batch["input_ids"], batch["attention_mask"], None, []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        out = model(ids[:, start:stop], mask[:, :stop], cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


# -- generate ----------------------------------------------------------------------------------------------------------


@every_model
def test_greedy_decoding_gives_the_same_tokens_cached_uncached_and_row_by_row(name):
    model, prompts = make(name), draw_prompts()
    batch = pad(prompts, "left")
    cached = written(model, batch, do_sample=False)
    assert len(cached.unique()) > 5, "a model that repeats itself would pass whatever it computes"
    assert torch.equal(cached, written(model, batch, do_sample=False, use_cache=False))
    for row, prompt in enumerate(prompts):
        alone = written(model, {"input_ids": prompt[None]}, do_sample=False)
        assert torch.equal(cached[row], alone[0]), f"prompt of {len(prompt)} tokens"


@every_model
def test_sampling_with_a_seed_gives_the_same_tokens_cached_and_uncached(name):
    model, batch = make(name), pad(draw_prompts(), "left")
    drawn = []
    for cached in (True, False):
        torch.manual_seed(5)
        drawn.append(written(model, batch, do_sample=True, num_return_sequences=2, use_cache=cached))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1]), "two samples of one prompt differ"


@every_model
def test_beams_are_the_same_cached_and_uncached(name):
    model, batch = make(name), pad(draw_prompts(), "left")
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    cached = written(model, batch, **options)
    assert torch.equal(cached, written(model, batch, use_cache=False, **options))
    assert not torch.equal(cached[0], cached[1]), "two beams of one prompt differ"


@pytest.mark.parametrize("name", ["yaad", HYBRID])
def test_a_conversation_goes_on_from_its_cache(name):
    model, (first, second, _) = make(name), draw_prompts()
    out = model.generate(first[None], max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, second[None]], 1)
    # Said, because the model may have written what `generate` would take for padding.
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    resumed = written(model, batch, do_sample=False, past_key_values=out.past_key_values)
    assert torch.equal(resumed, written(model, batch, do_sample=False))


def test_a_configuration_without_cache_generates_too():
    model, batch = make("yaad", use_cache=False), pad(draw_prompts(), "left")
    assert model(**batch).past_key_values is None
    assert torch.equal(written(model, batch, do_sample=False), written(make("yaad"), batch, do_sample=False))


def test_assisted_decoding_is_refused():
    # It would have to take rejected tokens back out of the memory.
    with pytest.raises(ValueError, match="stateful"):
        make("yaad").generate(draw_prompts()[0][None], prompt_lookup_num_tokens=2, max_new_tokens=2)


# -- logits ------------------------------------------------------------------------------------------------------------


@every_model
def test_cached_logits_in_float32_stay_within_twice_the_error_of_the_full_forward(name):
    model, batch = make(name, torch.float32), pad(draw_prompts(), "left")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        full = model(**batch).logits[mask]
    decoded = read_in_parts(model, batch, tuple(range(1, mask.shape[1])))[0][mask]
    with torch.no_grad():
        exact = model.double()(**batch).logits[mask]
    bound = 2 * relative_error(full, exact) + 1e-6
    assert relative_error(decoded, exact) <= bound


@every_model
@pytest.mark.parametrize("cuts", [(5, 6, 14), (8, 16), (20,)], ids=str)
def test_several_calls_with_the_cache_are_one_call(name, cuts):
    # The first call of the first row sees nothing but padding.
    model, batch = make(name), pad(draw_prompts(), "left")
    mask = batch["attention_mask"].bool()
    whole, cache = read_in_parts(model, batch, ())
    parts, cache_of_parts = read_in_parts(model, batch, cuts)
    torch.testing.assert_close(parts[mask], whole[mask], rtol=1e-9, atol=1e-9)
    assert cache_of_parts.get_seq_length() == cache.get_seq_length() == max(LENGTHS)
    step = {"input_ids": torch.full((3, 1), 7), "use_cache": True}
    after = [model(past_key_values=c, **step).logits for c in (cache, cache_of_parts)]
    torch.testing.assert_close(*after, rtol=1e-9, atol=1e-9)


@every_model
def test_padding_on_the_right_changes_neither_logits_nor_cache(name):
    model, prompts = make(name), draw_prompts()
    batch = pad(prompts, "right")
    logits, cache = read_in_parts(model, batch, ())
    step = torch.full((3, 1), 7)
    with torch.no_grad():
        after = model(step, past_key_values=cache).logits
        for row, prompt in enumerate(prompts):
            ids = torch.cat([prompt, step[row]])[None]
            alone = model(ids).logits[0]
            torch.testing.assert_close(logits[row, : len(prompt)], alone[:-1], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(after[row], alone[-1:], rtol=1e-9, atol=1e-9)


@every_model
def test_what_stands_in_the_padding_does_not_matter(name):
    model, batch = make(name), pad(draw_prompts(), "left")
    mask = batch["attention_mask"].bool()
    other = torch.where(mask, batch["input_ids"], 23)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[mask], model(other, batch["attention_mask"]).logits[mask])


def test_logits_to_keep_are_the_last_ones():
    model, ids = make("yaad"), draw_prompts()[2][None]
    with torch.no_grad():
        full = model(ids).logits
        for keep, kept in ((1, full[:, -1:]), (torch.tensor([2, 5]), full[:, [2, 5]])):
            torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, kept, rtol=1e-12, atol=1e-12)


# -- the cache ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def next_logits(model: MirasForCausalLM, cache: MirasCache, rows: int) -> Tensor:
    """Logits of a same next token in every row; the cache goes on."""
    return model(torch.full((rows, 1), 7), past_key_values=cache).logits


@every_model
def test_rows_of_a_cache_can_be_reordered_selected_and_repeated(name):
    model, batch = make(name), pad(draw_prompts(), "left")
    expected = next_logits(model, read_in_parts(model, batch, ())[1], 3)
    index = torch.tensor([2, 0, 0])
    changes = {
        "reorder_cache": (index, expected[index]),
        "batch_select_indices": (index[:2], expected[index[:2]]),
        "batch_repeat_interleave": (2, expected.repeat_interleave(2, 0)),
    }
    for method, (argument, rows) in changes.items():
        cache = read_in_parts(model, batch, ())[1]
        getattr(cache, method)(argument)
        got = next_logits(model, cache, len(rows))
        torch.testing.assert_close(got, rows, rtol=1e-9, atol=1e-9, msg=lambda text, m=method: f"{m}: {text}")


@pytest.mark.parametrize("name", ["yaad", HYBRID])
def test_a_cache_cannot_be_cropped_but_a_copy_can_be_returned_to(name):
    model, batch = make(name), pad(draw_prompts(), "left")
    cache = read_in_parts(model, batch, ())[1]
    with pytest.raises(UsageError, match=r"cannot unlearn tokens.*copy"):
        cache.crop(5)
    kept = copy.deepcopy(cache)
    first = next_logits(model, cache, 3)
    next_logits(model, cache, 3)
    assert (cache.get_seq_length(), kept.get_seq_length()) == (23, 21)
    assert torch.equal(next_logits(model, kept, 3), first)


def test_keys_and_values_cannot_be_put_into_a_cache():
    with pytest.raises(UsageError, match="whole states"):
        MirasCache(1).update(torch.zeros(1), torch.zeros(1), 0)


@every_model
def test_a_cache_that_was_reset_is_as_new(name):
    model, batch = make(name), pad(draw_prompts(), "left")
    cache = read_in_parts(model, batch, ())[1]
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    with torch.no_grad():
        assert torch.equal(model(**batch, past_key_values=cache).logits, model(**batch).logits)


def cache_bytes(name: str) -> list[int]:
    """Bytes of the cache of one row after 1, 9, 17, 25, ... tokens."""
    model, cache, sizes = make(name, torch.float32), None, []
    torch.manual_seed(2)
    with torch.no_grad():
        for tokens in (1, 8, 8, 8, 8):
            cache = model(torch.randint(1, VOCAB, (1, tokens)), past_key_values=cache, use_cache=True).past_key_values
            sizes.append(cache.nbytes)
    return sizes


@pytest.mark.parametrize("name", RULES)
def test_the_cache_of_a_memory_has_one_size(name):
    assert len(set(cache_bytes(name))) == 1


def test_the_cache_of_a_transformer_grows_by_the_same_for_each_token():
    sizes = cache_bytes("transformer")
    keys_and_values = 4 * LAYERS * 2 * 32
    assert [b - a for a, b in itertools.pairwise(sizes)] == [8 * keys_and_values] * 4


def test_the_cache_of_a_hybrid_grows_up_to_its_window():
    sizes = cache_bytes(HYBRID)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3] == sizes[4]


def test_detach_cuts_the_gradient_and_keeps_the_numbers():
    model, ids = make("yaad"), draw_prompts()[2][None]
    cache = model(ids, use_cache=True).past_key_values
    assert any(x.requires_grad for x in cache.layers[0].state.mixer.dual.values())
    kept = {n: x.clone() for n, x in cache.layers[0].state.mixer.dual.items()}
    cache.detach()
    for n, x in cache.layers[0].state.mixer.dual.items():
        assert not x.requires_grad
        assert torch.equal(x, kept[n])
