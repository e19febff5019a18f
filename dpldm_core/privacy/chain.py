"""The ledger's store: an append-only chain of hashed rows in SQLite or PostgreSQL, and the secret keys beside it.

A link's hash covers its content and the hash before it, so an edited link breaks the chain. The table of the head holds
the number and hash of the last link; a writer moves it by compare-and-swap in the transaction that adds a link, so of
two concurrent writers one finds the head moved and decides anew on what the other wrote.

What may never change: the canonical form that is hashed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from dpldm_core.errors import LedgerError

GENESIS = "0" * 64
LOCK_TIMEOUT = 60  # seconds that a writer waits for others
_LOG = logging.getLogger("dpldm.ledger")
_METADATA = sa.MetaData()
_LINKS = sa.Table(
    "dpldm_ledger",
    _METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)
_HEAD = sa.Table(
    "dpldm_ledger_head",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)
_KEYS = sa.Table(
    "dpldm_ledger_keys",
    _METADATA,
    sa.Column("entry_id", sa.Text, primary_key=True),
    sa.Column("secret", sa.LargeBinary, nullable=False),
)


@dataclass(frozen=True)
class Link:
    """One row of the chain."""

    seq: int
    time: str
    kind: str
    body: Mapping[str, Any]
    hash: str


@dataclass(frozen=True)
class Change:
    """What a writer decided to append, and what becomes of an entry's secret in the same transaction.

    Args:
        kind: Kind of the link.
        body: Its JSON content.
        new_secret: (entry id, secret) to keep.
        destroy_secret: Entry id whose secret is destroyed.
    """

    kind: str
    body: Mapping[str, Any]
    new_secret: tuple[str, bytes] | None = None
    destroy_secret: str | None = None


class _HeadMovedError(Exception):
    """Another writer was faster."""


def link_hash(previous: str, seq: int, when: str, kind: str, body: str) -> str:
    """SHA-256 over the canonical form of a link and the hash before it."""
    return hashlib.sha256(json.dumps([previous, seq, when, kind, body], separators=(",", ":")).encode()).hexdigest()


class Chain:
    """The store at one URL.

    Args:
        url: SQLAlchemy URL of SQLite or PostgreSQL. A missing SQLite file is made, with its folder, readable by its
            owner alone.

    Raises:
        LedgerError: It cannot be reached, or is of another kind.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
        except exc.ArgumentError:
            raise LedgerError(f"DPLDM_LEDGER_URL={url!r} is no URL; use sqlite:////path or postgresql://...") from None
        self._where = parsed.render_as_string(hide_password=True)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        if not self._sqlite and parsed.get_backend_name() != "postgresql":
            raise LedgerError(f"ledger {self._where}: only sqlite and postgresql are supported")
        if self._sqlite and parsed.database in (None, "", ":memory:"):
            raise LedgerError(f"ledger {self._where} would be lost with the process; name a file: sqlite:////path")
        if self._sqlite and not Path(str(parsed.database)).is_absolute():
            raise LedgerError(
                f"ledger {self._where} would be another, empty one in another folder; name the whole path: "
                f"sqlite:///{Path(str(parsed.database)).resolve()}"
            )
        options: dict[str, Any] = {"timeout": LOCK_TIMEOUT} if self._sqlite else {"connect_timeout": 10}
        with self._clear_errors():
            if self._sqlite:
                _make_private_file(Path(str(parsed.database)))
            self._engine = sa.create_engine(parsed, connect_args=options, poolclass=sa.NullPool)
            if self._sqlite:
                sa.event.listen(self._engine, "connect", _sqlite_pragmas)
                sa.event.listen(self._engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
            self._create_tables()

    def read(self) -> list[Link]:
        """All links, in order, checked.

        Raises:
            LedgerError: A link or the head was edited, or the store cannot be reached.
        """
        with self._clear_errors(), self._engine.begin() as connection:
            return self._read(connection)

    def append(self, decide: Callable[[list[Link]], Change | None]) -> list[Link]:
        """Append what ``decide`` returns on seeing the whole chain; it is asked again when another writer was faster.

        Args:
            decide: From all links to a change, or None for no change. May raise to refuse.

        Returns:
            The chain afterwards.

        Raises:
            LedgerError: The store cannot be written, or the chain is broken. Nothing was appended then.
        """
        deadline = time.monotonic() + LOCK_TIMEOUT
        while time.monotonic() < deadline:
            with self._clear_errors():
                try:
                    with self._engine.begin() as connection:
                        links = self._read(connection, writing=True)
                        change = decide(links)
                        if change is None:
                            return links
                        link = _next_link(links, change)
                        self._write(connection, link, change)
                    return [*links, link]
                except _HeadMovedError:
                    pass
            time.sleep(0.01)
        raise LedgerError(f"ledger {self._where} was busy for {LOCK_TIMEOUT} s; nothing was written, try again")

    def secret(self, entry_id: str) -> bytes | None:
        """The secret of an entry, None when it was destroyed."""
        with self._clear_errors(), self._engine.begin() as connection:
            return connection.execute(
                sa.select(_KEYS.c.secret).where(_KEYS.c.entry_id == entry_id)
            ).scalar_one_or_none()

    def _read(self, connection: sa.Connection, *, writing: bool = False) -> list[Link]:
        # The lock on the head (PostgreSQL; SQLite locks the file) keeps writers away until this transaction ends.
        head = connection.execute(sa.select(_HEAD.c.seq, _HEAD.c.hash).with_for_update(read=not writing)).one()
        rows = connection.execute(sa.select(_LINKS).order_by(_LINKS.c.seq)).all()
        links, previous = [], GENESIS
        for expected, row in enumerate(rows, start=1):
            if row.seq != expected or row.hash != link_hash(previous, row.seq, row.time, row.kind, row.body):
                raise LedgerError(
                    f"ledger {self._where}: the chain is broken at link {expected}: it was edited. Nothing is spent or "
                    "published on it; restore it from a backup that holds every entry that a bundle names"
                )
            previous = row.hash
            links.append(Link(row.seq, row.time, row.kind, json.loads(row.body), row.hash))
        if (head.seq, head.hash) != (len(links), previous):
            raise LedgerError(
                f"ledger {self._where}: links after {min(head.seq, len(links))} are missing or were added by hand. "
                "Restore it from a backup"
            )
        return links

    def _write(self, connection: sa.Connection, link: Link, change: Change) -> None:
        """Move the head from the link before to this one, if nobody else moved it, and add the link."""
        swap = _HEAD.update().where(_HEAD.c.seq == link.seq - 1).values(seq=link.seq, hash=link.hash)
        if connection.execute(swap).rowcount != 1:
            raise _HeadMovedError
        connection.execute(_LINKS.insert().values({**vars(link), "body": canonical(link.body)}))
        if change.new_secret:
            entry_id, secret = change.new_secret
            connection.execute(_KEYS.insert().values(entry_id=entry_id, secret=secret))
        if change.destroy_secret:
            connection.execute(_KEYS.delete().where(_KEYS.c.entry_id == change.destroy_secret))

    def _create_tables(self) -> None:
        for attempt in range(20):
            try:
                with self._engine.begin() as connection:
                    _METADATA.create_all(connection)
                    if connection.execute(sa.select(_HEAD.c.id)).first() is None:
                        connection.execute(_HEAD.insert().values(id=1, seq=0, hash=GENESIS))
                return
            except (exc.IntegrityError, exc.ProgrammingError):  # another process creates them at the same moment
                if attempt == 19:
                    raise
                time.sleep(0.05 * (attempt + 1))

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (exc.SQLAlchemyError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise LedgerError(
                f"ledger {self._where} fails: {reason}. Nothing was written. Repair it, or set DPLDM_LEDGER_URL"
            ) from error


def canonical(body: Mapping[str, Any]) -> str:
    """The one JSON text that stands for a link's content."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _next_link(links: list[Link], change: Change) -> Link:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if links and now < links[-1].time:
        _LOG.warning("the clock runs behind the ledger (%s < %s): its last time is used again", now, links[-1].time)
        now = links[-1].time
    seq, previous = len(links) + 1, links[-1].hash if links else GENESIS
    body = json.loads(canonical(change.body))
    return Link(seq, now, change.kind, body, link_hash(previous, seq, now, change.kind, canonical(body)))


def _make_private_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's "begin" event above decides when a transaction starts
    for pragma in ("synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")
