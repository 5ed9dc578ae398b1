"""The elastic matmul: every token against the same weight, each at its own depth."""
