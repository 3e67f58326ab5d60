"""Evaluation of image quality, with one protocol for every method: see ``protocol.py`` and ``measure.py``."""
