"""What each token would lose in each linear at each depth, measured as the model runs under any policy."""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.analysis.linears import elastic_config, stack_sown
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticLinear, ElasticModel, Variables
from mobiquant_jax.models.layers import project
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import Policy


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Probe:
    """Per-token measurements in every linear; N counts a layer's linears in the order of ``linear_shapes``.

    Attributes:
        errors: relative output error at depths 1..E-1; at depth E it is zero by definition.
        magnitude: norm of the output at full depth.
        scores: router scores of slices 2..E.
        norm: norm of the input.
        bits: bits that the policy gave.
    """

    errors: Float[Array, "L N B T E-1"]
    magnitude: Float[Array, "L N B T"]
    scores: Float[Array, "L N B T E-1"]
    norm: Float[Array, "L N B T"]
    bits: Float[Array, "L N B T"]


class ProbedLinear(ElasticLinear):
    """An `ElasticLinear` that also sows its errors, and the norms of its input and output, into ``stats``."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: Policy) -> Float[Array, "B T out"]:
        """See `ElasticLinear`; the output is the same."""
        y = super().__call__(x, control)
        with jax.named_scope("probe"):
            errors, magnitude = output_errors(x, self.get_variable("slices", "weight"))
        self.sow("stats", "errors", errors)
        self.sow("stats", "magnitude", magnitude)
        self.sow("stats", "norm", jnp.linalg.norm(x.astype(jnp.float32), axis=-1))
        return y


def output_errors(
    x: Float[Array, "*batch in"], weight: SlicedWeight
) -> tuple[Float[Array, "*batch E-1"], Float[Array, "*batch"]]:
    """Relative output errors ``|x (W_k - W_E)| / |x W_E|`` at depths k < E, and ``|x W_E|``."""
    full = weight.dequantize(len(weight.planes))
    magnitude = jnp.linalg.norm(project(x, full), axis=-1)
    lost = [jnp.linalg.norm(project(x, weight.dequantize(k) - full), axis=-1) for k in range(1, len(weight.planes))]
    return jnp.stack(lost, axis=-1) / (magnitude[..., None] + 1e-20), magnitude


def probe(
    model: ElasticModel, variables: Variables, tokens: Int[Array, "B T"], policy: Policy
) -> tuple[Float[Array, "B T V"], Probe]:
    """Logits under a policy, and the measurements in every linear on the way. Pure."""
    elastic = elastic_config(model)
    module = Llama(model.config, linear=partial(ProbedLinear, elastic=elastic), dtype=model.dtype)
    logits, state = module.apply(variables, tokens, policy, mutable=["stats", "scores"])

    stats = {name: stack_sown(model.config, state["stats"], name) for name in ("errors", "magnitude", "norm", "bits")}
    return logits, Probe(scores=stack_sown(model.config, state["scores"], "scores"), **stats)
