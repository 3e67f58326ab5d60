"""The safety checker: a function from another package that decides which images must not leave the server.

A package provides one in the entry point group ``fewstep.safety``::

    [project.entry-points."fewstep.safety"]
    my-checker = "my_package:is_flagged"

``is_flagged(image, prompt) -> bool`` receives each image (PIL, RGB), including previews, on a thread of its own;
several calls may run at once. Its time counts towards the request's: if it has no answer by the deadline, the request
is answered 504 without images.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

from PIL.Image import Image

from service.engine.base import EngineError
from service.settings import BadSettings

log = logging.getLogger(__name__)
GROUP = "fewstep.safety"


@dataclass(frozen=True, kw_only=True)
class Checker:
    """A safety checker and its name."""

    name: str
    function: Callable[[Image, str], bool]

    def flags(self, image: Image, prompt: str) -> bool:
        """Whether the image must not be shown.

        Raises:
            EngineError: the checker failed; an image that was not checked must not be shown either.
        """
        try:
            return bool(self.function(image, prompt))
        except (Exception, SystemExit) as error:  # noqa: BLE001
            # Only its class, since the message may contain the prompt, which must not be logged.
            log.error("the safety checker %r failed with %s", self.name, type(error).__name__)
            message = f"the safety checker {self.name!r} failed, so the images cannot be returned"
            raise EngineError(message) from None


def load_checker(name: str) -> Checker:
    """Load the checker of that name.

    Raises:
        BadSettings: no installed package provides it, or it cannot be imported or called.
    """
    found = entry_points(group=GROUP)
    if name not in found.names:
        known = ", ".join(sorted(found.names)) or "none"
        raise BadSettings(
            f"FEWSTEP_SAFETY_CHECKER: no installed package offers {name!r} as {GROUP}; available: {known}"
        )
    try:
        function = found[name].load()
    except Exception as error:  # foreign packages can raise anything on import
        raise BadSettings(f"FEWSTEP_SAFETY_CHECKER: {name!r} cannot be loaded: {error}") from error
    if not callable(function):
        raise BadSettings(f"FEWSTEP_SAFETY_CHECKER: {found[name].value} is not a function of an image and a prompt")
    return Checker(name=name, function=function)
