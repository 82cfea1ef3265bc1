"""QEMU's monitor: commands with time limits, and events, over a socket that QEMU has inherited.

The keeper waits in one place, for descriptors; the package ``qemu.qmp`` waits in an event loop of asyncio. So that loop
runs here only when there is something for it to do: :meth:`Monitor.step` where the socket has something to read, and
:meth:`Monitor.execute` until the answer is there. A QEMU that does not answer costs the time limit, nothing more.

Source: QEMU's docs/interop/qmp-spec.rst; qemu.qmp's QMPClient.
"""

from __future__ import annotations

import asyncio

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError, Runstate

from ..errors import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from socket import socket
    from typing import Any

__all__ = ["Lost", "Monitor", "Refused", "Silent"]

LIMIT_S = 2.0
EVENTS = ("SHUTDOWN", "RESET", "STOP", "RESUME", "GUEST_PANICKED")  # those that are heard
_ROUNDS = 8  # of the loop: what has come is in hand after four
_MOST_WORDS = 200  # of why it is gone: it may hold all that came, megabytes of it


class Lost(Failed):
    """The connection is gone."""


class Silent(Failed):
    """QEMU did not answer in time; the command may have been carried out all the same."""


class Refused(Failed):
    """QEMU answered with an error."""


class Monitor:
    """One connection.

    :param name: the VM's, for messages
    :param sock: this end of it; it is this object's from now on
    """

    def __init__(self, name: str, sock: socket) -> None:
        self._name, self._fd = name, sock.fileno()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)
        self._client = QMPClient(name)
        self._client.events.names = set(EVENTS)  # it keeps what it has heard, so it is to hear little
        self._connecting: asyncio.Task[None] | None = self._loop.create_task(self._client.connect(sock))
        self._why = ""

    def fileno(self) -> int:
        """Return the socket's descriptor, for poll(2); -1 once the connection is gone."""
        return -1 if self._why else self._fd

    @property
    def lost(self) -> str:
        """Why the connection is gone; empty while it is there."""
        return self._why

    def connected(self) -> bool:
        """Take a step, and say whether QEMU has greeted.

        :raises Lost: where it is gone instead
        """
        self.step()
        if self._why:
            raise self._gone()
        return self._connecting is None

    def step(self) -> None:
        """Read what has come; never waits."""
        if self._why:
            return
        for _ in range(_ROUNDS):
            self._loop.run_until_complete(asyncio.sleep(0))
        if self._connecting is not None and self._connecting.done():
            error = self._connecting.exception()
            self._connecting = None
            if error is not None:
                self._lose(error.exc if isinstance(error, ConnectError) else error)
                return
        if self._connecting is None and self._client.runstate != Runstate.RUNNING:
            self._lose()

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the names and the data of the events that have come since this was last asked, oldest first."""
        messages = [(str(message["event"]), message.get("data")) for message in self._client.events.clear()]
        return [(name, data if isinstance(data, dict) else {}) for name, data in messages]

    def execute(self, command: str, arguments: Mapping[str, object] | None = None, limit_s: float = LIMIT_S) -> Any:
        """Make one command and return what QEMU answers.

        :raises Lost: where the connection is gone, or goes meanwhile
        :raises Silent: where there is no answer within *limit_s*
        :raises Refused: what QEMU has against it
        """
        if self._why:
            raise self._gone()
        try:
            return self._loop.run_until_complete(asyncio.wait_for(self._client.execute(command, arguments), limit_s))
        except TimeoutError:
            raise Silent(
                f"QEMU of VM {self._name!r} did not answer {command!r} within {limit_s:g} s",
                "the host may be overloaded: see 'uptime', and run it again",
            ) from None
        except ExecuteError as error:
            raise Refused(
                f"QEMU of VM {self._name!r} refused {command!r}: {error}", "see QEMU's own messages above"
            ) from None
        except (QMPError, OSError, EOFError) as error:
            self._lose(error)
            raise self._gone() from None

    def query(self, command: str) -> dict[str, Any]:
        """Make one command whose answer is an object.

        :raises HostpartError: as :meth:`execute` does
        """
        answer = self.execute(command)
        if not isinstance(answer, dict):
            raise self.nonsense(command)
        return answer

    def nonsense(self, command: str) -> Refused:
        """Return the error for an answer that is none."""
        return Refused(
            f"what QEMU of VM {self._name!r} answers to {command!r} is not what QMP has for it",
            "see which program binary names in [vm.qemu]: hostpart was tried with QEMU 7.2",
        )

    def close(self) -> None:
        """Close the connection and the loop; calling it twice does no harm."""
        self._lose()
        if not self._loop.is_closed():
            self._loop.close()

    def _gone(self) -> Lost:
        return Lost(
            f"the QMP connection to QEMU of VM {self._name!r} is gone ({self._why})",
            "see QEMU's own messages above, and take what is about monitors out of args; or run it again",
        )

    def _lose(self, error: BaseException | None = None) -> None:
        if self._why:
            return
        self._why = _words(error)
        if self._connecting is not None:
            self._connecting.cancel()
        try:
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), 1.0))
        except (TimeoutError, asyncio.CancelledError):
            pass
        except Exception as ended:  # why its reader has ended, of any kind: that of a decoder, of a line without an end
            self._why = _words(error or ended)


def _words(error: BaseException | None) -> str:
    if error is None or isinstance(error, EOFError):
        return "QEMU closed it"
    text = str(error).partition("\n")[0] or type(error).__name__
    return f"{text[:_MOST_WORDS]}..." if len(text) > _MOST_WORDS else text
