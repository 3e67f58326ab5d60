"""Runs one distillation job in this process.

    python -m distillers JOB
        run the job; its options are below
    python -m distillers check [FILE | -]
        print a spec's errors, or the spec with all defaults filled in, as JSON
    python -m distillers methods [NAME ...]
        print the settings of these methods, with their defaults and meanings; or every method with the schema of its
        settings, as JSON

JOB is a TOML or JSON file, or the name of a recipe in distillers/recipes. Events are written as JSON lines to standard
output and to DIR/events.jsonl; on a terminal, a progress bar replaces the former. After SIGTERM or Ctrl-C the job
writes a checkpoint and exits with status 143; --resume continues from the newest checkpoint. A job with a partition
trains several students, each in DIR/part-K.
"""

import json
import sys
from pathlib import Path
from typing import Any

from weights.commands import parser_of

MODULE = "distillers"


def main(arguments: list[str]) -> int:
    """Runs a command and returns its exit status."""
    if arguments[:1] == ["check"]:
        return check(arguments[1:])
    if arguments[:1] == ["methods"]:
        return show_methods(arguments[1:])
    return run(arguments)


def check(arguments: list[str]) -> int:
    """Prints ``{"ok": true, "job": {...}}``, or ``{"ok": false, "errors": [...]}`` with status 1.

    For a JSON list on standard input, it prints ``{"ok": true, "jobs": [...]}``, or the errors of the first spec that
    has any, with its ``index``.
    """
    from distillers.spec import BadSpec, check_spec, read_spec

    parser = parser_of(MODULE, "Checks a job without running it.", "check")
    parser.add_argument("spec", nargs="?", default="-", help="file, recipe, or - for JSON on standard input")
    spec = parser.parse_args(arguments).spec
    jobs: list[Any] = []
    try:
        raw = _stdin_json() if spec == "-" else read_spec(spec)
        several = isinstance(raw, list)
        for each in raw if several else [raw]:
            jobs.append(check_spec(each)[0].model_dump(mode="json"))
    except BadSpec as error:
        print(json.dumps({"ok": False, "index": len(jobs), "errors": error.errors}))
        return 1
    print(json.dumps({"ok": True, "jobs": jobs} if several else {"ok": True, "job": jobs[0]}))
    return 0


def show_methods(arguments: list[str]) -> int:
    """Prints the settings of the methods as text, or of every method as JSON."""
    from distillers.methods import UnknownMethod, method
    from distillers.spec import describe_methods

    parser = parser_of(MODULE, "Prints the settings of methods, with their defaults and meanings.", "methods")
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods; every one's, as JSON, if left out")
    names = parser.parse_args(arguments).names
    if not names:
        print(json.dumps(describe_methods()))
        return 0
    try:
        configs = [method(name).Config for name in names]
    except UnknownMethod as error:
        print(error, file=sys.stderr)
        return 2
    for config in configs:
        defaults = config().model_dump(mode="json")
        for name, field in config.model_fields.items():
            print(f"{name} = {json.dumps(defaults[name])}\n    {field.description}")
    return 0


def _stdin_json() -> Any:
    from distillers.spec import BadSpec

    try:
        return json.load(sys.stdin)
    except ValueError as error:
        raise BadSpec([{"param": "job", "message": f"standard input is not JSON: {error}"}]) from error


def run(arguments: list[str]) -> int:
    """Runs a job."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("job", help="TOML or JSON file, or a recipe's name")
    parser.add_argument("--folder", type=Path, help="the job's folder (runs/STUDENT if left out)")
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("~/.local/share/fewstep/students"),
        help="the model store's folder (with `fewstep`, FEWSTEP_STORE's; otherwise %(default)s)",
    )
    parser.add_argument("--cache", type=Path, help="folder for encoded data, shared between jobs")
    parser.add_argument("--shared", type=Path, help="folder for what a partition's parts share (--folder if left out)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument("--replace", action="store_true", help="replace a published student of that name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a field of the job, such as train.iterations=10; repeat it for more",
    )
    options = parser.parse_args(arguments)

    from distillers.spec import BadSpec, read_spec

    try:
        raw = read_spec(options.job, options.set)
        from distillers.spec import check_spec

        checked, _ = check_spec(raw)  # before anything slow is imported
    except BadSpec as error:
        print(f"{options.job} cannot be run:", file=sys.stderr)
        for each in error.errors:
            print(f"  {each['param']}: {each['message']}", file=sys.stderr)
        return 2

    from distillers.job import JobRun
    from distillers.multi import MultiRun
    from weights.bundled import STUDENTS
    from weights.store import Store

    folder = options.folder or Path("runs") / raw["student"]
    try:
        folder.mkdir(parents=True, exist_ok=True)  # here, since the job reports its errors into this folder
    except OSError as error:
        print(f"the job's folder {folder} cannot be made ({error}): give another with --folder", file=sys.stderr)
        return 2
    store = Store(options.store.expanduser(), STUDENTS)
    kind = MultiRun if checked.parts else JobRun
    job = kind(raw, folder, store, cache=options.cache, replace=options.replace, shared=options.shared)
    return job.run(options.resume)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
