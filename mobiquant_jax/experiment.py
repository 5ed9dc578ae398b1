"""What a config names, made of it: settings, the unquantized model, its windows of text. Shared by the scripts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32
from ml_collections import ConfigDict

from mobiquant_jax.calibration import CalibrationConfig
from mobiquant_jax.data import load_token_ids, token_windows
from mobiquant_jax.io import materialize, open_dense
from mobiquant_jax.io.dither import dither
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.sharding import Placement, job_mesh

_SIZES = (  # fields of model.architecture that tell models apart
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_SECTIONS = {"calibration": "calibration", "heldout": "evaluation"}


def _frozen(value: Any) -> Any:
    """Lists, and sections, of a ConfigDict as the tuples and dicts that frozen configs hold."""
    return tuple(value) if isinstance(value, list) else value.to_dict() if isinstance(value, ConfigDict) else value


def load_architecture(config: ConfigDict) -> LlamaConfig:
    """The architecture of ``config.model``."""
    return LlamaConfig(**{name: _frozen(value) for name, value in config.model.architecture.items()})


def load_elastic(config: ConfigDict) -> ElasticConfig:
    """The slicing and routing of ``config.quant`` and ``config.router``."""
    return ElasticConfig(
        group_size=config.quant.group_size,
        slice_bits=tuple(config.quant.slice_bits),
        router_hidden_size=config.router.hidden_size,
        budget_grid=tuple(config.router.budget_grid),
    )


def load_calibration(config: ConfigDict) -> CalibrationConfig:
    """The recipe of ``config.calibration``."""
    return CalibrationConfig(**{name: _frozen(value) for name, value in config.calibration.items()})


def load_mesh(config: ConfigDict) -> Mesh:
    """The devices that ``config.mesh`` asks for.

    Raises:
        ValueError: there are no such devices, or the model or the windows of a step do not split over them.
    """
    mesh = job_mesh(**{name: int(size) for name, size in config.mesh.items()})
    calibration = load_calibration(config)
    Placement.create(mesh, load_architecture(config), load_elastic(config)).check(**calibration.batches)
    return mesh


def load_dense_model(config: ConfigDict) -> ElasticModel:
    """`open_dense_model`, with every weight read into memory."""
    model = open_dense_model(config)
    return dataclasses.replace(model, variables=materialize(model.variables))


def open_dense_model(config: ConfigDict) -> ElasticModel:
    """The unquantized model of ``config.model``: from its source, dithered if asked for, or of random weights.

    Returns:
        The model; its weights stay on disk until they are indexed, unless they are dithered or random.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: ``config.model`` is mistaken, or describes another architecture than its source has.
    """
    if config.model.weights not in ("source", "random"):
        raise ValueError(f"model.weights={config.model.weights!r} is neither source nor random")
    architecture = load_architecture(config)
    if config.model.weights == "random":
        tokens = jnp.zeros((1, 2), jnp.int32)
        params = jax.jit(Llama(architecture).init)(jax.random.key(0), tokens)["params"]
        return ElasticModel(config=architecture, variables={"params": params})
    found, params, tokenizer = open_dense(config.model.source)
    for name in _SIZES:
        if getattr(found, name) != getattr(architecture, name):
            raise ValueError(
                f"'{config.model.source}' is another model than model.architecture describes: "
                f"its {name} is {getattr(found, name)}, not {getattr(architecture, name)}"
            )
    if config.model.dither:
        params = dither(params, found)
    return ElasticModel(config=found, variables={"params": params}, tokenizer=tokenizer)


def load_windows(config: ConfigDict, model: ElasticModel, split: str) -> Int32[np.ndarray, "n T"]:
    """The windows of ``config.data.source``, as many and as long as the section of their use says.

    Args:
        config: its section ``calibration`` or ``evaluation`` gives ``windows`` and ``window_length``.
        model: whose tokens.
        split: ``calibration`` or ``heldout``.

    Raises:
        ValueError: windows longer than the model's context, a source that has fewer, or as `load_token_ids`.
    """
    section = config[_SECTIONS[split]]
    if section.window_length > model.config.max_position_embeddings:
        raise ValueError(
            f"window_length={section.window_length} ({split}) exceeds the model's context of "
            f"{model.config.max_position_embeddings} tokens"
        )
    ids = load_token_ids(config.data.source, split, model.tokenizer)
    windows = token_windows(ids, section.window_length, section.windows, model.config.vocab_size)
    if len(windows) < section.windows:
        raise ValueError(
            f"'{config.data.source}' ({split}) has {len(windows)} windows of {section.window_length} tokens, "
            f"not {section.windows}"
        )
    return windows


def load_texts(options: Sequence[str], window_length: int, model: ElasticModel) -> dict[str, Int32[np.ndarray, "n T"]]:
    """The windows of texts to score, by name.

    Args:
        options: ``NAME=SOURCE``, or ``NAME:WINDOWS=SOURCE`` for the first windows only.
        window_length: tokens of a window.
        model: whose tokens.

    Raises:
        ValueError: no options, one that is not of this form, a name twice, or windows beyond the model's context.
    """
    if window_length > model.config.max_position_embeddings:
        raise ValueError(
            f"window_length={window_length} exceeds the model's context of "
            f"{model.config.max_position_embeddings} tokens"
        )
    texts: dict[str, np.ndarray] = {}
    for option in options:
        label, equals, source = option.partition("=")
        name, colon, count = label.partition(":")
        if not equals or not name or (colon and not count.isdigit()):
            raise ValueError(f"--text={option} is not NAME=SOURCE or NAME:WINDOWS=SOURCE")
        if name in texts:
            raise ValueError(f"--text={option}: there is another text of this name")
        ids = load_token_ids(source, "all", model.tokenizer)
        texts[name] = token_windows(ids, window_length, int(count) if colon else None, model.config.vocab_size)
    if not texts:
        raise ValueError("nothing to score: give --text=NAME=SOURCE")
    return texts
