"""The tiny reference models, and Hugging Face tensors as a parameter tree without the help of io.hf."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def reference() -> SimpleNamespace:
    """The functions of fixtures/record.py and what it recorded."""
    functions = runpy.run_path(str(FIXTURES / "record.py"))
    with np.load(FIXTURES / "logits.npz") as recorded:
        return SimpleNamespace(**functions, recorded=dict(recorded))


@pytest.fixture(scope="session")
def tree_from_state():
    def tree_from_state(state, layers):
        def stacked(name):
            return np.stack([state[f"model.layers.{i}.{name}.weight"] for i in range(layers)])

        def kernels(group, names):
            return {n: {"kernel": stacked(f"{group}.{n}").swapaxes(1, 2)} for n in names}

        tree = {
            "embedder": {"embedding": state["model.embed_tokens.weight"]},
            "layers": {
                "attention_norm": {"scale": stacked("input_layernorm")},
                "attention": kernels("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
                "mlp_norm": {"scale": stacked("post_attention_layernorm")},
                "mlp": kernels("mlp", ("gate_proj", "up_proj", "down_proj")),
            },
            "final_norm": {"scale": state["model.norm.weight"]},
        }
        if "lm_head.weight" in state:
            tree["lm_head"] = {"kernel": state["lm_head.weight"].T}
        return tree

    return tree_from_state
