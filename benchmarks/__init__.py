"""Experiments of the library: data, reference models and their float training.

Run from the root of the repository, as in `python -m benchmarks.demo`. Not part of the wheel.
"""
