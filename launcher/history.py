"""The finished runs of this user: an SQLite file, a row a run (docs/calibration.md).

It has the machine, the model's size, the settings that memory and time follow from, and what was
predicted and measured. Neither names nor paths of models and data are in it, nor anything else that
a person wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, structs

from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.launcher.user_data import locked
from ftplan.planner.errors import InputError
from ftplan.planner.step_time import StepParts

T = TypeVar("T")

FILE_NAME = "history.sqlite"

# Several runs may end at once, and a disk may be slow.
_PATIENCE_SECONDS = 20.0

# Each makes the next version of the schema; `PRAGMA user_version` says how many have been carried
# out. What has been released is never changed, another one is added.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE runs (
        run_id TEXT PRIMARY KEY,
        planned_at TEXT NOT NULL,
        ftplan TEXT NOT NULL,
        device TEXT NOT NULL,
        kind TEXT NOT NULL,
        rates_source TEXT,
        driver TEXT,
        gpu TEXT,
        gpu_memory_bytes INTEGER,
        processor TEXT,
        num_cores INTEGER,
        platform TEXT,
        python TEXT,
        torch TEXT,
        packages TEXT NOT NULL,
        architecture TEXT,
        num_parameters INTEGER,
        num_trainable_parameters INTEGER,
        method TEXT NOT NULL,
        settings TEXT NOT NULL,
        configuration TEXT NOT NULL,
        predicted TEXT NOT NULL,
        formula TEXT NOT NULL,
        calibration TEXT,
        measured TEXT NOT NULL
    );
    CREATE INDEX runs_of_stack ON runs (device, torch, planned_at);
    """,
)

# Settings whose values are words of ftplan's own: others may hold what a person wrote.
_WORDS = (
    "method", "quantization", "dtype", "mixed_precision", "optim", "attn_implementation", "loss",
    "trainer", "sharding", "offload", "objective", "overlong", "task_weighting",
)  # fmt: skip

_LONGEST_NAME = 100

_JSON = ("packages", "settings", "predicted", "formula", "calibration", "measured")


class StoredRun(Struct, frozen=True, kw_only=True):
    """A row. `run_id`: of the record it was made from, so that one is there once. `device`: what it
    was planned for; `gpu`, `processor`: what it ran on. `configuration`: the same of runs that were
    told the same. `formula`: what is predicted without `calibration`, the one in force then."""

    run_id: str
    planned_at: str
    ftplan: str
    device: str
    kind: str
    rates_source: str | None = None
    driver: str | None = None
    gpu: str | None = None
    gpu_memory_bytes: int | None = None
    processor: str | None = None
    num_cores: int | None = None
    platform: str | None = None
    python: str | None = None
    torch: str | None = None
    packages: dict[str, str]
    architecture: str | None = None
    num_parameters: int | None = None
    num_trainable_parameters: int | None = None
    method: str
    settings: dict[str, Any]
    configuration: str
    predicted: dict[str, Any]
    formula: dict[str, Any]
    calibration: dict[str, Any] | None = None
    measured: dict[str, Any]


_COLUMNS = StoredRun.__struct_fields__


class History(Struct, frozen=True):
    """The file in `folder`, made when first written. `say` is told what was done about damage."""

    folder: Path
    say: Callable[[str], None]

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    def add(self, runs: Sequence[StoredRun]) -> int:
        """Write those that are not there yet; returns their number. Raises InputError."""
        places = ", ".join(f":{name}" for name in _COLUMNS)
        statement = f"INSERT OR IGNORE INTO runs ({', '.join(_COLUMNS)}) VALUES ({places})"

        def write(connection: sqlite3.Connection) -> int:
            before = connection.total_changes
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(statement, [_cells(run) for run in runs])
            connection.execute("COMMIT")
            return connection.total_changes - before

        return self._carried_out(write)

    def runs(self) -> list[StoredRun]:
        """All of them, in the order in which they were planned; none where there is no file.
        Raises InputError."""
        if not self.path.exists():
            return []

        def read(connection: sqlite3.Connection) -> list[StoredRun]:
            statement = f"SELECT {', '.join(_COLUMNS)} FROM runs ORDER BY planned_at, run_id"
            return [run for row in connection.execute(statement) if (run := _stored(row))]

        return self._carried_out(read)

    def _carried_out(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """The action on an open file; a damaged one is set aside first."""
        try:
            try:
                with self._opened() as connection:
                    return action(connection)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._set_aside()
                with self._opened() as connection:
                    return action(connection)
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"the history of runs `{self.path}` cannot be used: {error}",
                "look at the folder's permissions and the disk, or set XDG_DATA_HOME to another",
            ) from error

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(self.path, timeout=_PATIENCE_SECONDS, isolation_level=None)
        try:
            with contextlib.suppress(sqlite3.OperationalError):  # as on some network file systems
                connection.execute("PRAGMA journal_mode = WAL")
            self._migrate(connection)
            yield connection
        finally:
            connection.close()

    def _migrate(self, connection: sqlite3.Connection) -> None:
        """Bring the schema to this version; raises InputError where it is a later one."""
        if _version(connection) == len(MIGRATIONS):
            return
        connection.execute("BEGIN IMMEDIATE")  # another process may be at it
        try:
            version = _version(connection)
            if version > len(MIGRATIONS):
                raise InputError(
                    f"the history of runs `{self.path}` is of a later ftplan: its schema is "
                    f"{version}, and this one knows {len(MIGRATIONS)}",
                    "upgrade ftplan, or set XDG_DATA_HOME to another folder",
                )
            for migration in MIGRATIONS[version:]:
                for statement in filter(str.strip, migration.split(";")):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    def _set_aside(self) -> None:
        """Keep a damaged file under another name, unless another process has done it already."""
        with locked(self.folder):
            if not _damaged(self.path):
                return
            number = 1
            while (aside := self.folder / f"{FILE_NAME}.damaged-{number}").exists():
                number += 1
            self.path.replace(aside)
            for suffix in ("-wal", "-shm"):
                self.path.with_name(FILE_NAME + suffix).unlink(missing_ok=True)
        self.say(f"the history of runs was damaged: kept as {aside}, and begun anew")


def stored_run(run: RunDir) -> StoredRun:
    """The row of a finished run; raises InputError for what is none."""
    plan, record = run.read_plan(), run.read_record()
    environment = read_mapping(run.environment)
    try:
        return _row(plan, record, environment, run.record.read_bytes())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"`{run.root}` lacks figures of a finished run ({type(error).__name__}: {error})",
            "runs of this version of ftplan have them",
        ) from error


def _row(
    plan: Mapping[str, Any], record: Mapping[str, Any], environment: Mapping[str, Any], raw: bytes
) -> StoredRun:
    predicted, device = record["predicted"], plan["device"]
    formula = predicted["formula"]
    parts = formula["step_parts"] and msgspec.convert(formula["step_parts"], StepParts)
    figures = _numbers(formula)
    packages = {name: text for name, text in environment["packages"].items() if text}
    settings = _plain_settings(plan["plan"])
    model = plan["estimate"]["model"]
    told = (
        model["num_parameters"],
        record["method"],
        _numbers(predicted)["allocated_bytes"],
        *(figures[name] for name in ("reserved_bytes", "context_bytes", "tokens_per_step")),
    )
    return StoredRun(
        run_id=hashlib.sha256(raw).hexdigest(),
        planned_at=str(plan["planned_at"]),
        ftplan=str(plan["ftplan"]),
        device=_one_line(device["name"]),
        kind=str(device["kind"]),
        rates_source=device.get("rates_source"),
        driver=environment.get("driver"),
        gpu=environment.get("gpu") and _one_line(environment["gpu"]),
        gpu_memory_bytes=environment.get("gpu_memory_bytes"),
        processor=environment.get("processor"),
        num_cores=environment.get("num_cores"),
        platform=environment.get("platform"),
        python=environment.get("python"),
        torch=packages.get("torch"),
        packages=packages,
        architecture=model.get("architecture"),
        num_parameters=model["num_parameters"],
        num_trainable_parameters=record["num_trainable_parameters"],
        method=str(record["method"]),
        settings=settings,
        configuration=_digest(told),
        predicted=_numbers(predicted),
        formula={**figures, "step_parts": structs.asdict(parts) if parts else None},
        calibration=predicted.get("calibration"),
        measured=_numbers(record["measured"]),
    )


def _plain_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, switches and ftplan's own words."""
    values = {name: setting["value"] for name, setting in plan.items()}
    return {
        name: value
        for name, value in values.items()
        if name in _WORDS or isinstance(value, bool | int | float)
    }


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _one_line(name: Any) -> str:
    """A name of another machine's, which is going to be printed."""
    return "".join(filter(str.isprintable, str(name)))[:_LONGEST_NAME]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _cells(run: StoredRun) -> dict[str, Any]:
    cells = {name: getattr(run, name) for name in _COLUMNS}
    return {
        name: json.dumps(value) if name in _JSON and value is not None else value
        for name, value in cells.items()
    }


def _stored(row: Sequence[Any]) -> StoredRun | None:
    """None for a row that something else wrote."""
    cells = dict(zip(_COLUMNS, row, strict=True))
    try:
        read = {name: cells[name] and json.loads(cells[name]) for name in _JSON}
    except (TypeError, ValueError):
        return None
    return StoredRun(**{**cells, **read})


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _damaged(path: Path) -> bool:
    if not path.exists():
        return False
    connection = sqlite3.connect(path, timeout=_PATIENCE_SECONDS)
    try:
        return bool(connection.execute("PRAGMA quick_check").fetchone()[0] != "ok")
    except sqlite3.DatabaseError as error:
        return _is_damage(error)
    finally:
        connection.close()
