"""OpenVINO without its telemetry; the only place that imports it.

Importing `openvino` sends an event to its makers, by way of a public analytics service, and leaves an identifier in the home
folder; so do conversions. A server that draws pictures tells nobody. Where the telemetry's package is not installed,
`openvino` takes a stub of its own: so it is made to look as if it were not.
"""

import sys
from typing import Any, cast

cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)

import openvino  # noqa: E402 - after the line above
from openvino.frontend import FrontEndManager  # noqa: E402
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: E402

__all__ = ["FrontEndManager", "TorchScriptPythonDecoder", "openvino"]
