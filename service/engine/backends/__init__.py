"""Backends: what runs a model's parts. The engine knows only the interface, in base.py."""
