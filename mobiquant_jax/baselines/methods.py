"""All baselines behind one entry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from mobiquant_jax.baselines import autoround, awq, gptq, omniquant, qat, rtn
from mobiquant_jax.baselines.engine import QuantizeBlock, QuantizedModel, quantize_blocks, with_layers
from mobiquant_jax.baselines.kernels import Params
from mobiquant_jax.baselines.spec import QuantSpec
from mobiquant_jax.models import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """A fixed-width baseline.

    Attributes:
        settings: its config class; ``settings.recipe(bits)`` gives the published settings.
        build: ``(spec, settings) -> block function``; None for round-to-nearest, which takes no data.
        seeded: whether the seed has an effect.
    """

    settings: Any
    build: Callable[[QuantSpec, Any], QuantizeBlock] | None
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


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A method with its settings and its compiled block function, which serves every block and every seed.

    Attributes:
        spec: model, width and group size.
        block: the block function; None for round-to-nearest.
    """

    spec: QuantSpec
    block: QuantizeBlock | None

    @classmethod
    def create(cls, method: str, spec: QuantSpec, settings: Any = None) -> "Baseline":
        """A baseline by name, with its recipe at the spec's width unless told otherwise.

        Raises:
            ValueError: an unknown method.
        """
        found = find_method(method)
        if found.build is None:
            return cls(spec=spec, block=None)
        settings = found.settings.recipe(spec.bits) if settings is None else settings
        return cls(spec=spec, block=found.build(spec, settings))

    def quantize(
        self,
        params: Params,
        windows: Int[np.ndarray, "N T"],
        seed: int = 0,
        on_block: Callable[[int, float], None] = lambda index, error: None,
    ) -> QuantizedModel:
        """Quantizes a model; see `quantize_model`."""
        if self.block is None:
            layers = rtn.quantize_layers(self.spec, jax.tree.map(jnp.asarray, params["layers"]))
            return QuantizedModel(params=with_layers(params, layers))
        return quantize_blocks(self.spec, self.block, params, windows, seed, on_block)


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
    on_block: Callable[[int, float], None] = lambda index, error: None,
) -> QuantizedModel:
    """Quantizes all seven linears of every block to one width; embedding, norms and head stay in full precision.

    Args:
        method: a name in `METHODS`.
        config: architecture.
        params: the dense model's parameters.
        windows: calibration tokens.
        bits: width, 2 to 8.
        group_size: inputs that share a scale and a zero point.
        seed: of the order of windows, where a method trains.
        settings: the method's config; None for its recipe at this width.
        dtype: type of the matmuls in training.
        on_block: called with the number of a finished block and its error.

    Returns:
        The dense model with dequantized kernels. (AWQ moves scales into the norms too.)

    Raises:
        ValueError: an unknown method, a width or group size that does not fit, or a block whose output is not finite.
    """
    spec = QuantSpec(config=config, bits=bits, group_size=group_size, dtype=dtype)
    return Baseline.create(method, spec, settings).quantize(params, windows, seed, on_block)


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
