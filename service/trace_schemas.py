"""Request and response bodies for traces: images shown step by step."""

from typing import Literal

from pydantic import BaseModel, Field

from service.schemas import DrawingInfo, ImageRequest, OutputFormat

MAX_TRACES = 4
"""Most images of one trace, each of which may have as many files in the response as the base has steps."""


class TraceRequest(ImageRequest):
    """Body of ``POST /v1/images/trace``: a request for images to be shown step by step."""

    n: int = Field(1, ge=1, le=MAX_TRACES, description="number of images")
    stream: Literal[False] = Field(False, description="a trace cannot be streamed")
    strip: bool = Field(
        False, description="also return one labelled PNG, with a row for each image and a column for each step"
    )


class TracedStep(BaseModel):
    """What the model predicts at one step: its x_0, decoded."""

    step: int = Field(description="number of the step, from 1")
    leg: Literal["base", "student"] = Field(description="whose network made the prediction")
    t: float = Field(description="the time that the network was conditioned on, from 1 (noise) down")
    guidance_scale: float = Field(description="guidance scale of this step; 1.0 means no guidance")
    b64_json: str | None = None
    url: str | None = None


class Trace(BaseModel):
    """The steps of one image; the last step's prediction is the image."""

    seed: int
    flagged: Literal[True] | None = Field(
        None, description="true if the safety checker flagged the image, which is then black"
    )
    steps: list[TracedStep]


class Strip(BaseModel):
    """The labelled PNG of a trace."""

    b64_json: str | None = None
    url: str | None = None


class TraceResponse(BaseModel):
    """Response to a `TraceRequest`."""

    created: int = Field(description="seconds since the epoch")
    data: list[Trace]
    strip: Strip | None = None
    model: str
    size: str
    output_format: OutputFormat
    drawing: DrawingInfo
