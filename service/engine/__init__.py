"""The engine, which generates the images. Routes know only its interface, in base.py."""
