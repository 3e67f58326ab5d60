"""The safety checker: a function of somebody else's package that says which pictures must not leave the server.

A package offers one under the entry point group ``fewstep.safety``::

    [project.entry-points."fewstep.safety"]
    my-checker = "my_package:is_flagged"

``is_flagged(image, prompt) -> bool`` gets each picture (PIL, RGB), previews too, on a thread of its own; several calls may
run at once. Its time counts in what a request may take: one that has no answer by then is answered 504, without pictures.
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
        """Whether the picture must not be shown.

        Raises:
            EngineError: the checker failed; a picture that nobody could check is not shown either.
        """
        try:
            return bool(self.function(image, prompt))
        except (Exception, SystemExit) as error:  # noqa: BLE001
            # Its class alone: a foreign error's message may hold the prompt, which is not for the log.
            log.error("the safety checker %r failed with %s", self.name, type(error).__name__)
            message = f"the safety checker {self.name!r} failed, so that the pictures cannot be shown"
            raise EngineError(message) from None


def load_checker(name: str) -> Checker:
    """The checker of that name.

    Raises:
        BadSettings: no installed package offers it, or what it offers cannot be imported or called.
    """
    found = entry_points(group=GROUP)
    if name not in found.names:
        known = ", ".join(sorted(found.names)) or "none"
        raise BadSettings(
            f"FEWSTEP_SAFETY_CHECKER: no installed package offers {name!r} as {GROUP}; there are: {known}"
        )
    try:
        function = found[name].load()
    except Exception as error:  # whatever a foreign package can raise at import
        raise BadSettings(f"FEWSTEP_SAFETY_CHECKER: {name!r} cannot be loaded: {error}") from error
    if not callable(function):
        raise BadSettings(f"FEWSTEP_SAFETY_CHECKER: {found[name].value} is no function of an image and a prompt")
    return Checker(name=name, function=function)
