"""The engine: what draws. Routes know only its interface, in base.py."""
