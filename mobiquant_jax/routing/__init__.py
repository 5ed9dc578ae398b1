"""Token routing: scores, gates, and the one number that trades bits for quality."""

from mobiquant_jax.routing.budget import (
    adjacent_mix,
    check_grid,
    lookup,
    prefix_scores,
    threshold_for_bits,
)
from mobiquant_jax.routing.cutoff import cutoff
from mobiquant_jax.routing.fused import FusedRouter
from mobiquant_jax.routing.gates import depth_masks, gate, mask_bits, mask_depth, prefix_masks
from mobiquant_jax.routing.policies import (
    BatchBudget,
    FixedThreshold,
    NormBudget,
    Policy,
    RandomDepth,
    RoutingInputs,
    TableBudget,
    UniformDepth,
)
from mobiquant_jax.routing.router import Router, score

__all__ = [
    "BatchBudget",
    "FixedThreshold",
    "FusedRouter",
    "NormBudget",
    "Policy",
    "RandomDepth",
    "Router",
    "RoutingInputs",
    "TableBudget",
    "UniformDepth",
    "adjacent_mix",
    "check_grid",
    "cutoff",
    "depth_masks",
    "gate",
    "lookup",
    "mask_bits",
    "mask_depth",
    "prefix_masks",
    "prefix_scores",
    "score",
    "threshold_for_bits",
]
