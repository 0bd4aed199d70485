"""Several processes write the memories of one database: `warm_database`.

Each is spawned, opens the database by its path, loads the model, and asks for a batch of reference
ids whenever the model is ready for one. This process hands every id out once, the longest
references first, and stores nothing itself; what a worker has stored stays, however it ends. When
this process is gone, workers end as they ask for more.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from memdb import (
    InvalidInputError,
    MemDB,
    MemDBError,
    MissingPartError,
    Progress,
    no_progress,
)
from model_adapter.api.open import open_database
from model_adapter.catalog import CATALOG, Notify, in_brief, pull
from model_adapter.models.adapters import NONE
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.loading import Loading
from model_adapter.models.loading_options import LoadingOptions

_PATIENCE = 60  # seconds for a worker to store what it has written, before it is killed
_GOES_ON = "What was written stays; the same call goes on from there."
_SPAWN = get_context("spawn")  # threads, LMDB and CUDA do not survive a fork


class WorkerError(MemDBError):
    """A process that wrote memories failed, or was killed; the others were ended."""


def warm_database(
    path: str | os.PathLike[str],
    *,
    workers: int = 1,
    ids: Sequence[str] | None = None,
    top: int | None = None,
    model: str | None = None,
    adapter: str | None = None,
    busy_timeout: float = 30.0,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
    **loading: Unpack[LoadingOptions],
) -> int:
    """`memdb.MemDB.warm` by several processes, each with a model of its own.

    They share the processor's cores evenly. Interrupted, the same call goes on. As ever with
    processes that are spawned, a script calls it under `if __name__ == "__main__":`.

    Args:
        path: the database.
        workers: how many; 1: this process.
        ids: documents to warm; default: all.
        top: only so many references: those that were retrieved most often.
        model: a name of the catalogue, a GGUF file, a folder or a Hugging Face id; default: as
            recorded.
        adapter: a name of the catalogue, a folder, or `none`; default: as recorded.
        busy_timeout: seconds that each of them waits for another that writes.
        progress: told of the work, in this process.
        notify: told when a model is pulled.
        loading: `device`, `dtype` and what else `Loading` has; where no device is said, worker i
            takes CUDA device i modulo their number. `threads` are those of each worker.

    Returns:
        How many memories were written.

    Raises:
        MissingPartError: the database records no model.
        WorkerError: a worker failed, or was killed.
        MemDBError: what a worker raised; and see `memdb.MemDB.warm`.
    """
    if isinstance(workers, bool) or workers < 1:
        raise InvalidInputError(f"workers must be a whole number of at least 1, got {workers!r}")
    if workers == 1:
        with open_database(
            path,
            model=model,
            adapter=adapter,
            busy_timeout=busy_timeout,
            notify=notify,
            **loading,
        ) as database:
            return database.warm(ids, top=top, progress=progress)
    with MemDB.open(path, busy_timeout=busy_timeout) as database:
        source = model or database.settings["model"]["name"]
        if source is None:
            raise MissingPartError(f"the database '{path}' records no model to write memories with")
        Loading(**loading)  # what is wrong with it is said before anything is started
        trained = adapter or database.settings["memory"].get("adapter", NONE)

        def warmer(references: Sequence[int], told: Progress) -> int:
            if not references:
                return 0
            if source in CATALOG:
                pull(source, notify)  # here, where somebody is told
            count = min(workers, len(references))
            threads = loading.get("threads") or max(1, torch.get_num_threads() // count)
            each: LoadingOptions = {**loading, "threads": threads}
            jobs = [
                _Job(os.fspath(path), source, trained, each, i, busy_timeout) for i in range(count)
            ]
            with _Team(jobs) as team:
                return team.write(references, told)

        return database.warm(ids, top=top, progress=progress, warmer=warmer)


# --- the process that hands out -------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a worker is started with."""

    path: str
    model: str
    adapter: str
    loading: LoadingOptions
    number: int
    busy_timeout: float = 30.0


class _Team:
    """The workers, in a `with` statement that leaves none behind.

    They send (what, value): `ready` with the references that they would have in a batch, once;
    `next` for a list of ids, which is empty when there are no more; `stored` with how many
    references of those are done; at the end `written` with how many memories, or `failed` with an
    error.
    """

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self._jobs = jobs
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> Self:
        try:
            # Ctrl-C reaches all processes of a terminal, and is the parent's to act upon: a child
            # that is started while it is blocked never sees it. The tracker is a helper process of
            # `multiprocessing`, and to start it ends the blocking.
            resource_tracker.ensure_running()
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for job in self._jobs:
                    self._start(job)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # and here it may come
        except BaseException:
            self._end()
            raise
        return self

    def _start(self, job: _Job) -> None:
        mine, theirs = _SPAWN.Pipe()
        with theirs:  # the child has its own copy: when it dies, nobody holds that end
            process = _SPAWN.Process(target=_work, args=(job, theirs), daemon=True)
            process.start()
        self._processes[mine] = process

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def write(self, references: Sequence[int], progress: Progress) -> int:
        """Have the memories of references written, the first in the list first; how many were.

        Raises:
            WorkerError: a worker failed, or was killed.
            MemDBError: what a worker raised.
        """
        batches: Iterator[Sequence[int]] | None = None
        ready = done = written = 0
        progress("starting workers", 0, len(self._jobs))
        working = set(self._processes)
        while working:
            for connection in wait(list(working)):
                assert isinstance(connection, Connection)
                try:
                    what, value = connection.recv()
                except (EOFError, OSError):
                    raise self._died(connection) from None
                match what:
                    case "ready":
                        ready += 1
                        progress("starting workers", ready, len(self._jobs))
                        if batches is None:
                            batches = iter(_batches(references, value, len(self._jobs)))
                            progress("writing memories", 0, len(references))
                    case "next":
                        assert batches is not None
                        with suppress(OSError):  # if it died, that shows at the next turn
                            connection.send(next(batches, ()))
                    case "stored":
                        done += value
                        progress("writing memories", done, len(references))
                    case "written":
                        written += value
                        working.remove(connection)
                    case _:
                        raise value
        return written

    def _died(self, connection: Connection) -> WorkerError:
        process = self._processes[connection]
        process.join(_PATIENCE)
        code = process.exitcode or 0
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed ({signal.Signals(-code).name})"
        if code == -signal.SIGKILL:
            how += ", perhaps because memory ran out: fewer workers need less"
        number = list(self._processes).index(connection) + 1
        return WorkerError(f"worker {number} of {len(self._jobs)} {how}. {_GOES_ON}")

    def _end(self) -> None:
        """End all workers: each stores what its model has written, and leaves the rest."""
        processes = list(self._processes.values())
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(_PATIENCE)
        finally:  # also where somebody is too impatient for that
            for process in processes:
                process.kill()
                process.join()
            for connection in self._processes:
                connection.close()


def _batches(references: Sequence[int], size: int, workers: int) -> Iterator[Sequence[int]]:
    """Batches of about one size, as many for each worker."""
    total = len(references)
    rounds = -(-total // (size * workers))
    count = min(rounds * workers, total)
    for i in range(count):
        yield references[total * i // count : total * (i + 1) // count]


# --- a worker -------------------------------------------------------------------------------------


def _work(job: _Job, connection: Connection) -> None:
    signal.signal(signal.SIGTERM, _leave)
    last: tuple[str, Any]
    try:
        last = "written", _write(job, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone, and so is the reason for this
    except MemDBError as error:
        last = "failed", error
    except Exception as error:  # of torch, transformers, the system: told to those who started it
        failed = WorkerError(
            f"worker {job.number + 1} failed: {in_brief(error)} ({type(error).__name__}). "
            f"{_GOES_ON}"
        )
        failed.add_note(traceback.format_exc())
        last = "failed", failed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # all is stored: to be killed is the quickest end
    with suppress(OSError):
        connection.send(last)


def _write(job: _Job, connection: Connection) -> int:
    """Write what the parent hands out; how many memories."""
    _be_quiet()
    torch.set_num_threads(job.loading.get("threads") or 1)
    done = 0

    def stored(_: str, now: int, __: int) -> None:
        nonlocal done
        connection.send(("stored", now - done))
        done = now

    with _open(job) as database:
        connection.send(("ready", getattr(database.writer, "batch", 1)))
        return database.warm_batches(_asked(connection), progress=stored)


def _open(job: _Job) -> MemDB:
    devices, loading = torch.cuda.device_count(), job.loading
    if devices and loading.get("device") is None and loading.get("device_map") is None:
        loading = {**loading, "device": f"cuda:{job.number % devices}"}
    adapter = None if job.adapter == NONE else job.adapter
    # It writes, and reads nothing.
    loading = {**loading, "exact": True}
    language = LanguageModel.load(job.model, adapter=adapter, **loading)
    return open_database(job.path, model=language, busy_timeout=job.busy_timeout)


def _asked(connection: Connection) -> Iterator[Sequence[int]]:
    while True:
        connection.send(("next", 0))
        batch = connection.recv()
        if not batch:
            return
        yield batch


def _leave(*_: Any) -> None:
    """End in order: the transaction that is being written is finished first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _be_quiet() -> None:
    """The terminal is the parent's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
