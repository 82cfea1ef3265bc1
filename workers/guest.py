"""What a worker becomes: a command, executed in place, or a Python function, run in the worker."""

from __future__ import annotations

import atexit
import errno
import os
import sys

from .vcpu import NOT_EXECUTABLE, NOT_FOUND, Order, be_traced, settle_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["Command", "Python"]


class Command:
    """A command, found in ``PATH`` as execvp(3) does and executed in the worker's place: same pid, same pin.

    A file without a ``#!`` line goes to ``/bin/sh``, as with env(1) and a shell.

    :param inherited: descriptors that the command is given, by their numbers, beside those that every guest has
    """

    execs = True

    def __init__(self, argv: Sequence[str], inherited: Sequence[int] = ()) -> None:
        self.argv, self.inherited = list(argv), inherited

    def __call__(self, order: Order) -> NoReturn:
        settle_signals(order)
        for fd in self.inherited:
            os.set_inheritable(fd, True)
        if order.mlock:
            be_traced()  # the keeper locks the memory of what this becomes
        number = errno.ENOENT
        for path in self._candidates(order):
            try:
                os.execve(path, self.argv, order.environ)
            except OSError as error:
                if error.errno == errno.ENOEXEC:
                    os.execve("/bin/sh", ["sh", path, *self.argv[1:]], order.environ)
                if error.errno in (errno.ENOENT, errno.ENOTDIR) and "/" not in self.argv[0]:
                    continue
                number = error.errno or errno.ENOENT
                if number != errno.EACCES:  # else another directory of PATH may hold one that can be executed
                    break
        order.tell("exec", number)
        os._exit(NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE)

    def _candidates(self, order: Order) -> list[str]:
        # Not os.get_exec_path: it imports, and who this is by now may not be let into the library's directory.
        name = self.argv[0]
        if "/" in name:
            return [name]
        return [os.path.join(folder or ".", name) for folder in order.environ.get("PATH", os.defpath).split(":")]


class Python:
    """A Python function, run in the worker: ``"package.module:function"``, called without arguments.

    The current directory is searched first, as with ``python -m``. None or 0 is success, another whole number
    is the exit status, anything raised is printed with its traceback and gives 1.
    """

    execs = False

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self, order: Order) -> NoReturn:
        os.environ.clear()
        os.environ.update(order.environ)
        settle_signals(order)
        if order.log is None:
            _close_what_exec_would()  # else one of them is the log's pipe
        status = 1
        atexit._clear()  # what it will find there is the guest's own
        try:
            status = self._call()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if isinstance(error.code, str):
                sys.stderr.write(f"{error.code}\n")
        except KeyboardInterrupt:
            _die_of_interrupt()
        except BaseException:
            import traceback

            traceback.print_exc()
        try:
            _finish()
        finally:
            os._exit(status & 0xFF)

    def _call(self) -> int:
        import importlib
        import signal

        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as the interpreter does at its own start
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, os.getcwd())
        # A user's folder may have a package of this one's name: theirs is what they mean.
        if not self.target.startswith("workers.probes."):
            for name in [name for name in sys.modules if name == "workers" or name.startswith("workers.")]:
                del sys.modules[name]
            if os.path.isdir("workers") and not os.path.exists("workers/__init__.py"):
                # Without that file it would lose to this one, which is further back in the path but has it.
                sys.modules["workers"] = theirs = type(sys)("workers")
                theirs.__path__ = [os.path.abspath("workers")]
        module, _, attribute = self.target.partition(":")
        function = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
        result = function()  # type: ignore[operator]
        return int(result) if result is not None else 0


def _close_what_exec_would() -> None:
    import fcntl

    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(fd)
        except OSError:
            continue  # the descriptor of the listing itself


def _die_of_interrupt() -> None:
    import signal

    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _finish() -> None:
    threading = sys.modules.get("threading")
    if threading:
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    atexit._run_exitfuncs()
    logging = sys.modules.get("logging")
    if logging:
        logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
