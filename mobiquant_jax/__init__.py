"""MoBiQuant in JAX: one LLaMA checkpoint of nested 2-bit slices, read at any average precision.

Layers, from the bottom up: ``quant`` and ``routing`` (pure functions on arrays), ``ops`` (the elastic matmul),
``models`` (the Linen shell), ``calibration``, ``evaluation`` and ``serving``, with ``io`` and ``data`` beside them.
"""
