"""All baselines behind one entry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from mobiquant_jax.baselines import autoround, awq, gptq, omniquant, qat, rtn
from mobiquant_jax.baselines.engine import QuantizeBlock, QuantizedModel, Run, quantize_blocks, with_layers
from mobiquant_jax.baselines.kernels import Params
from mobiquant_jax.baselines.spec import QuantSpec
from mobiquant_jax.models import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """A fixed-width baseline.

    Attributes:
        settings: its config class; ``settings.recipe(bits)`` gives the settings to start from.
        build: ``spec -> block function``; None for round-to-nearest, which takes no data.
        seeded: whether the seed has an effect.
    """

    settings: Any
    build: Callable[[QuantSpec], QuantizeBlock] | None
    seeded: bool


METHODS = {
    "rtn": Method(settings=rtn.RTNConfig, build=None, seeded=False),
    "gptq": Method(settings=gptq.GPTQConfig, build=gptq.build, seeded=False),
    "awq": Method(settings=awq.AWQConfig, build=awq.build, seeded=False),
    "omniquant": Method(settings=omniquant.OmniQuantConfig, build=omniquant.build, seeded=True),
    "qat": Method(settings=qat.QATConfig, build=qat.build, seeded=True),
    "autoround": Method(settings=autoround.AutoRoundConfig, build=autoround.build, seeded=True),
}


def find_method(name: str) -> Method:
    """A baseline by name; a ValueError lists them."""
    if name not in METHODS:
        raise ValueError(f"unknown baseline '{name}': one of {', '.join(METHODS)}")
    return METHODS[name]


def quantize_models(
    method: str,
    spec: QuantSpec,
    params: Params,
    windows: Int[np.ndarray, "N T"],
    runs: Sequence[Run],
    on_block: Callable[[int, tuple[float, ...]], None] = lambda index, errors: None,
) -> list[QuantizedModel]:
    """Quantizes all seven linears of every block, once for each run; all runs share one program.

    Embedding, norms and head stay in full precision. (AWQ moves scales into the norms.)

    Args:
        method: a name in `METHODS`.
        spec: model, width and group size.
        params: the dense model's parameters.
        windows: calibration tokens.
        runs: settings and seeds; the settings share their static fields.
        on_block: called with the number of a finished block and its error in each run.

    Returns:
        The dense model with dequantized kernels, of each run.

    Raises:
        ValueError: an unknown method, runs that differ in more than numbers, or a block whose output is not finite.
    """
    found = find_method(method)
    if found.build is None:
        layers = rtn.quantize_layers(spec, jax.tree.map(jnp.asarray, params["layers"]))
        return [QuantizedModel(params=with_layers(params, layers)) for _ in runs]
    return quantize_blocks(spec, found.build(spec), params, windows, runs, on_block)


def quantize_model(
    method: str,
    config: LlamaConfig,
    params: Params,
    windows: Int[np.ndarray, "N T"],
    *,
    bits: int,
    group_size: int,
    seed: int = 0,
    settings: Any = None,
    dtype: DTypeLike = jnp.float32,
) -> QuantizedModel:
    """One run of `quantize_models`, with the method's recipe unless settings are given."""
    spec = QuantSpec(config=config, bits=bits, group_size=group_size, dtype=dtype)
    settings = find_method(method).settings.recipe(bits) if settings is None else settings
    return quantize_models(method, spec, params, windows, [Run(settings=settings, seed=seed)])[0]


def run_omniquant_at(spec: QuantSpec, params: Params, calibrated: QuantizedModel) -> QuantizedModel:
    """OmniQuant calibrated at one width and run at another: its clipping logits are kept, its grid is not.

    Args:
        spec: the width to run at; its group size is the one of the calibration.
        params: the dense model's parameters.
        calibrated: what OmniQuant made at any width.

    Raises:
        ValueError: ``calibrated`` holds no clipping logits.
    """
    if calibrated.kept is None:
        raise ValueError("only OmniQuant's clipping can be run at another width")
    layers = omniquant.run_at(spec, jax.tree.map(jnp.asarray, params["layers"]), calibrated.kept)
    return QuantizedModel(params=with_layers(params, layers))
