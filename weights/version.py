"""Which Fewstep this is."""

from importlib.metadata import PackageNotFoundError, version


def code_version() -> str:
    """The installed package's version, or 'source' where the tree is run without being installed."""
    try:
        return version("fewstep")
    except PackageNotFoundError:
        return "source"
