"""Opening the storage that the processes of one run share: a database by its URL, or a journal file on one machine."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

from qopt.errors import UsageError

OPTION: Final = "--storage"
EXPECTED: Final = "postgresql://USER@HOST/DATABASE, sqlite:///FILE or journal:FILE"
DRIVERS: Final = {"postgresql": ("psycopg", "psycopg2")}
"""By database, the drivers that will do where the URL names none; the first is what qopt[distributed] installs."""

PATIENCE: Final = {"postgresql": {"connect_timeout": 10}, "sqlite": {"timeout": 60}}
"""By database, seconds to wait for a connection, or for another process to let go of the file."""

_TRIES = 4


def open_storage(text: str, *, create: bool) -> BaseStorage | None:
    """The storage at a URL, or at a path; None where there is nothing yet and it is not to be created.

    Tables are made with ``create`` only: processes that make them at once get into each other's way.

    Raises:
        UsageError: not a URL, a driver that is not installed, or a storage that does not answer.
    """
    path = journal_path(text)
    with reaching(text):
        if path is not None:
            if not create and not path.exists():
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        url = _url(text)
        if not create and url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
            return None
        return _database(url, create)


def journal_path(text: str) -> Path | None:
    """The file of ``journal:FILE``, or of a plain path that ends in ``.log``; None for URLs of databases."""
    kind, _, rest = text.partition(":")
    if kind == "journal" and rest:
        return Path(rest)
    return Path(text) if text.endswith(".log") and "://" not in text else None


def shown(text: str) -> str:
    """The URL as messages show it: no password, and of its query only where the server is."""
    if journal_path(text) is not None:
        return text
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return OPTION
    kept = {name: value for name, value in url.query.items() if name in ("host", "port")}
    return url.set(query=kept).render_as_string(hide_password=True)


def close(storage: BaseStorage) -> None:
    """Let go of a storage's connections."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def reaching(text: str) -> Iterator[None]:
    """Around every use of the storage at ``text``: what goes wrong there is one line without a password.

    Raises:
        UsageError: the storage failed.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, RuntimeError) as error:
        raise UsageError(
            "cannot use the storage", where=shown(text), got=_reason(error, text),
            fix="see that it runs, that this machine reaches it, and that user and password are right",
        ) from error  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Around calls of Optuna that would speak, whatever the user's own studies do."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _url(text: str) -> URL:
    """The URL with a driver that is installed."""
    try:
        url = make_url(text)
        if url.drivername == "postgres":
            url = url.set(drivername="postgresql")
        if url.drivername in DRIVERS:
            known = DRIVERS[url.drivername]
            url = url.set(drivername=f"{url.drivername}+{next(filter(find_spec, known), known[0])}")
        url.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise UsageError("not a storage", where=OPTION, expected=EXPECTED, got=_kind(text)) from error
    return url


def _kind(text: str) -> str:
    """What may be shown of something that is no URL: nothing that could be a password."""
    return f"{text.partition('://')[0]}://..." if "://" in text else repr(text.rpartition("@")[2])


def _database(url: URL, create: bool) -> RDBStorage | None:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    patience = PATIENCE.get(url.get_backend_name())
    options: dict[str, Any] = {"pool_pre_ping": True, **({"connect_args": patience} if patience else {})}
    for tries in range(1, _TRIES + 1):
        try:
            with quiet():
                text = url.render_as_string(hide_password=False)
                return RDBStorage(text, engine_kwargs=options, skip_table_creation=not create)
        except ImportError as error:
            fix = "pip install 'qopt[distributed]'" if url.get_backend_name() in DRIVERS else "install it with pip"
            raise UsageError(
                "the database's driver is not installed", where=OPTION, got=url.drivername, fix=fix
            ) from error
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if not create and _has_no_tables(error):
                return None
            silent = any(isinstance(one, OperationalError) for one in (error, error.__cause__))
            if tries == _TRIES or (silent and "already exists" not in str(_cause(error))):
                raise
            time.sleep(tries)  # another process makes the same tables
    raise AssertionError("unreachable")


def _has_no_tables(error: BaseException) -> bool:
    text = str(_cause(error))
    return "no such table" in text or ("does not exist" in text and "relation" in text)


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException, text: str) -> str:
    """The first line of the deepest cause, without the password."""
    line = (str(_cause(error)).strip().splitlines() or [type(error).__name__])[0]
    try:
        secret = None if journal_path(text) is not None else make_url(text).password
    except (ArgumentError, ValueError):
        secret = None
    return line.replace(str(secret), "***") if secret else line
