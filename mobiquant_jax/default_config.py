"""The defaults of every field a config file can set; the files of ``configs/`` override what differs."""

import dataclasses

from ml_collections import ConfigDict

from mobiquant_jax.calibration import CalibrationConfig


def default_config() -> ConfigDict:
    """Builds the config that a file of ``configs/`` starts from.

    Returns:
      A ``ConfigDict`` with the sections model, quant, router, calibration, data, evaluation and mesh, and ``run_dir``.
      The fields ``model.source``, ``model.architecture``, ``data.source`` and ``run_dir`` are for the file to fill.
    """
    return ConfigDict(
        dict(
            model=dict(
                source="",  # a Hugging Face folder, a .gguf file, or "package:NAME"
                architecture=dict(),  # the fields of models.LlamaConfig
                dither=False,  # move 4-bit weights off their grid, so that 4-bit results are not flattered
                weights="source",  # "source", or "random" to try the pipeline without a model
            ),
            quant=dict(
                group_size=128,  # inputs that share a scale and zero point; divides every linear's inputs
                slice_bits=(2, 2, 2, 2),  # bits of the nested slices, coarsest first
            ),
            router=dict(
                hidden_size=32,  # width of the two-layer MLP
                budget_grid=(2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0),  # bits with a recorded threshold
            ),
            calibration=dataclasses.asdict(CalibrationConfig()),  # its docstring explains the fields
            data=dict(
                source="c4",  # "pydoc", "file:PATH", "file:CALIBRATION,HELDOUT", "wikitext2" or "c4"
            ),
            evaluation=dict(
                bits=(2.0, 2.5, 3.0, 4.0, 6.0, 8.0),  # average bits of the perplexity curve
                windows=64,
                window_length=2048,  # tokens
                batch_size=1,
            ),
            mesh=dict(
                data=1,  # devices that split the windows
                fsdp=1,  # that split windows and parameters
                model=1,  # that split heads and feed-forward channels; the three multiply to the devices used
            ),
            run_dir="",  # checkpoint, curve and pictures go here
        )
    )
