"""Text until a stop string, against greedy decoding by full passes."""

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from mobiquant_jax.evaluation.tasks import generation
from mobiquant_jax.evaluation.tasks.generation import CHUNK_TOKENS, GenerationSettings
from mobiquant_jax.evaluation.tasks.language_model import MobiquantLM
from mobiquant_jax.serving import SamplingConfig

NEW = 40


def generate(lm: MobiquantLM, *requests: tuple[str, dict]) -> list[str]:
    made = [Instance(request_type="generate_until", doc={}, arguments=r, idx=i) for i, r in enumerate(requests)]
    return lm.generate_until(made, disable_tqdm=True)


@pytest.fixture
def greedy(base_model, numpy_logits):
    """A function of (text or ids, most tokens): what greedy decoding adds, by one full pass a token."""

    def ids(prompt, steps: int = NEW) -> list[int]:
        tokens = base_model.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt)
        first = len(tokens)
        while len(tokens) < first + steps:
            token = int(numpy_logits(base_model, tokens)[-1].argmax())
            if token in base_model.tokenizer.eos_token_ids:
                break
            tokens.append(token)
        return tokens[first:]

    return ids


@pytest.fixture
def greedy_text(base_model, greedy):
    return lambda prompt, steps=NEW: base_model.tokenizer.decode(greedy(prompt, steps))


def test_greedy_text_equals_full_passes_in_any_batch(rng, base_model, text, greedy_text):
    model = base_model
    prompts = [text(rng, words) for words in (2, 5, 1, 4, 3)]
    expected = [greedy_text(prompt) for prompt in prompts]
    for batch_size in (1, 2):
        lm = MobiquantLM(model, batch_size=batch_size)
        assert generate(lm, *((prompt, {"max_gen_toks": NEW}) for prompt in prompts)) == expected
    assert len(set(expected)) > 1


def test_a_stop_string_ends_the_text_and_the_work(base_model, greedy_text, monkeypatch):
    model = base_model
    whole = greedy_text("cab idea")
    stop = whole[3:5]
    chunks = []

    def counting(*args, **kwargs):
        for chunk in stream(*args, **kwargs):
            chunks.append(chunk)
            yield chunk

    stream = generation.stream
    monkeypatch.setattr(generation, "stream", counting)
    lm = MobiquantLM(model, batch_size=2)
    arguments = {"until": [stop, "never in it"], "max_gen_toks": NEW}
    assert generate(lm, ("cab idea", arguments)) == [whole.split(stop)[0]]
    assert len(whole) > CHUNK_TOKENS and len(chunks) == 1
    assert generate(lm, ("cab idea", arguments | {"until": stop})) == [whole.split(stop)[0]]
    chunks.clear()
    assert generate(lm, ("cab idea", {"max_gen_toks": NEW})) == [whole]
    assert len(chunks) == -(-NEW // CHUNK_TOKENS)


def test_an_end_token_ends_the_text(base_model, tokenizer, greedy, monkeypatch):
    ids = greedy("cab idea")
    monkeypatch.setattr(tokenizer, "eos_token_ids", (ids[4],))
    expected = tokenizer.decode(ids[: ids.index(ids[4])])
    assert generate(MobiquantLM(base_model), ("cab idea", {"max_gen_toks": NEW})) == [expected]


def test_settings_share_batches_and_answers_keep_their_order(base_model, greedy_text):
    lm = MobiquantLM(base_model, batch_size=2)
    lengths = [3, NEW, 3, NEW, 3]
    prompts = ["cab", "bad each", "idea", "fade jig acid", "hid dice"]
    found = generate(lm, *((p, {"max_gen_toks": n}) for p, n in zip(prompts, lengths, strict=True)))
    assert found == [greedy_text(p, n) for p, n in zip(prompts, lengths, strict=True)]


def test_sampling_follows_the_seed(base_model, greedy_text):
    sampled = {"max_gen_toks": NEW, "do_sample": True, "temperature": 1.5}

    def texts(seed: int, **changes) -> list[str]:
        lm = MobiquantLM(base_model, batch_size=2, seed=seed)
        return generate(lm, *[("cab idea", sampled | changes)] * 4)

    first = texts(0)
    assert first == texts(0) != texts(1)
    assert len(set(first)) > 2  # rows and batches draw for themselves
    assert set(texts(0, top_k=1)) == {greedy_text("cab idea")}
    assert set(texts(0, do_sample=False)) == {greedy_text("cab idea")}


def test_long_prompts_lose_their_beginning_and_empty_ones_get_a_token(rng, base_model, tokenizer, text, greedy):
    prompt = text(rng, 30)
    ids = tokenizer.encode(prompt).tolist()
    assert len(ids) > 60
    lm = MobiquantLM(base_model, batch_size=2, max_length=NEW + 30)
    expected = [tokenizer.decode(greedy(tokens)) for tokens in (ids[-30:], [0])]
    assert generate(lm, (prompt, {"max_gen_toks": NEW}), ("", {"max_gen_toks": NEW})) == expected


def test_elastic_text_follows_bits(elastic_model):
    found = [generate(MobiquantLM(elastic_model, bits=b), ("cab idea", {"max_gen_toks": 12}))[0] for b in (2, 8)]
    assert found[0] != found[1]


def test_settings_are_read_as_lm_eval_means_them():
    read = GenerationSettings.from_lm_eval
    assert read({}, 256) == GenerationSettings(max_new_tokens=256)
    assert read({"until": "\n", "max_new_tokens": 7}, 256) == GenerationSettings(max_new_tokens=7, stops=("\n",))
    assert read({"temperature": 0.0, "until": ["a", ""]}, 9) == GenerationSettings(max_new_tokens=9, stops=("a",))
    sampled = read({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}, 9).sampling
    assert sampled == SamplingConfig(temperature=0.7, top_k=5, top_p=0.9)
    assert read({"do_sample": True, "top_k": 0}, 9).sampling == SamplingConfig(temperature=1.0)
    assert read({"temperature": 0.5}, 9).sampling == SamplingConfig(temperature=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "generation argument 'num_beams' is not supported"),
        ({"max_gen_toks": 0}, "max_gen_toks must be at least 1, got 0"),
        ({"max_gen_toks": 128}, "max_gen_toks=128 leaves no room for a prompt in 128 tokens"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2}, r"top_p must be in \(0, 1\], got 2.0"),
    ],
)
def test_mistakes_are_named(base_model, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate(MobiquantLM(base_model), ("cab", arguments))
