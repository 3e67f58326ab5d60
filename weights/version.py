"""The version of Fewstep."""

from importlib.metadata import PackageNotFoundError, version


def code_version() -> str:
    """The installed package's version, or 'source' if the code runs without being installed."""
    try:
        return version("fewstep")
    except PackageNotFoundError:
        return "source"
