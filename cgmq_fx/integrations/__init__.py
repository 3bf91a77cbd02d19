"""Adapters to other people's trainers. Each module imports the library that it is named after.

All of them are thin: they call `Prepared.step()` after every step of the optimizer.
"""
