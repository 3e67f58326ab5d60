"""How good a model's pictures are, measured the same way for every method: see ``protocol.py`` and ``measure.py``."""
