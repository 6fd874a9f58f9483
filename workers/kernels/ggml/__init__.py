"""Kernels that compute with ggml's bits on x86-64 with AVX2, FMA and F16C: `--arithmetic ggml`, and nothing by default.

Each family says in which order and in which precision ggml adds up; tests/workers/test_ggml_bits.py compares the bits.
"""
