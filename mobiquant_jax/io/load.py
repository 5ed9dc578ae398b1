"""One way to open a model, elastic or not."""

from pathlib import Path

import jax
import jax.numpy as jnp

from mobiquant_jax.io.checkpoint import is_checkpoint, load_checkpoint
from mobiquant_jax.io.source import load_dense
from mobiquant_jax.models.elastic import ElasticModel


def load_model(source: str | Path) -> ElasticModel:
    """Opens an elastic checkpoint, a Hugging Face folder, a GGUF file, or ``package:NAME``.

    Returns:
        The model with its variables on the device; ``is_elastic`` tells which kind it is.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is damaged or of an unsupported kind.
    """
    if is_checkpoint(source):
        return load_checkpoint(source)
    config, params, tokenizer = load_dense(source)
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    return ElasticModel(config=config, variables=variables, tokenizer=tokenizer)
