"""The server's settings, from the environment (``FEWSTEP_...``); an invalid one stops the start.

``python -m service.settings`` prints the table of docs/settings.md.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.jobs.base import JobSettings
from service.schemas import MAX_NAME

PREFIX = "FEWSTEP_"
ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")
HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
HOME = Path("~/.local/share/fewstep")
CACHE = Path("~/.cache/fewstep")


class BadSettings(ValueError):
    """The settings cannot be used; the message names each invalid one, its value, and what is allowed."""


class Settings(BaseSettings):
    """All settings of the server. Lists are written as JSON: ``FEWSTEP_BASES='["emoji-base"]'``."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=True)

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 is all interfaces.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")
    log_format: Literal["text", "json"] = Field("text", description="Plain text log lines, or JSON lines.")
    otel: bool = Field(False, description="Create OpenTelemetry spans; needs the extra otel.")
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="Address at which clients reach the server, for image URLs and to recognise its own pages by "
        "their origin; the request's own if unset.",
    )

    keys_file: Path | None = Field(
        None,
        description="File of the API keys (`fewstep keys`); without it, anyone who reaches the server may use it.",
    )
    allow_open: bool = Field(
        False,
        description="Listen beyond loopback without a keys file, because something else, such as a proxy, keeps "
        "others out.",
    )
    allowed_hosts: list[str] = Field(
        [],
        description='Host names, such as `["images.example"]`, that a server without keys answers to besides IP '
        'addresses, localhost and the names in FEWSTEP_PUBLIC_URL and FEWSTEP_HOST; `["*"]` allows all.',
    )
    api_key: SecretStr | None = Field(None, description="API key that the command line sends to a server.")
    requests_per_minute: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Requests per minute for each key without a limit of its own; unlimited if unset.",
    )
    pictures_per_minute: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Images per minute for each key without a limit of its own; unlimited if unset.",
    )
    cors_origins: list[str] = Field(
        [],
        description='Origins whose web pages may use the API from a browser, such as `["https://a.example"]`; '
        '`["*"]` allows all.',
    )
    read_seconds: float = Field(
        30.0,
        gt=0,
        le=3_600,
        description="Seconds that a client may take to send a request's headers, and then its body.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=3_600, description="Seconds to finish admitted image requests after SIGTERM; new ones get 503."
    )
    drain_notice_seconds: float = Field(
        0.0,
        ge=0,
        le=3_600,
        description="Shortest time in seconds from SIGTERM to the end, for a load balancer to see /health/ready fail.",
    )
    safety_checker: str | None = Field(
        None, min_length=1, description="Entry point in the group fewstep.safety that checks every image."
    )
    safety_flagged: Literal["refused", "blanked"] = Field(
        "refused", description="What happens to an image that it flags: the request is refused, or the image is black."
    )

    store: Path = Field(HOME / "students", description="Folder of the published students.")
    bases: list[str] = Field(
        ["emoji-base"],
        min_length=1,
        description="Base models to load at the start: bundled names, folders of diffusers pipelines, or hub ids.",
    )
    family: str = Field(
        "auto", min_length=1, description="Model family of the bases; auto: of each the one that loads its pipeline."
    )
    default_model: str | None = Field(
        None,
        min_length=1,
        description="Model for requests that name none; if unset, the first bundled student whose base is served, "
        "or else the first base.",
    )

    device: str = Field(
        "auto",
        description="Device that generates images: cpu, cuda or cuda:N; auto is cuda if there is such a GPU, and else cpu.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the weights; auto is float16 on a GPU and float32 on the CPU, where OpenVINO then "
        "computes in bfloat16 if the processor can.",
    )
    backend: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="What runs the models; auto is OpenVINO on the CPU, if it is installed, and else torch."
    )
    cache: Path = Field(
        CACHE / "serving",
        description="Folder for the models that OpenVINO has converted; without it the next start takes longer.",
    )
    cache_bytes: int = Field(
        16 * 2**30,
        ge=0,
        description="Disk space for converted models; the least recently used go first. Each LoRA at each scale is one.",
    )
    attention: Literal["auto", "sdpa", "xformers"] = Field(
        "auto",
        description="Attention on a GPU: torch's (sdpa) or xformers'; auto is xformers' if that is installed.",
    )
    compile: bool = Field(
        False,
        description="Compile the models with torch.compile, for NVIDIA GPUs: minutes of warm-up, then faster calls.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads for generating images; all cores if unset."
    )
    max_batch: int = Field(
        8,
        ge=1,
        le=256,
        description="Most rows in one call of a model; an image takes one row, or two under guidance.",
    )
    deterministic: bool = Field(
        False, description="Generate every image as if its request asked for `deterministic`: same seed, same bits."
    )
    prompt_cache_bytes: int = Field(
        64 * 2**20, ge=0, description="Memory for encoded prompts; the least recently used go first."
    )
    memory_bytes: int | None = Field(
        None,
        ge=2**20,
        description="Memory for models, with shared parts counted once; the least recently used goes first. If "
        "unset, 80% of the GPU's memory, or half of the machine's (or its container's).",
    )
    pinned: list[str] = Field(
        [],
        description="Students to load at the start and keep in memory, like the bases and the default model.",
    )
    aliases: dict[str, str] = Field(
        {},
        description='Other names for models, such as `{"gpt-image-1": "my-student"}` for clients that insist on a '
        "name.",
    )
    # Proxies and impatient clients commonly wait for a minute: images beyond it would be generated for nobody.
    queue_seconds: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="Predicted seconds of work that may be in the queue; a request beyond that gets 429.",
    )
    # New requests join between calls. An image takes about six of them (prompt, four steps, decoder), so with this
    # limit the first one's wait and generation take less than two seconds on any machine. Most batches gain nothing
    # from a higher limit.
    tick_seconds: float = Field(
        0.25,
        gt=0,
        le=60,
        description="Seconds that one call of a model may take; the batch size that is fastest per row within them "
        "is used.",
    )
    request_timeout: float = Field(
        300.0, gt=0, le=86_400, description="Seconds that a request may take, including its wait."
    )

    jobs: bool = Field(True, description="Serve /v1/distillation/jobs.")
    jobs_dir: Path = Field(HOME / "jobs", description="Folder of the distillation jobs: database, logs, checkpoints.")
    database_url: str | None = Field(
        None, min_length=1, description="SQL database of the job table; a SQLite file in the jobs folder if unset."
    )
    job_work: bool = Field(
        True, description="Run queued jobs in this server; turn it off if separate workers run them."
    )
    job_devices: list[str] = Field(
        ["auto"], min_length=1, description="Devices that run jobs, one job each; auto is every GPU, or the CPU."
    )
    job_lease_seconds: float = Field(
        30.0,
        ge=3,
        le=3_600,
        description="Seconds without a sign of a job's worker after which the job is given to another.",
    )
    job_grace_seconds: float = Field(
        60.0, gt=0, le=3_600, description="Seconds for a cancelled job to save its checkpoint before it is killed."
    )
    job_keep_days: float | None = Field(
        None,
        ge=0,
        le=36_500,
        description="Days after which an ended job's checkpoints, caches and samples are deleted, so that resuming it "
        "starts it over; its spec, events and error output stay. All is kept if unset.",
    )

    heartbeat_seconds: float = Field(
        10.0,
        gt=0,
        le=3_600,
        description="Seconds of silence after which a stream sends a comment, so that no proxy closes it; its "
        "headers are sent with the first event, or then.",
    )
    max_body_bytes: int = Field(65_536, ge=1_024, le=2**30, description="Largest request body; a larger one gets 413.")
    max_prompt_chars: int = Field(
        1_000, ge=1, le=32_000, description="Longest prompt or negative prompt, in characters."
    )
    picture_bytes: int = Field(
        256 * 2**20, ge=2**20, description="Memory for images that are handed out as URLs; the oldest go first."
    )
    picture_seconds: float = Field(3_600.0, gt=0, description="Seconds for which an image's URL works.")
    picture_metadata: bool = Field(True, description="Write prompt, seed, steps and model into PNG files.")

    @property
    def jobs_file(self) -> Path:
        """The job table, if no database is set."""
        return self.jobs_dir / "jobs.sqlite3"

    def job_settings(self) -> JobSettings:
        """The job service's part of these settings."""
        return JobSettings(
            url=self.database_url or f"sqlite:///{self.jobs_file}",
            folder=self.jobs_dir,
            store=self.store,
            work=self.job_work,
            devices=tuple(self.job_devices),
            reserved=frozenset([*self.bases, *self.aliases]),
            lease_seconds=self.job_lease_seconds,
            grace_seconds=self.job_grace_seconds,
            keep_days=self.job_keep_days,
        )

    @field_validator("store", "jobs_dir", "keys_file", "cache")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin: write '*', or scheme and host, such as https://a.example"
                )
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _are_host_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if name != "*" and not HOST_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a host name: write '*', or a name without scheme or port, such as a.example"
                )
        return names

    @field_validator("store", "jobs_dir", "cache")
    @classmethod
    def _is_no_file(cls, path: Path) -> Path:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a folder (it is created if it does not exist)")
        return path

    @field_validator("aliases")
    @classmethod
    def _names_can_be_sent(cls, aliases: dict[str, str]) -> dict[str, str]:
        for alias in aliases:
            if not 1 <= len(alias) <= MAX_NAME:
                raise ValueError(f"{alias[:40]!r}... has {len(alias)} characters: give 1 to {MAX_NAME}")
        return aliases

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if device == "mps":
            raise ValueError(
                "an Apple GPU cannot compute in float64, as the conversions between noise and image do: use cpu or auto"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"{device!r} is no device: use auto, cpu, cuda or cuda:N")
        return device

    @model_validator(mode="after")
    def _cpu_draws_in_float(self) -> Self:
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError("dtype float16 needs a GPU; use float32 or bfloat16 on the CPU")
        return self


def read_settings(**overrides: Any) -> Settings:
    """Read the settings from the environment; an override that is not None takes precedence.

    Raises:
        BadSettings: a value is not allowed, or a ``FEWSTEP_`` variable is not a setting.
    """
    _refuse_unknown_variables()
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise BadSettings("\n".join(_describe(problem) for problem in error.errors())) from None
    except ValueError as error:  # from pydantic-settings, for a list that is not JSON
        raise BadSettings(_not_json(error)) from None


def _refuse_unknown_variables() -> None:
    known = [name.upper() for name in Settings.model_fields]
    for variable in map(str.upper, os.environ):
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {PREFIX}{close[0]}?" if close else "see docs/settings.md"
            raise BadSettings(f"{variable} is not a setting: {hint}")


def _not_json(error: ValueError) -> str:
    """The variable that pydantic-settings names only as a field, and its value."""
    field = re.search(r'for field "(\w+)"', str(error))
    variable = PREFIX + field[1].upper() if field else ""
    example = '{"gpt-image-1": "my-student"}' if variable == f"{PREFIX}ALIASES" else '["emoji-base"]'
    given = next((value for name, value in os.environ.items() if name.upper() == variable), "")
    return f"{variable or error}: write lists and objects as JSON, such as {example}, got {given!r}"


def _describe(problem: Any) -> str:
    name = PREFIX + str(problem["loc"][0]).upper() if problem["loc"] else "settings"
    given = f", got {problem['input']!r}" if problem["loc"] else ""
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{given}"


def markdown() -> str:
    """The table of all settings for the documentation."""
    lines = ["| variable | default | what it does |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if default is None:
            shown = "unset"
        elif isinstance(default, list | dict):
            shown = "`" + str(default).replace("'", '"') + "`"
        else:
            shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        lines.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
