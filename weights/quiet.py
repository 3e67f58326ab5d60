"""Silences diffusers and transformers while models are loaded and saved."""

import threading
from contextlib import ContextDecorator

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

_LIBRARIES = (diffusers_logging, transformers_logging)


class _Quiet(ContextDecorator):
    """Turns off the libraries' progress bars, and their warnings about components unusual for Stable Diffusion.

    These settings are process-wide: the first of several concurrent threads turns them off, and the last restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[int, bool]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in _LIBRARIES]
            for library in _LIBRARIES:
                library.set_verbosity_error()
                library.disable_progress_bar()

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            for library, (verbosity, bar) in zip(_LIBRARIES, self._before, strict=True):
                library.set_verbosity(verbosity)
                if bar:
                    library.enable_progress_bar()


quiet = _Quiet()
