"""Numerical kernels: one module per family, chosen by table.py."""
