"""Accuracy under hard bounds: networks, bounds, baselines, tables and plots, one command."""
