"""A small tokenizer with merges and characters of several bytes, and random models that use it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from mobiquant_jax.io.tokenizer import Tokenizer
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticModel

WORDS = "cab bad fade each hid jig beach acid dice café idea chief éagb badge cabbage".split()
CONTEXT = 128  # the models' positions


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers in every run; the seed is printed to repeat a failure."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([" ".join(WORDS) for _ in range(10)] + WORDS, trainer)
    return Tokenizer(backend, bos_token_id=0, eos_token_ids=[1])


@pytest.fixture(scope="session")
def text() -> Callable[..., str]:
    """A function of (rng, words): random words, the first without a space before it."""
    return lambda rng, words: " ".join(rng.choice(WORDS, words).tolist())


@pytest.fixture(scope="session")
def dense_model(tokenizer: Tokenizer) -> Callable[[int], ElasticModel]:
    """A function of the seed: an unquantized model with a loud embedding, so that its predictions differ."""
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
    )

    def make(seed: int) -> ElasticModel:
        variables: Any = jax.jit(Llama(config).init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))
        variables = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * 8 if "embedder" in jax.tree_util.keystr(path) else leaf, variables
        )
        return ElasticModel(config=config, variables=variables, tokenizer=tokenizer)

    return make


@pytest.fixture(scope="session")
def elastic_model(random_elastic, tokenizer: Tokenizer) -> ElasticModel:
    """An elastic model of a fixed seed: a score on the edge of a threshold would fall on either side by shape."""
    return random_elastic(5, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def reference() -> Callable[..., tuple[float, bool]]:
    """A function of (model, tokens, start, bits): log-probability and greedy flag of tokens[start:], in float64."""

    def score(model: ElasticModel, tokens: list[int], start: int, bits: float) -> tuple[float, bool]:
        # One row, the whole sequence, nothing padded.
        logits, _ = model.forward(model.variables, jnp.asarray([tokens], jnp.int32), jnp.asarray([bits]))
        rows = np.asarray(logits[0], np.float64)[start - 1 : -1]
        targets = tokens[start:]
        shifted = rows - rows.max(axis=1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        picked = [log_probs[i, target] for i, target in enumerate(targets)]
        return float(np.sum(picked)), rows.argmax(axis=1).tolist() == list(targets)

    return score
