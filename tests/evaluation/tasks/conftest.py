"""A small tokenizer with merges and characters of several bytes, random models that use it, and a float64 LLaMA."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from mobiquant_jax.evaluation.tasks import continuation_step
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
    trainer = trainers.BpeTrainer(vocab_size=30, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([" ".join(WORDS) for _ in range(10)] + WORDS, trainer)
    return Tokenizer(backend, bos_token_id=0, eos_token_ids=[1])


@pytest.fixture(scope="session")
def text() -> Callable[..., str]:
    """A function of (rng, words): random words, the first without a space before it."""
    return lambda rng, words: " ".join(rng.choice(WORDS, words).tolist())


@pytest.fixture(scope="session")
def base_model(tokenizer: Tokenizer) -> ElasticModel:
    """An unquantized model with a loud embedding, so that its predictions differ."""
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
    model = ElasticModel(config=config, variables={}, tokenizer=tokenizer)
    return dataclasses.replace(model, variables=_random_variables(config, 8))


@pytest.fixture(scope="session")
def random_model(base_model: ElasticModel) -> Callable[[np.random.Generator], ElasticModel]:
    """A function of the rng: a model like `base_model`, of other weights."""
    return lambda rng: dataclasses.replace(
        base_model, variables=_random_variables(base_model.config, int(rng.integers(2**31)))
    )


def _random_variables(config: LlamaConfig, seed: int) -> Any:
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        center, scale = (1, 0.1) if "norm" in name else (0, 1.0 if "embedder" in name else leaf.shape[-2] ** -0.5)
        return jnp.asarray(center + scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def elastic_model(random_elastic, tokenizer: Tokenizer) -> ElasticModel:
    """An elastic model of a fixed seed: a score on the edge of a threshold would fall on either side by shape."""
    return random_elastic(5, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def dense_step(base_model: ElasticModel):
    """One step for all unquantized models, so that the tests share its compilations."""
    return continuation_step(base_model)


@pytest.fixture(scope="session")
def elastic_step(elastic_model: ElasticModel):
    return continuation_step(elastic_model)


@pytest.fixture(scope="session")
def numpy_logits() -> Callable[[ElasticModel, list[int]], np.ndarray]:
    """A function of (unquantized model, tokens): logits [T, V] of one full pass in float64 numpy."""

    def logits(model: ElasticModel, tokens: list[int]) -> np.ndarray:
        cfg = model.config
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.variables["params"])
        length, half = len(tokens), cfg.head_dim // 2
        angles = np.arange(length)[:, None] / cfg.rope_theta ** (np.arange(half) / half)  # [T, half]
        turn = np.exp(1j * angles)[:, None]  # [T, 1, half]
        x = params["embedder"]["embedding"][tokens]  # [T, D]

        def norm(y, scale):
            return y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + cfg.rms_norm_eps) * scale

        def heads(y, kernel):
            return (y @ kernel).reshape(length, -1, cfg.head_dim)

        def rotated(y):
            turned = (y[..., :half] + 1j * y[..., half:]) * turn
            return np.concatenate([turned.real, turned.imag], axis=-1)

        for i in range(cfg.num_hidden_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            kernels = {name: part["kernel"] for name, part in (layer["attention"] | layer["mlp"]).items()}
            y = norm(x, layer["attention_norm"]["scale"])
            q, k = rotated(heads(y, kernels["q_proj"])), rotated(heads(y, kernels["k_proj"]))
            v = heads(y, kernels["v_proj"])
            mixed = np.zeros_like(q)
            for head in range(cfg.num_attention_heads):
                shared = head * cfg.num_key_value_heads // cfg.num_attention_heads
                weights = np.exp(q[:, head] @ k[:, shared].T / np.sqrt(cfg.head_dim)) * np.tri(length)
                mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, shared]
            x = x + mixed.reshape(length, -1) @ kernels["o_proj"]
            y = norm(x, layer["mlp_norm"]["scale"])
            gate = y @ kernels["gate_proj"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ kernels["up_proj"])) @ kernels["down_proj"]
        return norm(x, params["final_norm"]["scale"]) @ params["lm_head"]["kernel"]

    return logits


@pytest.fixture(scope="session")
def tail_score() -> Callable[[np.ndarray, list[int], int], tuple[float, bool]]:
    """A function of (logits [T, V], tokens [T], start): log-probability and greedy flag of tokens[start:]."""

    def score(logits: np.ndarray, tokens: list[int], start: int) -> tuple[float, bool]:
        rows = np.asarray(logits, np.float64)[start - 1 : -1]
        log_z = np.log(np.exp(rows - rows.max()).sum(axis=1)) + rows.max()
        picked = rows[np.arange(len(rows)), tokens[start:]] - log_z
        return float(picked.sum()), rows.argmax(axis=1).tolist() == list(tokens[start:])

    return score


@pytest.fixture(scope="session")
def reference(numpy_logits, tail_score) -> Callable[[ElasticModel, list[int], int], tuple[float, bool]]:
    """A function of (unquantized model, tokens, start): what the continuation tokens[start:] scores."""
    return lambda model, tokens, start: tail_score(numpy_logits(model, tokens), tokens, start)


@pytest.fixture(scope="session")
def task_files(text, tmp_path_factory) -> Path:
    """A folder with twelve made-up documents for each of the six local tasks."""
    rng = np.random.default_rng(11)
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("arc_challenge_test", "arc_easy_test", "hellaswag_val_2000", "openbookqa_test", "piqa_valid"):
        documents = [
            {
                "ctx": text(rng, int(rng.integers(2, 9))),
                "choices": [text(rng, int(rng.integers(1, 4))) for _ in range(int(rng.integers(2, 5)))],
                "label": int(rng.integers(2)),
            }
            for _ in range(12)
        ]
        _write_lines(folder / f"{name}.jsonl", documents)
    contexts = [[text(rng, int(n)) for _ in range(2)] for n in rng.integers(2, 9, 12)]
    documents = [
        {"ctxs": pair, "target": text(rng, 2), "choices": ["a", "b"], "label": int(rng.integers(2))}
        for pair in contexts
    ]
    _write_lines(folder / "winogrande_xl_dev.jsonl", documents)
    return folder


def _write_lines(path: Path, documents: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents), encoding="utf-8")
