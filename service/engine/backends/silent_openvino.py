"""Imports OpenVINO without its telemetry; no other module may import it.

Importing `openvino` and converting a model each send an event to a public analytics service, and leave an identifier in
the home folder. An image server should do neither. Without the telemetry package, `openvino` uses a stub, so this
module makes the package appear not to be installed.
"""

import sys
from typing import Any, cast

cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)

import openvino  # noqa: E402 - after the line above
from openvino.frontend import FrontEndManager  # noqa: E402
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: E402

__all__ = ["FrontEndManager", "TorchScriptPythonDecoder", "openvino"]
