"""The machines under QEMU of one VM, as its keeper attends to them: heard, looked at, and brought to their end.

What one of them is and how it is spoken to is :mod:`hostpart.qemu.machine`'s; when to do what with the VM is the
keeper's. A vCPU is a thread here, so each has a record of its own, and QEMU's other threads, on the service VM's side,
are looked at as well.
"""

from __future__ import annotations

import os
import select
import signal
import time

from . import evidence, tree
from .errors import Failed, HostpartError
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .cpuset import CpuSet
    from .device_model import DeviceModel
    from .qemu.machine import Machine

__all__ = ["FAILED", "Machines", "Sampled"]

FAILED = 1 << 8  # the wait status that stands for a guest that has failed while QEMU itself ended well
_END_S = 1.0  # for a QEMU that has closed its monitor to be seen to have ended


class Sampled(Value):
    """What one look at all machines found.

    :ivar pids: QEMU's processes and those below them
    :ivar vcpus: drifts of vCPU threads, each with its pin
    :ivar others: drifts of QEMU's other threads, each with where they are to stay
    """

    pids: frozenset[int] = frozenset()
    vcpus: tuple[tuple[evidence.Drift, CpuSet], ...] = ()
    others: tuple[tuple[evidence.Drift, CpuSet], ...] = ()


class Machines:
    """See the module.

    :param records: of the VM's vCPUs, by pid, or by thread where they are threads
    :param note: told each thing that happens, once, as a sentence
    """

    def __init__(
        self, model: DeviceModel, records: Mapping[int, evidence.VcpuRecord], note: Callable[[str], None]
    ) -> None:
        self._model, self._records, self._note = model, records, note
        self._poll: select.poll | None = None
        self._heard: set[int] = set()
        self._unplugged: set[int] = set()

    def alive(self) -> list[Machine]:
        """Return those whose QEMU has not been reaped."""
        alive = set(self._model.alive)
        return [machine for pid, machine in self._model.machines.items() if pid in alive]

    @property
    def breaches(self) -> tuple[str, ...]:
        """When QEMU was not the machine that hostpart made, a sentence each."""
        return tuple(text for machine in self._model.machines.values() for text in machine.breaches)

    # -- before START ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Get ready to speak with them while they start: all workers are forked."""
        for machine in self.alive():
            machine.monitor.step()

    def ready(self) -> bool:
        """Take a step towards READY; whether all are.

        :raises HostpartError: why one will not be
        """
        self._raise_if_ended()
        try:
            return self._model.find_threads()
        except HostpartError:
            # A QEMU that ends closes its monitor first: why it did is for its last words to say.
            until = time.monotonic() + _END_S
            while any(machine.monitor.lost for machine in self.alive()) and time.monotonic() < until:
                self._raise_if_ended()
                time.sleep(0.005)
            raise

    def _raise_if_ended(self) -> None:
        for machine in self.alive():
            if os.waitid(os.P_PID, machine.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self._model.hear()
                for number in self._model.exec_errors.values():
                    problem = f"{machine.binary} can't be executed: {os.strerror(number)}"
                    raise Failed(problem, f"see 'ls -l {machine.binary}'")
                raise machine.failure()

    # -- what they say ---------------------------------------------------------------------------------

    def listen(self, poll: select.poll) -> None:
        """Have *poll* wait for what they say; their descriptors change as they are closed."""
        now = {fd for machine in self.alive() for fd in machine.fds()}
        if poll is not self._poll:
            self._poll, self._heard = poll, set()
        for fd in self._heard - now:
            poll.unregister(fd)
        for fd in now - self._heard:
            poll.register(fd, select.POLLIN)
        self._heard = now

    def hear(self, fds: set[int] | None = None) -> None:
        """Hear what they say; of a guest that has ended take the last look at its vCPUs, and tell QEMU to quit.

        :param fds: descriptors that are ready; None: whatever is
        """
        if fds is not None and not fds & self._heard:
            return
        for machine in self.alive():
            machine.step()
            self._tell(machine)
            if machine.ended is not None and not machine.must_end:
                self._look_last(machine)
                if machine.ended.failed:
                    self._note(machine.ended.text)
                machine.quit()

    def _tell(self, machine: Machine) -> None:
        for text in machine.news:
            self._note(text)
        machine.news.clear()

    # -- looks -----------------------------------------------------------------------------------------

    def sample(self, members: Sequence[tree.Member]) -> Sampled:
        """Look at all their threads.

        :param members: the VM's processes
        """
        pids: set[int] = set()
        vcpus: list[tuple[evidence.Drift, CpuSet]] = []
        others: list[tuple[evidence.Drift, CpuSet]] = []
        for pid in self._model.machines:
            pids |= {member.pid for member in tree.below(members, pid)}
        for machine in self.alive():
            self._miss_vcpus(machine)
            for record in self._records_of(machine):
                seen = evidence.look(record.pid, record.tid)
                if seen.allowed is not None:  # else it has ended
                    record.update(seen)
                    vcpus += [(drift, record.pin) for drift in record.new_drifts()]
            machine.meet_newcomers(self._model.threads_leave)
            own = tree.below(members, machine.pid)
            seats = {seat.tid for seat in machine.seats}
            others += [
                (drift, machine.kept)
                for drift in evidence.find_drifts(own, machine.kept, seats)
                if drift.what != "ran" or drift.tid not in machine.born  # which may not have run since it was moved
            ]
            self._tell(machine)
        return Sampled(frozenset(pids), tuple(vcpus), tuple(others))

    def _miss_vcpus(self, machine: Machine) -> None:
        for seat in machine.gone():
            if seat.tid not in self._unplugged and not machine.must_end:
                self._unplugged.add(seat.tid)
                machine.breach(f"vCPU {seat.vcpu} is gone: somebody has unplugged it from QEMU (thread {seat.tid})")

    def _records_of(self, machine: Machine) -> list[evidence.VcpuRecord]:
        return [record for record in self._records.values() if record.pid == machine.pid and not record.ended]

    def _look_last(self, machine: Machine) -> None:
        for record in self._records_of(machine):
            seen = evidence.look(record.pid, record.tid)
            if seen.allowed is not None:  # else it has ended, and what was seen of it before is all there is
                record.end(seen, None, None)

    # -- the end ---------------------------------------------------------------------------------------

    def quit(self) -> float | None:
        """Tell those to quit whose guests did not power off in time.

        :return: when they have to be gone (``CLOCK_MONOTONIC``); None where there are none
        """
        late = [machine for machine in self.alive() if not machine.must_end]
        for machine in late:
            self._look_last(machine)
            self._note(f"the guest of QEMU (pid {machine.pid}) did not power off in time; QEMU was told to quit")
            machine.quit()
        return max((machine.must_end for machine in late), default=None)

    def kill_late(self) -> None:
        """Kill those that were told to quit and have not."""
        for machine in self.alive():
            if machine.must_end and time.monotonic() > machine.must_end:
                self._note(f"QEMU (pid {machine.pid}) did not quit in time and was killed")
                os.kill(machine.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Say that QEMU is killed now wherever it still is; no other will have been it."""
        for machine in self.alive():
            machine.must_end = machine.must_end or time.monotonic()

    def ended(self, machine: Machine, status: int, *, started: bool) -> int:
        """Take the end of a QEMU that was reaped with *status*; return the wait status that its vCPUs have by that.

        :param started: whether its guest had run
        """
        machine.step()
        self._tell(machine)
        for record in self._records.values():
            if record.pid == machine.pid:
                record.status = status
        if machine.ended is None and started and not machine.must_end:
            how = (
                f"was killed by signal {os.WTERMSIG(status)}: its guest is gone"
                if os.WIFSIGNALED(status)
                else f"ended of itself, with exit status {os.WEXITSTATUS(status)}"
            )
            self._note(f"QEMU (pid {machine.pid}) {how}")
        return FAILED if machine.ended is not None and machine.ended.failed and not status else status

    def close(self) -> None:
        """Close what is open; all have ended."""
        for machine in self._model.machines.values():
            machine.close()
