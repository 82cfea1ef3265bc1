"""Log records from a worker to the front's handlers, through multiprocessing-logging; a queue per worker.

One queue for all would be lost with the first worker that is killed in the middle of a record: it dies with
the queue's lock. With one each, and with nobody but the worker holding the write end, the receiver
ends by end of file the moment its worker is gone, and not after a time-out.

The keeper makes a :class:`WorkerLog` before each fork, and calls :meth:`WorkerLog.receive` on all of them after the
last fork: a thread that exists while a process forks can leave a lock taken in the child.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading

from multiprocessing_logging import MultiProcessingHandler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WorkerLog"]


class _Target(logging.Handler):
    # The receiver calls emit() of its target directly, past the target's lock and filters: go through handle().
    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__(min((handler.level for handler in handlers), default=logging.NOTSET))
        self._handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        for handler in self._handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


class _Pipe(MultiProcessingHandler):  # type: ignore[misc]
    # The package's own constructor starts the receiver thread at once and takes a queue of the interpreter's
    # default start method; here the queue comes first, then the fork, then the thread.
    def __init__(
        self, name: str, target: logging.Handler, queue: multiprocessing.Queue[logging.LogRecord], receive: bool
    ) -> None:
        logging.Handler.__init__(self, target.level)
        self.sub_handler = target
        self.queue = queue
        self._is_closed = False
        self._receive_thread = threading.Thread(target=self._receive, name=name, daemon=True)
        if receive:
            self._receive_thread.start()

    def close(self) -> None:
        if self._receive_thread.ident is not None:
            super().close()
            return
        # In the worker: what was handed to the queue's thread must be in the pipe before exec or exit.
        self._is_closed = True
        self.queue.close()
        self.queue.join_thread()
        logging.Handler.close(self)


class WorkerLog:
    """The way of one worker's records.

    :param where: who speaks, such as ``"rt/vcpu0 pCPU 3"``; each record has it as ``record.where``
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._target = _Target(list(logging.getLogger().handlers))
        self._queue: multiprocessing.Queue[logging.LogRecord] = multiprocessing.get_context("fork").Queue(-1)
        self._receiver: _Pipe | None = None

    def send(self, others: list[WorkerLog]) -> Callable[[], None]:
        """In the worker: send all records to the keeper from now on.

        :param others: the logs of workers forked before, whose pipes this one must not hold open
        :return: sends what is still waiting; to be called before exec
        """
        for other in others:
            other._queue._writer.close()  # type: ignore[attr-defined]
            other._queue._reader.close()  # type: ignore[attr-defined]
        self._queue._reader.close()  # type: ignore[attr-defined]
        pipe = _Pipe(self.where, self._target, self._queue, receive=False)
        pipe.addFilter(self._mark)
        root = logging.getLogger()
        root.handlers[:] = [pipe]
        return pipe.close

    def forked(self) -> None:
        """In the keeper, after the fork: let go of the write end, so that the worker's end is end of file."""
        self._queue._writer.close()  # type: ignore[attr-defined]

    def receive(self) -> None:
        """In the keeper: start the receiver; no fork may come after it."""
        self._receiver = _Pipe(self.where, self._target, self._queue, receive=True)

    def drain(self, wait_s: float = 2.0) -> bool:
        """In the keeper, after the worker ended: wait for the last record; whether all came."""
        if self._receiver is None:
            return True
        self._receiver._receive_thread.join(wait_s)
        return not self._receiver._receive_thread.is_alive()

    def _mark(self, record: logging.LogRecord) -> bool:
        record.where = self.where
        return True
