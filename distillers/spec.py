"""Job specs: read from TOML or JSON, completed with the method's defaults, or rejected with a list of all errors.

Nothing here loads a network, or imports the libraries that would, unless a job names its family.
"""

import hashlib
import json
import pkgutil
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

import weights.families
from distillers.methods import UnknownMethod, method, methods
from distillers.methods.base import Method, MethodConfig
from weights.bundled import bundled_bases, pipeline_class_name
from weights.contracts import DistillJob, check_name
from weights.families import AUTO, families
from weights.fields import no_such_field

RECIPES = Path(__file__).resolve().parent / "recipes"
FREE = {
    "iterations", "max_minutes", "threads", "gradient_checkpointing", "log_every", "checkpoint_every", "sample_every",
    "keep_checkpoints",
}  # fmt: skip
"""Trainer settings that may differ when a job is resumed: they change how far it runs, not its course (except for a
cooldown, which shifts with the iterations)."""

LIBERTIES: Any = {"student": True, "licence": True, "train": FREE, "partition": {"order"}}
"""All that may differ when a job is resumed, as pydantic's ``exclude``."""

PATHS = ("/", ".", "~")
"""How a base that is a path begins; a relative one without a dot may be a hub id."""


class BadSpec(ValueError):
    """A job spec that cannot be run.

    Attributes:
        errors: one ``{"param": dotted name, "message": what is wrong and what is allowed}`` per error.
    """

    def __init__(self, errors: list[dict[str, str]]) -> None:
        super().__init__("; ".join(f"{error['param']}: {error['message']}" for error in errors))
        self.errors = errors


def recipes() -> dict[str, Path]:
    """The recipes that ship with the code, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def read_spec(source: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Reads the raw spec from a TOML or JSON file, or from the recipe of that name.

    Args:
        source: a path, or a recipe's name.
        overrides: such as ``train.iterations=10``, with values as in TOML (a bare word is a string).

    Raises:
        BadSpec: there is no such file, it cannot be parsed, or an override is malformed.
    """
    path = Path(source)
    if not path.is_file():
        if source not in recipes():
            raise BadSpec(
                [_error("job", f"{source!r} is neither a file nor a recipe; available: {', '.join(recipes())}")]
            )
        path = recipes()[source]
    try:
        text = path.read_text()
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise BadSpec([_error("job", f"{path} cannot be read as {path.suffix or 'TOML'}: {error}")]) from error
    if not isinstance(raw, dict):
        raise BadSpec([_error("job", f"{path} is not a job: give an object with its fields")])
    for override in overrides or []:
        _override(raw, override)
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise BadSpec([_error("--set", f"{override!r} must look like train.iterations=10")])
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.startswith(("{", "[")):  # a table or an array, of which a string would be called the wrong type
            message = (
                f"{override!r} is not TOML ({error}): write it in one line, such as betas=[0.9, 0.99] or a={{ b = 1 }}"
            )
            raise BadSpec([_error("--set", message)]) from error
        value = text
    *parents, last = name.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise BadSpec([_error("--set", f"{override!r}: {parent} has no fields")])
    raw[last] = value


def family_names() -> list[str]:
    """Names of the families, from their file names, without importing them (and with them diffusers)."""
    return sorted(info.name for info in pkgutil.iter_modules(weights.families.__path__) if info.name != "base")


def check_spec(raw: Any) -> tuple[DistillJob, MethodConfig]:
    """Validates a spec; returns the job with its method's defaults filled in, and the method's config.

    Raises:
        BadSpec: with a list of all errors.
    """
    try:
        job = DistillJob.model_validate(raw)
    except ValidationError as error:
        raise BadSpec(_errors(error, DistillJob)) from error
    errors = []
    known = [AUTO, *family_names()]
    if job.family not in known:
        errors.append(_error("family", f"unknown family {job.family!r}: use one of {', '.join(known)}"))
    try:
        chosen = method(job.method)
        config = chosen.Config.model_validate(job.config)
    except UnknownMethod as error:
        raise BadSpec([*errors, _error("method", str(error))]) from error
    except ValidationError as error:
        raise BadSpec([*errors, *_errors(error, chosen.Config, "config")]) from error
    errors += [*_against_the_method(job, chosen, config), *_against_capture(job, chosen, config)]
    errors += [
        *_against_the_base(job),
        *_against_the_data(job, chosen.needs_pictures(config)),
        *_against_each_other(job),
        *_against_the_names(job),
    ]
    if errors:
        raise BadSpec(errors)
    return job.model_copy(update={"config": config.model_dump(mode="json")}), config


def _against_the_method(job: DistillJob, chosen: type[Method], config: MethodConfig) -> list[dict[str, str]]:
    """Errors for what the method needs and the job lacks."""
    errors = []
    reason = chosen.needs_whole_network(config)
    if reason and job.lora is not None:
        errors.append(_error("lora", f"{reason}; leave lora out"))
    if job.train.iterations < config.least_iterations:
        errors.append(
            _error(
                "train.iterations",
                f"{job.train.iterations} iterations end before the last phase of {job.method} begins: use at least "
                f"{config.least_iterations}, or shorten its phases in config",
            )
        )
    return errors


def _against_capture(job: DistillJob, chosen: type[Method], config: MethodConfig) -> list[dict[str, str]]:
    """Errors for settings that prevent iterations from being captured."""
    train = job.train
    if not train.capture:
        return []
    errors = []
    reason = chosen.needs_eager(config)
    if reason is not None:
        able = [name for name, each in methods().items() if each.needs_eager(each.Config()) is None]
        errors.append(_error("train.capture", f"{reason}; or turn capture off (methods for it: {', '.join(able)})"))
    if job.guide is not None:
        message = (
            f"autoguidance by {job.guide.student!r} counts rows, which a CUDA graph cannot: leave out guide, or capture"
        )
        errors.append(_error("guide", message))
    if train.gradient_accumulation > 1:
        message = f"{train.gradient_accumulation} must be 1 with capture: use a larger batch_size"
        errors.append(_error("train.gradient_accumulation", message))
    if train.gradient_checkpointing:
        errors.append(
            _error("train.gradient_checkpointing", "a CUDA graph cannot keep random states: leave it out, or capture")
        )
    return errors


def _against_the_base(job: DistillJob) -> list[dict[str, str]]:
    """An error for what is no model here; other names and hub ids are left to `resolve_base` when the job starts."""
    if Path(job.base, "model_index.json").is_file():
        try:
            pipeline_class_name(Path(job.base))
        except ValueError as error:
            return [_error("base", str(error))]
    elif job.base.startswith(PATHS):
        message = (
            f"{job.base!r} is not a folder with a model_index.json on this machine: give the folder of a diffusers pipeline "
            f"(an absolute path, in which '~' is written out), a bundled base ({', '.join(bundled_bases())}) or a hub id"
        )
        return [_error("base", message)]
    return _against_the_family(job)


def _against_the_family(job: DistillJob) -> list[dict[str, str]]:
    """An error for a family that does not load the base, as far as that can be told without a download.

    Families are imported, and diffusers with them, only if the job names one, as that takes seconds.
    """
    if job.family not in family_names():
        return []
    family = families()[job.family]
    here = job.base in bundled_bases() or Path(job.base, "model_index.json").is_file()
    if not here and family.pipeline_name() is not None:  # a hub's, which would be fetched
        return []
    try:
        family.check_source(job.base)
    except (FileNotFoundError, ValueError) as error:
        message = f"{job.family!r} does not load the base {job.base!r} ({error}): use {AUTO!r}, or the family that does"
        return [_error("family", message)]
    return []


def _against_the_data(job: DistillJob, reason: str | None) -> list[dict[str, str]]:
    """Errors in the data; ``reason`` is why the method needs images, if it does."""
    errors = []
    if "source" not in job.data.model_fields_set and job.base not in bundled_bases():
        if reason or job.data.prompts is None:  # the emoji would teach another teacher its captions and images
            message = (
                f"left out, which means the bundled emoji, but the base is {job.base!r}: give a folder with metadata.jsonl "
                "and its images, or write 'emoji' to mean it"
            )
            errors.append(_error("data.source", message))
    elif job.data.source != "emoji" and not Path(job.data.source, "metadata.jsonl").is_file():
        message = f"{job.data.source!r} is neither 'emoji' nor a folder with metadata.jsonl"
        errors.append(_error("data.source", f"{message} ({reason})" if reason else message))
    if job.data.prompts is not None and not job.data.recombines and not Path(job.data.prompts).is_file():
        errors.append(
            _error("data.prompts", f"there is no file {job.data.prompts!r} ('recombined' needs source 'emoji')")
        )
    if job.partition is not None and job.partition.by == "groups" and job.data.prompts is not None:
        errors.append(
            _error("partition.by", "prompts without images have no group: use 'kmeans', or leave out data.prompts")
        )
    return errors


def _against_each_other(job: DistillJob) -> list[dict[str, str]]:
    """Errors for settings that would initialise the student's weights twice."""
    errors = [
        _error("network", f"starts from random weights, all of which are trained: leave out network, or {field}")
        for field in ("start", "lora")
        if job.network is not None and getattr(job, field) is not None
    ]
    if job.start is not None and job.lora is not None:
        errors.append(_error("start", "adapters can only start from the base: leave out lora, or start"))
    return errors


def _against_the_names(job: DistillJob) -> list[dict[str, str]]:
    try:
        for name in job.publishes:
            check_name(name)
    except ValueError as error:
        return [_error("student", f"the partition's parts need names of their own: {error}")]
    if job.student in bundled_bases():
        return [_error("student", f"{job.student!r} is the bundled base: choose another name")]
    return []


def fingerprint(job: DistillJob, *digests: str) -> str:
    """A digest of everything that a resumed run must have in common with its checkpoint (see `distillers.identity`).

    Args:
        job: its settings count, except for those that only affect the duration or the reporting.
        digests: of the weights that teach: the base's and, if there is a guide, the guide's.
    """
    plain = job.model_dump(mode="json", exclude=LIBERTIES)
    for field in ("partition", "network", "guide"):
        if plain[field] is None:  # keeps the fingerprints of checkpoints from before the field existed
            del plain[field]
    if not plain["train"]["capture"]:
        del plain["train"]["capture"]
    return hashlib.sha256(json.dumps([plain, *digests], sort_keys=True).encode()).hexdigest()


def describe_methods() -> list[dict[str, Any]]:
    """Every method with its description and its Config's JSON schema."""
    return [
        {
            "name": name,
            "description": _first_line(__import__(found.__module__, fromlist=["_"]).__doc__ or found.__doc__),
            "config": _schema(found.Config),
        }
        for name, found in methods().items()
    ]


def _schema(config: type[BaseModel]) -> dict[str, Any]:
    return config.model_json_schema()


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if text else ""


def _error(param: str, message: str) -> dict[str, str]:
    return {"param": param, "message": message}


def _errors(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[dict[str, str]]:
    found = []
    for each in error.errors():
        param = ".".join(str(part) for part in ([prefix] if prefix else []) + list(each["loc"]))
        unknown = each["type"] == "extra_forbidden"
        message = no_such_field(model, each["loc"]) if unknown else each["msg"].removeprefix("Value error, ")
        given = each.get("input")
        shown = "" if isinstance(given, dict | list) or each["type"] == "missing" else f" (got {given!r})"
        found.append(_error(param or "job", message + shown))
    return found
