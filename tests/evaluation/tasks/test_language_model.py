"""The lm-eval model against unpadded full passes in float64, on random models with a real tokenizer."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model

from mobiquant_jax.evaluation.tasks.language_model import MobiquantLM
from mobiquant_jax.evaluation.tasks.runner import register
from mobiquant_jax.io.checkpoint import save_checkpoint


def requests(*arguments: tuple) -> list[Instance]:
    return [Instance(request_type="loglikelihood", doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def quiet(lm: MobiquantLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests(*pairs), disable_tqdm=True)


@pytest.fixture
def dense(dense_step):
    """A function of (model, arguments): the model for lm-eval, with the shared step."""
    return lambda model, **arguments: MobiquantLM(model, step=dense_step, **{"batch_size": 4} | arguments)


def test_log_likelihoods_equal_full_passes(rng, random_model, dense, tokenizer, text, reference):
    model = random_model(rng)
    pairs = [(text(rng, a), " " + text(rng, b)) for a, b in ((1, 1), (4, 3), (9, 1), (12, 6), (2, 8), (5, 2), (22, 4))]
    pairs[1] = (pairs[1][0] + " ", pairs[1][1][1:])  # the space moves to the continuation
    answers = quiet(dense(model), pairs)
    lengths = set()
    for (context, continuation), (log_prob, greedy) in zip(pairs, answers, strict=True):
        whole = tokenizer.encode(context + continuation).tolist()
        start = len(tokenizer.encode(context.rstrip()))
        lengths.add(len(whole) - start)
        assert (log_prob, greedy) == (pytest.approx(reference(model, whole, start)[0], rel=1e-5), False)
    assert min(lengths) < 5 and max(lengths) > 15  # tokens of the continuations


def test_the_greedy_continuation_is_known(rng, random_model, dense, tokenizer, numpy_logits):
    model = random_model(rng)
    ids = tokenizer.encode("cab idea").tolist()
    start = len(ids)
    while len(ids) < start + 8:
        ids.append(int(numpy_logits(model, ids)[-1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 30]
    found = dense(model)._loglikelihood_tokens([(None, x[:start], x[start:]) for x in (ids, other)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_elastic_log_likelihoods_equal_full_passes_at_any_bits(elastic_model, elastic_step, tokenizer, tail_score):
    context, continuation = "cab idea café hid", " jig badge"
    whole = tokenizer.encode(context + continuation).tolist()
    forward = jax.jit(elastic_model.forward)  # one row, nothing padded
    found, measured = [], []
    for bits in (2, 3.7, 8):
        lm = MobiquantLM(elastic_model, bits=bits, batch_size=2, step=elastic_step)
        assert lm.measured_bits is None
        ((log_prob, greedy),) = quiet(lm, [(context, continuation)])
        logits, used = forward(elastic_model.variables, jnp.asarray([whole]), jnp.asarray([float(bits)]))
        expected, is_greedy = tail_score(logits[0], whole, len(tokenizer.encode(context)))
        assert (log_prob, greedy) == (pytest.approx(expected, rel=1e-4), is_greedy)
        assert lm.measured_bits == pytest.approx(float(used[0, :-1].mean()), rel=1e-5)
        assert lm.get_model_info() == {"bits": bits, "measured_bits": lm.measured_bits, "max_length": 128}
        found.append(log_prob)
        measured.append(lm.measured_bits)
    assert len({round(log_prob, 3) for log_prob in found}) == 3
    assert 2 <= measured[0] < measured[1] < measured[2] <= 8


def test_order_and_batch_do_not_matter(rng, base_model, dense, text):
    pairs = [(text(rng, int(a)), " " + text(rng, int(b))) for a, b in rng.integers(1, 11, (11, 2))]
    whole = quiet(dense(base_model), pairs)
    single = quiet(dense(base_model, batch_size=1), pairs)
    shuffled = rng.permutation(len(pairs))
    again = quiet(dense(base_model), [pairs[i] for i in shuffled])
    np.testing.assert_allclose([a for a, _ in single], [a for a, _ in whole], rtol=1e-5)
    np.testing.assert_allclose([a for a, _ in again], [whole[i][0] for i in shuffled], rtol=1e-5)
    assert len({round(a, 4) for a, _ in whole}) > 8


def test_an_empty_context_is_the_prefix_token(rng, random_model, dense, tokenizer, reference):
    model = random_model(rng)
    lm = dense(model)
    assert (lm.prefix_token_id, lm.eot_token_id) == (0, 1)
    ids = tokenizer.encode("cab idea").tolist()
    (plain,) = quiet(lm, [("", "cab idea")])
    assert plain[0] == pytest.approx(reference(model, [0, *ids], 1)[0], rel=1e-5)
    # A continuation that begins with the prefix token itself is not given a second one.
    (begun,) = quiet(lm, [("", "<s>cab idea")])
    assert begun == plain


def test_a_continuation_without_tokens_is_an_error(base_model, dense):
    lm = dense(base_model)
    for context in ("", "cab"):
        with pytest.raises(ValueError, match=f"the continuation of '{context}' is empty"):
            quiet(lm, [("cab", " bad"), (context, "")])
    with pytest.raises(ValueError, match="needs tokens of context and of continuation, got 1 and 0"):
        quiet(lm, [("", "<s>")])


def test_long_requests_lose_the_beginning_of_their_context(rng, random_model, dense, tokenizer, text, reference):
    model = random_model(rng)
    context, continuation = text(rng, 30), " " + text(rng, 3)
    whole = tokenizer.encode(context + continuation).tolist()
    start = len(tokenizer.encode(context))
    assert len(whole) > 50
    for max_length in (20, 33):
        ((log_prob, _),) = quiet(dense(model, max_length=max_length), [(context, continuation)])
        kept = whole[-(max_length + 1) :]
        expected, _ = reference(model, kept, len(kept) - (len(whole) - start))
        assert log_prob == pytest.approx(expected, rel=1e-5)


def test_begin_of_text_is_put_once(rng, random_model, dense, tokenizer, reference):
    model = random_model(rng)
    lm = dense(model, add_bos_token=True)
    ids = tokenizer.encode("cab idea bad").tolist()
    assert lm.tok_encode("cab idea bad") == [0, *ids]
    assert lm.tok_encode("<s>cab idea bad") == [0, *ids]
    assert lm.tok_encode("cab idea bad", add_special_tokens=False) == ids
    start = len(tokenizer.encode("cab idea"))
    ((log_prob, _),) = quiet(lm, [("cab idea", " bad")])
    assert log_prob == pytest.approx(reference(model, [0, *ids], start + 1)[0], rel=1e-5)
    # A whole text is scored after one begin-of-text token, which is not scored itself.
    rolled = [each.loglikelihood_rolling(requests(("cab idea bad",)), disable_tqdm=True) for each in (lm, dense(model))]
    assert rolled[0] == rolled[1]


def test_rolling_predicts_every_token_once(rng, random_model, dense, tokenizer, text, reference):
    model = random_model(rng)
    window = 24
    texts = [text(rng, 40), "cab", "", text(rng, 9)]
    lm = dense(model, batch_size=4, max_length=window)
    found = lm.loglikelihood_rolling(requests(*((t,) for t in texts)), disable_tqdm=True)
    for string, total in zip(texts, found, strict=True):
        ids = tokenizer.encode(string).tolist()
        expected = 0.0
        for begin in range(0, len(ids), window):
            part = ids[begin : begin + window]
            if begin == 0:
                tokens = [0, *part]
            else:  # a full window of context, and the tokens that are left
                end = begin + len(part)
                tokens = ids[end - window - 1 : end]
            expected += reference(model, tokens, len(tokens) - len(part))[0]
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert found[2] == 0.0
    # Within one window, the sum over its single tokens.
    ids = tokenizer.encode(texts[3]).tolist()[: window - 1]
    short = tokenizer.decode(ids)
    (whole,) = lm.loglikelihood_rolling(requests((short,)), disable_tqdm=True)
    parts = lm._loglikelihood_tokens([(None, [0, *ids[:i]], [ids[i]]) for i in range(len(ids))], disable_tqdm=True)
    assert whole == pytest.approx(sum(log_prob for log_prob, _ in parts), rel=1e-5)


def test_answers_go_to_the_cache(base_model, dense, tmp_path, monkeypatch):
    lm = dense(base_model)
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    first = cached.loglikelihood(requests(("cab", " bad"), ("cab", " idea")))
    monkeypatch.setattr(lm, "_loglikelihood_tokens", None)
    assert cached.loglikelihood(requests(("cab", " idea"), ("cab", " bad"))) == first[::-1]
    cached.dbdict.close()


def test_lm_eval_makes_it_by_name_from_a_checkpoint(elastic_model, elastic_step, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", elastic_model, {})
    register()
    register()  # twice is once
    made = get_model("mobiquant").create_from_arg_string(
        f"pretrained={tmp_path}/checkpoint,bits=2.5", {"batch_size": "2", "device": "cuda:0"}
    )
    assert isinstance(made, MobiquantLM) and (made.bits, made.batch_size, made.max_length) == (2.5, 2, 128)
    # The variables are those of the checkpoint; the step is not compiled a second time.
    made._step = elastic_step
    pair = [("cab idea", " bad")]
    twin = MobiquantLM(elastic_model, bits=2.5, batch_size=2, step=elastic_step)
    assert quiet(made, pair) == quiet(twin, pair)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "average bits must be between 2 and 8, got 9"),
        ({"bits": math.nan}, "average bits must be between 2 and 8, got nan"),
        ({"bits": "many"}, "bits must be a number, got 'many'"),
        ({"bits": True}, "bits must be a number, got True"),
        ({}, "the model is elastic and needs its average bits"),
        ({"bits": 4, "batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"bits": 4, "batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"bits": 4, "max_length": 129}, "max_length=129 exceeds the model's context of 128 tokens"),
        ({"bits": 4, "max_gen_toks": 2.5}, "max_gen_toks must be a whole number of at least 1, got 2.5"),
        ({"bits": 4, "dtype": "float16"}, "the model 'mobiquant' has no argument 'dtype'"),
    ],
)
def test_mistakes_are_named(elastic_model, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MobiquantLM(elastic_model, **arguments)


def test_mistakes_about_the_model_are_named(base_model, dense, shared_data):
    with pytest.raises(FileNotFoundError, match="no file or folder 'nowhere'"):
        MobiquantLM("nowhere", bits=4)
    with pytest.raises(ValueError, match="bits=4 has no effect on the model, which is unquantized"):
        MobiquantLM(base_model, bits=4)
    with pytest.raises(ValueError, match="stories260K' has no tokenizer"):
        MobiquantLM(shared_data / "stories260K")
    lm = dense(base_model)
    lm.tokenizer = SimpleNamespace(encode=lambda string: np.array([5, 600]), bos_token_id=0)
    with pytest.raises(ValueError, match="do not fit the model's vocabulary of 30"):
        quiet(lm, [("cab", " bad")])
