"""Request and response bodies for images and models: OpenAI's shapes, with extensions for few-step models."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

MAX_PICTURES = 10
MAX_NAME = 512
"""Most characters in the name of a model."""
MAX_SEED = 2**53 - 1
"""The largest integer that every JSON parser represents exactly."""
SIZE = re.compile(r"[1-9]\d{0,3}x[1-9]\d{0,3}")

OutputFormat = Literal["png", "jpeg", "webp"]


def _check_seed(value: Any) -> Any:
    seeds = value if isinstance(value, list) else [value]
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise ValueError(
                f"{str(seed)[:40]!r} is not a valid seed: give an integer from 0 to {MAX_SEED}, or a list with one per image"
            )
    return value


def _diversity_kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "switch"
    return "options" if isinstance(value, dict | DiversityOptions) else None


class Body(BaseModel):
    """Base class of request bodies: unknown fields and values of other types are refused; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, value: Any) -> Any:
        return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


class DiversityOptions(Body):
    """Overrides the student's calibration of the base's first step."""

    base_steps: int | None = Field(
        None, ge=1, le=8, description="steps that the base takes before the student takes over"
    )
    base_guidance: float | None = Field(
        None, ge=0, le=50, description="guidance scale of those steps; 1.0 turns it off"
    )
    start: float | None = Field(
        None,
        ge=1e-3,
        le=1,
        description="time t that the base is told for pure noise; lower is closer to the finished image",
    )
    skip: int | None = Field(
        None,
        ge=0,
        le=64,
        description="index, from 0, of the student's step that takes over; at its own time, without until",
    )
    until: float | None = Field(
        None, ge=1e-3, lt=1, description="time t at which the student takes over; its steps are scaled to begin there"
    )
    unprompted: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="how far, in t from start down, the first of them goes without the prompt; 0 turns this off",
    )


class LoraOption(Body):
    """A LoRA student to merge into the model."""

    name: str = Field(min_length=1, max_length=MAX_NAME, description="a LoRA student of the model's base")
    scale: float = Field(1.0, ge=-4, le=4, allow_inf_nan=False, description="strength; 1.0 is as trained")


class ImageRequest(Body):
    """Body of ``POST /v1/images/generations``."""

    prompt: str = Field(min_length=1, description="what to draw")
    model: str | None = Field(None, min_length=1, max_length=MAX_NAME, description="a name from /v1/models")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="number of images")
    size: str = Field("auto", description="'auto', or a WIDTHxHEIGHT that the model supports, such as '64x64'")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="images in the response itself, or as links"
    )
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of a jpeg or webp; 100 by default, and for a png"
    )
    user: str | None = Field(None, max_length=512, description="accepted but ignored")
    safety_identifier: str | None = Field(None, max_length=512, description="accepted but ignored")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] = Field(
        "auto", description="accepted but ignored: quality depends on `steps`"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="accepted but ignored")
    background: Literal["auto", "opaque", "transparent"] = Field("auto", description="'transparent' is refused")
    moderation: Literal["auto", "low"] = Field("auto", description="accepted but ignored")
    stream: bool = Field(False, description="respond with server-sent events, one for each image as soon as it is done")
    partial_images: int = Field(
        0, ge=0, le=3, description="with stream: how many intermediate steps of each image to send, decoded, before it"
    )

    seed: Annotated[int | list[int] | None, BeforeValidator(_check_seed)] = Field(
        None,
        description="a list has one seed per image; a number is the first image's, and the others count up from it; "
        "random if left out",
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=100,
        description="1 to the model's max_steps (4 for the bundled students); its default if left out",
    )
    diversity: Annotated[
        Annotated[bool, Tag("switch")] | Annotated[DiversityOptions, Tag("options")],
        Discriminator(
            _diversity_kind,
            custom_error_type="diversity",
            custom_error_message="Input should be true, false, or an object with "
            "base_steps, base_guidance, start, skip, until and unprompted",
        ),
    ] = Field(
        False, description="let the base model do the first step: as the student was calibrated, or as given here"
    )
    guidance_scale: float | None = Field(None, ge=0, le=50, allow_inf_nan=False, description="1.0 turns guidance off")
    loras: list[LoraOption] = Field(
        [], max_length=4, description="LoRA students of the model's base to merge into a copy of it"
    )
    negative_prompt: str = Field("", description="what to avoid; has an effect only with guidance")
    deterministic: bool = Field(
        False, description="generate each image on its own, so that a seed gives the same bits in every request"
    )

    @field_validator("negative_prompt")  # pydantic checks this by itself for fields with a length limit
    @classmethod
    def _is_text(cls, text: str) -> str:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                "it contains half of a surrogate pair, which is not a character: send both halves, or neither"
            )
        return text

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("it is blank: say what to draw")
        return prompt

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, size: str) -> str:
        if size != "auto" and not SIZE.fullmatch(size):
            raise ValueError(f"{size[:40]!r} is not a valid size: give 'auto' or WIDTHxHEIGHT, such as '64x64'")
        return size

    @field_validator("background")
    @classmethod
    def _is_opaque(cls, background: str) -> str:
        if background == "transparent":
            raise ValueError("'transparent' is not supported: these models fill every pixel; use 'opaque' or 'auto'")
        return background

    @field_validator("loras")
    @classmethod
    def _are_different(cls, loras: list[LoraOption]) -> list[LoraOption]:
        names = [lora.name for lora in loras]
        if len(set(names)) < len(names):
            raise ValueError(f"{names} names a LoRA twice: list each once, with the scale that you want")
        return loras

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if isinstance(self.seed, list) and len(self.seed) != self.n:
            raise ValueError(f"seed: {len(self.seed)} seed(s) for n = {self.n} image(s); give {self.n}")
        # OpenAI's API takes 100, its default, with a png as well, and clients send it always.
        if self.output_compression not in (None, 100) and self.output_format == "png":
            raise ValueError(
                f"output_compression: {self.output_compression} is not supported for a png, which loses nothing; use 100, "
                "leave it out, or use jpeg or webp"
            )
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: only a stream can send partial images; set stream to true")
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: a stream contains the images themselves; leave it out, or use b64_json")
        return self


class Picture(BaseModel):
    """One image of a response: base64 content, or a URL."""

    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="generates this image again if everything else is the same")
    flagged: Literal[True] | None = Field(
        None, description="true if the safety checker flagged the image, which is then black"
    )


class DiversityUsed(BaseModel):
    """The steps that the base made before the student took over."""

    base_steps: int
    base_guidance: float
    skip: int = Field(description="index, from 0, of the student's step that took over")
    start: float | None = Field(
        description="time t that the base was told for pure noise; null in a calibration: the student's own first time"
    )
    until: float | None = Field(
        None, description="time t at which the student took over; null: the own time of its step skip"
    )
    unprompted: float = Field(
        description="how far, in t from start down, the base's first step went without the prompt"
    )


class DrawingInfo(BaseModel):
    """How the images were generated, and what that cost."""

    steps: int
    guidance_scale: float
    diversity: DiversityUsed | None = None
    network_evaluations: int = Field(description="per image, including the base's steps; a guided step counts twice")
    seconds: float = Field(description="generation time of the whole request, without its wait in the queue")
    loras: list[LoraOption] | None = Field(
        None, description="LoRA students that were merged into the model; left out if there were none"
    )
    student: str | None = Field(
        None, description="which of a router's students generated the image; left out if the model is not a router"
    )


class ImageResponse(BaseModel):
    """Response to an `ImageRequest`."""

    created: int = Field(description="seconds since the epoch")
    data: list[Picture]
    model: str
    size: str
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    drawing: DrawingInfo


class StreamedImage(BaseModel):
    """Fields that the events of a stream have in common."""

    b64_json: str
    created_at: int = Field(description="seconds since the epoch")
    size: str
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    seed: int = Field(description="generates this image again if everything else is the same")
    picture_index: int = Field(description="index, from 0, of the image in the request")


class PartialImage(StreamedImage):
    """An intermediate state of an image: what the model predicts after one of its steps."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int = Field(description="index, from 0, of the partial image among those of its image")
    step: int = Field(description="number of the step, from 1")
    steps: int = Field(description="number of steps of the image, including the base's")


class InputTokens(BaseModel):
    """Part of `Usage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Required by OpenAI's clients; nothing is counted in tokens here. See `CompletedImage.drawing` for the cost."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class CompletedImage(StreamedImage):
    """A finished image."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage = Usage()
    flagged: Literal[True] | None = Field(
        None, description="true if the safety checker flagged the image, which is then black"
    )
    model: str
    drawing: DrawingInfo


class Model(BaseModel):
    """A model as OpenAI's API lists it, and what requests it supports."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fewstep"
    kind: Literal["student", "base"]
    family: str
    base: str | None = Field(description="the model that a student was distilled from; null for a base")
    method: str | None = Field(description="the method that made a student; null for a base")
    steps: list[int] = Field(description="step counts that a student was trained for; empty for a base")
    max_steps: int = Field(description="requests may have any number of steps from 1 to this")
    default_steps: int
    default_guidance: float
    size: str | None = Field(description="WIDTHxHEIGHT; null until the student's base is loaded")
    diversity: DiversityUsed | None = Field(description="the student's calibration of the base's first step")
    students: list[str] = Field(
        description="the students that a router picks from by the prompt; empty for other models"
    )
    alias_of: str | None = Field(None, description="the model that this is an alias of; null if it is not an alias")
    licence: str
    metrics: dict[str, Any]


class ModelList(BaseModel):
    """Response of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class DeletedModel(BaseModel):
    """Response of ``DELETE /v1/models/{model}``."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ErrorDetail(BaseModel):
    """Part of `ErrorBody`."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


class Health(BaseModel):
    """Response of a health check."""

    status: Literal["ok", "live", "ready"]
