"""The job table: the only source of truth about jobs (SQLAlchemy Core; SQLite by default, PostgreSQL by URL).

Every change of a job's state is ONE statement whose WHERE clause names the state it starts from, so that two
supervisors, or a supervisor and a request, cannot both win. Two partial unique indexes enforce the rules that span
rows: one running job per device, and one job that has not ended per student name. The clocks of several machines must
agree to well within a lease.
"""

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError, IntegrityError

from service.jobs.base import (
    ENDED,
    Job,
    JobConflict,
    JobError,
    JobNotFound,
    JobsUnavailable,
    Progress,
    Status,
    students_read,
)
from weights.contracts import DistillJob

WRITABLE = "let this process's user write the file and its folder, or name another folder (FEWSTEP_JOBS_DIR)"
OTHER_VERSION = "use that version, or name another jobs folder or database (FEWSTEP_JOBS_DIR, FEWSTEP_DATABASE_URL)"
DAMAGED = (
    "the file is damaged: restore it from a backup, or move it and its -wal and -shm files away and restart, which "
    "forgets the jobs but keeps their folders and all students"
)
FIXES = {
    "SQLITE_READONLY": WRITABLE,
    "SQLITE_CANTOPEN": WRITABLE,
    "SQLITE_FULL": "free some space on its disk",
    "SQLITE_BUSY": "check which process is holding it",
    "SQLITE_CORRUPT": DAMAGED,
    "SQLITE_NOTADB": DAMAGED,
}
"""What to do about a SQLite file, by the prefix of the error's name."""
ID_PATTERN = re.compile(r"distill-[0-9a-f]{24}")

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("student", sa.String(64), nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("progress", sa.JSON(none_as_null=True)),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("losses", sa.Integer, nullable=False, default=0),
    sa.Column("owner", sa.String(255)),
    sa.Column("device", sa.String(255)),
    sa.Column("lease_until", sa.Double),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sqlite_autoincrement=True,
)
_running = jobs.c.status == "running"
_queued = jobs.c.status == "queued"
_open = jobs.c.status.in_(["queued", "running"])
sa.Index("one_running_job_a_device", jobs.c.device, unique=True, sqlite_where=_running, postgresql_where=_running)
sa.Index("one_open_job_a_student", jobs.c.student, unique=True, sqlite_where=_open, postgresql_where=_open)
sa.Index("jobs_by_status", jobs.c.status, jobs.c.number)

_NOT_HELD: dict[str, Any] = {"owner": None, "device": None, "lease_until": None}


def _as_job(row: sa.Row[Any]) -> Job:
    """The row as a job, even if another version wrote it: one such row must not take the list and the queue with it."""
    values = dict(row._mapping)
    student, raw = values.pop("student"), values["spec"]
    try:
        values["spec"] = DistillJob.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        values["unreadable"] = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        values["spec"] = DistillJob.model_construct(student=student, method=str(raw.get("method")))
    values["error"] = JobError(**_known(JobError, values["error"])) if values["error"] else None
    values["progress"] = Progress(**_known(Progress, values["progress"])) if values["progress"] else None
    return Job(**values)


def _known(kind: type, stored: dict[str, Any]) -> dict[str, Any]:
    return {each.name: stored[each.name] for each in fields(kind) if each.name in stored}


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not block each other
    cursor.execute("PRAGMA synchronous=FULL")  # an accepted job survives a power failure
    cursor.close()


class JobTable:
    """The job table of one database. Its methods block, so an event loop must call them in a thread.

    Every method raises `JobsUnavailable` if the database cannot be used.

    Args:
        url: SQLAlchemy URL, such as ``sqlite:///work/jobs.db`` or ``postgresql+psycopg://...``.
        clock: seconds since the epoch.

    Raises:
        ValueError: the URL is invalid, its driver is not installed, or it names an in-memory SQLite database, which
            other processes could not see.
        JobsUnavailable: the folder of the SQLite file cannot be created.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        try:
            parsed = sa.make_url(url)
            self._engine = sa.create_engine(parsed, pool_pre_ping=True)
        except sa.exc.ArgumentError as error:
            raise ValueError(f"the job table's URL cannot be used: {error}") from error
        except ModuleNotFoundError as error:
            raise ValueError(f"the job table's database needs a driver: pip install {error.name}") from error
        self._clock = clock
        self._name = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise ValueError(f"{url!r} is an in-memory database: name a file, such as sqlite:///work/jobs.db")
            self._name = parsed.database
            try:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise JobsUnavailable(self._unusable(error.strerror, WRITABLE)) from error
            sa.event.listen(self._engine, "connect", _prepare_sqlite)

    def create_tables(self) -> None:
        """Create the table if it is missing; several processes may do so at once.

        Raises:
            JobsUnavailable: the database cannot be used, or its table was made by another version.
        """
        with self._telling():
            for attempt in range(3):
                try:
                    metadata.create_all(self._engine)
                    break
                except (sa.exc.OperationalError, sa.exc.ProgrammingError, IntegrityError):
                    if attempt == 2:  # not just two processes starting for the first time at once
                        raise
                    time.sleep(0.2)
            columns = {each["name"]: each for each in sa.inspect(self._engine).get_columns(jobs.name)}
        missing = [name for name in jobs.c.keys() if name not in columns]  # noqa: SIM118 (not a dict)
        # A newer version may have added columns; those that this one would have to fill make every new job fail.
        needed = [n for n, c in columns.items() if n not in jobs.c and not c["nullable"] and c["default"] is None]
        if missing or needed:
            what = (
                f"it lacks the columns {', '.join(missing)}" if missing else f"it needs the columns {', '.join(needed)}"
            )
            raise JobsUnavailable(self._unusable(f"{what}, so another version of Fewstep made it", OTHER_VERSION))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def add(self, specs: Sequence[DistillJob]) -> list[Job]:
        """Queue the specs in one transaction. Raises JobConflict, in which case none is queued."""
        added = []
        with self._begin() as connection:
            for spec in specs:
                values = {
                    "id": f"distill-{secrets.token_hex(12)}",
                    "status": "queued",
                    "student": spec.student,
                    "spec": spec.model_dump(mode="json"),
                    "created_at": self._clock(),
                }
                try:
                    added.append(_as_job(connection.execute(jobs.insert().values(values).returning(jobs)).one()))
                except IntegrityError as error:
                    raise JobConflict(_taken(spec.student)) from error
        return added

    def get(self, job_id: str) -> Job:
        """The job. Raises JobNotFound."""
        if not ID_PATTERN.fullmatch(job_id):
            raise JobNotFound(job_id)
        with self._begin() as connection:
            row = connection.execute(jobs.select().where(jobs.c.id == job_id)).one_or_none()
        if row is None:
            raise JobNotFound(job_id)
        return _as_job(row)

    def page(self, limit: int, after: str | None = None) -> tuple[list[Job], bool]:
        """Up to ``limit`` jobs, newest first, older than job ``after``; and whether there are more."""
        query = jobs.select().order_by(jobs.c.number.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(jobs.c.number < self.get(after).number)
        with self._begin() as connection:
            rows = connection.execute(query).all()
        return [_as_job(row) for row in rows[:limit]], len(rows) > limit

    def running(self) -> list[Job]:
        """Every job that a supervisor holds."""
        with self._begin() as connection:
            return [_as_job(row) for row in connection.execute(jobs.select().where(_running)).all()]

    def ended_for(self, age: float) -> list[str]:
        """The ids of all jobs that ended more than ``age`` seconds ago, oldest first."""
        query = sa.select(jobs.c.id).where(*self._ended_for(age)).order_by(jobs.c.number)
        with self._begin() as connection:
            return list(connection.execute(query).scalars())

    @contextmanager
    def holding_ended(self, job_id: str, age: float) -> Iterator[bool]:
        """Yields whether the job ended more than ``age`` seconds ago, and has not been resumed.

        If so, whoever resumes it waits until the block ends, which must therefore be short.
        """
        with self._begin() as connection:
            # An update that changes nothing, since it locks the row in every database.
            held = jobs.update().where(jobs.c.id == job_id, *self._ended_for(age)).values(status=jobs.c.status)
            yield connection.execute(held).rowcount == 1

    def _ended_for(self, age: float) -> list[sa.ColumnElement[bool]]:
        return [jobs.c.status.in_(ENDED), jobs.c.finished_at < self._clock() - age]

    def needing(self, student: str) -> Job | None:
        """A job that has not ended and that starts from this student, or is guided by it."""
        with self._begin() as connection:
            found = [_as_job(row) for row in connection.execute(jobs.select().where(_open)).all()]
        return next((job for job in found if student in students_read(job.spec)), None)

    def _update(self, where: Sequence[sa.ColumnElement[bool]], values: dict[str, Any]) -> Job | None:
        with self._begin() as connection:
            row = connection.execute(jobs.update().where(*where).values(values).returning(jobs)).one_or_none()
            return None if row is None else _as_job(row)

    def waiting(self) -> bool:
        """Whether a job is queued."""
        with self._begin() as connection:
            return connection.execute(sa.select(jobs.c.number).where(_queued).limit(1)).first() is not None

    def claim(self, owner: str, device: str, lease: float) -> Job | None:
        """Claim the oldest queued job for ``device``; None if there is none, or the device is running a job already."""
        oldest = (
            sa.select(jobs.c.number).where(_queued).order_by(jobs.c.number).limit(1).with_for_update(skip_locked=True)
        )
        now = self._clock()
        values = {
            "status": "running",
            "owner": owner,
            "device": device,
            "lease_until": now + lease,
            "attempt": jobs.c.attempt + 1,
            "started_at": sa.func.coalesce(jobs.c.started_at, now),
        }
        try:
            return self._update([jobs.c.number == oldest.scalar_subquery(), _queued], values)
        except IntegrityError:
            return None

    def heartbeat(self, job: Job, lease: float, progress: Progress | None) -> Job | None:
        """Renew this attempt's lease and record its progress; None if it is no longer the job's current attempt."""
        values: dict[str, Any] = {"lease_until": self._clock() + lease}
        if progress is not None:
            values["progress"] = asdict(progress)
        return self._update(self._held(job), values)

    def take_over(self, job: Job, owner: str, lease: float) -> Job | None:
        """Take a running job over from its dead owner; the incremented number of losses fences the old owner off.

        No attempt begins, so their number stays.
        """
        values = {
            "owner": owner,
            "losses": jobs.c.losses + 1,
            "lease_until": self._clock() + lease,
        }
        return self._update([*self._held(job), jobs.c.lease_until == job.lease_until], values)

    def requeue(self, job: Job, losses: int | None = None) -> Job | None:
        """Return this attempt's job to the queue, to continue from its checkpoint.

        Args:
            job: as its attempt holds it.
            losses: replaces the job's; old attempts stay fenced off, since the next claim increments their number.
        """
        values = {"status": "queued", "losses": job.losses if losses is None else losses, **_NOT_HELD}
        return self._update(self._held(job), values)

    def finish(
        self,
        job: Job,
        status: Status,
        *,
        error: JobError | None = None,
        result: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Job | None:
        """Record how this attempt ended and, if given, its progress; None if it is no longer the current attempt."""
        values: dict[str, Any] = {
            "status": status,
            "finished_at": self._clock(),
            "error": asdict(error) if error else None,
            "result": result,
            **_NOT_HELD,
        }
        if progress is not None:
            values["progress"] = asdict(progress)
        return self._update(self._held(job), values)

    def cancel(self, job_id: str) -> Job:
        """Cancel a queued job, or mark a running one to be stopped. Raises JobNotFound or JobConflict."""
        this = jobs.c.id == self.get(job_id).id
        done = self._update(
            [this, _queued], {"status": "cancelled", "finished_at": self._clock(), "cancel_requested": True}
        ) or self._update([this, _running], {"cancel_requested": True})
        if done is None:
            raise JobConflict(f"job {job_id!r} has ended ({self.get(job_id).status}) and can no longer be cancelled")
        return done

    def resume(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again. Raises JobNotFound or JobConflict."""
        job = self.get(job_id)
        where = [jobs.c.id == job_id, jobs.c.status.in_(["failed", "cancelled"])]
        values = {"status": "queued", "finished_at": None, "error": None, "losses": 0, "cancel_requested": False}
        try:
            queued = self._update(where, values)
        except IntegrityError as error:
            raise JobConflict(_taken(job.spec.student)) from error
        if queued is None:
            raise JobConflict(
                f"job {job_id!r} is {self.get(job_id).status}; only a failed or cancelled job can be resumed"
            )
        return queued

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        """Run the block in a transaction."""
        with self._telling(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Replace any database error except a violated constraint by `JobsUnavailable`."""
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, sa.exc.TimeoutError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            why = str(cause).partition("\n")[0]
            name = getattr(cause, "sqlite_errorname", None)
            fix = "check that the database can be reached and written (FEWSTEP_DATABASE_URL)"
            if name is not None:
                fix = next((do for start, do in FIXES.items() if name.startswith(start)), "check its disk")
            raise JobsUnavailable(self._unusable(why, fix)) from error

    def _unusable(self, why: str | None, fix: str) -> str:
        return f"the job table {self._name} cannot be used ({why}): {fix}"

    @staticmethod
    def _held(job: Job) -> list[sa.ColumnElement[bool]]:
        return [jobs.c.id == job.id, _running, jobs.c.attempt == job.attempt, jobs.c.losses == job.losses]


def _taken(student: str) -> str:
    return f"another job that has not ended makes a student named {student!r}: cancel that job, or choose another name"
