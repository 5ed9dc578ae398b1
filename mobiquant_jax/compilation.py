"""How XLA compiles what the scripts train and score."""

import os

_FLAG = "xla_gpu_enable_triton_gemm"


def prefer_library_matmuls() -> None:
    """Has a GPU's matmuls come from its libraries, unless ``XLA_FLAGS`` says otherwise. Other devices ignore it.

    By default XLA also generates kernels of its own for each shape and times them while it compiles. On an H100 a block
    of LLaMA-3-8B's shapes, the first of its run, took 46 s to compile and train with them and 31 s without, the next
    one 24 s and 23 s (``results/blocks.json``); on an H200 the first scoring of SmolLM2-135M took 42 to 44 s and 2.4 s
    (``results/candidates.json``). Call it before JAX touches a device: XLA reads its flags once.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=false".strip()
