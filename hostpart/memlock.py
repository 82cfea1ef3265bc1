"""Lock a command's memory into RAM, from outside, between its exec and its first instruction.

mlockall(2) does not survive exec, so the worker cannot do it for the command that it becomes. Instead it lets its
keeper trace it: the kernel stops a traced process at the end of exec, the keeper has it make that one system call,
and lets go of it. A set-uid program that is traced at exec runs without its privilege. Children that the command
forks are not locked.

Source: ptrace(2), "PTRACE_TRACEME", "PTRACE_SINGLESTEP"; mlockall(2), "Notes".
"""

from __future__ import annotations

import os
import signal
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import CDLL

__all__ = ["SUPPORTED", "lock_at_exec"]

# The registers of struct user_regs_struct and the number of the call are x86-64's.
SUPPORTED = os.uname().machine == "x86_64"

_PEEK, _POKE, _CONT, _STEP, _GETREGS, _SETREGS, _DETACH = 1, 4, 7, 9, 12, 13, 17
_REGS = struct.Struct("<27Q")
_RAX, _RDI, _ORIG_RAX, _RIP = 10, 14, 15, 16
_MLOCKALL, _CURRENT_AND_FUTURE = 151, 3
_SYSCALL = 0x050F
_MINUS_ONE = (1 << 64) - 1


def lock_at_exec(pid: int) -> int:
    """Lock the memory of child *pid*, which asked to be traced and is about to exec; return 0 or the errno.

    It returns once the child runs on, or has ended without an exec (0: there is nothing to lock).

    :raises OSError: where the child cannot be traced; it is then killed
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    try:
        if not _until_trap(libc, pid):
            return 0
        before = _registers(libc, pid)
        at = before[_RIP]
        text = _ptrace(libc, _PEEK, pid, at)
        _ptrace(libc, _POKE, pid, at, text & ~0xFFFF & _MINUS_ONE | _SYSCALL)
        during = list(before)
        during[_RAX], during[_RDI], during[_ORIG_RAX] = _MLOCKALL, _CURRENT_AND_FUTURE, _MINUS_ONE
        _set_registers(libc, pid, during)
        _ptrace(libc, _STEP, pid)
        if not _until_trap(libc, pid):
            return 0
        result = _registers(libc, pid)[_RAX]
        _ptrace(libc, _POKE, pid, at, text)
        _set_registers(libc, pid, list(before))
        _ptrace(libc, _DETACH, pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        raise
    return (1 << 64) - result if result > 1 << 63 else 0


def _until_trap(libc: CDLL, pid: int) -> bool:
    # Whether it stopped as meant; False: it ended. Any other signal it was sent is its own and goes on to it.
    while True:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        if found is None or found.si_code not in (os.CLD_TRAPPED, os.CLD_STOPPED):
            return False
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        if found.si_status == signal.SIGTRAP:
            return True
        _ptrace(libc, _CONT, pid, 0, found.si_status)


def _registers(libc: CDLL, pid: int) -> tuple[int, ...]:
    import ctypes

    buffer = ctypes.create_string_buffer(_REGS.size)
    _ptrace(libc, _GETREGS, pid, 0, ctypes.addressof(buffer))
    return _REGS.unpack(buffer.raw)


def _set_registers(libc: CDLL, pid: int, values: list[int]) -> None:
    import ctypes

    buffer = ctypes.create_string_buffer(_REGS.pack(*values), _REGS.size)
    _ptrace(libc, _SETREGS, pid, 0, ctypes.addressof(buffer))


def _ptrace(libc: CDLL, request: int, pid: int, address: int = 0, data: int = 0) -> int:
    import ctypes

    ctypes.set_errno(0)
    result = int(libc.ptrace(request, pid, address, data))
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")
    return result & _MINUS_ONE
