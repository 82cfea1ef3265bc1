"""Which accelerator QEMU really has here: KVM where a guest runs under it, else its own emulation (TCG).

That ``/dev/kvm`` is there says little: in a virtual machine it may be one that lets QEMU start and then stops the
guest at its first SSE instruction. So QEMU itself is asked, with the machine and the processor that the guest is to
have, to run a firmware that ends it within milliseconds (:mod:`hostpart.qemu.trial`). What costs nothing is
looked at first: the architecture, the device, its API version. The answer is kept in the runtime directory, for this
boot, this QEMU and this device.

There is a firmware for x86_64 only. On other machines KVM counts as working where it makes a VM with a vCPU.

What else is on QEMU's command line is left to others.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from binascii import crc32

from ..errors import Failed, HostpartError, NotPermitted, as_root
from ..host import Host
from ..ledger import boot_id, runtime_directory
from ..value import Value
from . import firmware, kept
from .trial import Trial, attempt, attempt_ioctls

__all__ = ["KVM_DEVICE", "Accelerator", "choose", "find"]

KVM_DEVICE = "/dev/kvm"

_ARGUMENTS = {"kvm": "kvm", "tcg": "tcg,thread=multi"}
# Of uname(2)'s machines, what QEMU calls those whose names differ.
_TARGETS = {"i686": "i386", "i586": "i386", "armv7l": "arm", "armv8l": "arm", "ppc64le": "ppc64"}
_KVM_GET_API_VERSION = 0xAE00  # include/uapi/linux/kvm.h
_API_VERSION = 12  # "applications should refuse to run if it is not 12": Documentation/virt/kvm/api.rst, 4.1

_CACHE_VERSION = "1"


class Accelerator(Value):
    """What runs the guest's processors.

    :ivar name: ``kvm`` or ``tcg``
    :ivar why: where KVM would have been taken if it worked, a sentence's middle on why it is not; else empty
    :ivar argument: what follows ``-accel`` on QEMU's command line
    """

    name: str
    why: str
    argument: str


def choose(
    wanted: str, binary: str, *, machine: str, cpu: str, limit_s: float = 3.0, device: str = KVM_DEVICE
) -> Accelerator:
    """Return what *binary* is to run a guest with: KVM, if it is wanted and works here, or TCG.

    A process is forked, in a session of its own, and has ended when this returns, unless the kernel does not
    let it go; the caller may have one thread only. It takes *limit_s* and two seconds at most. The caller's files,
    signals and output are left alone.

    :param wanted: ``auto`` takes KVM if it works; ``kvm`` insists on it; ``tcg`` looks for the binary only
    :param binary: QEMU's path, or a name to look for in ``$PATH``
    :param machine: for ``-machine``; options that name another object (``memory-backend=``) are to be left out
    :param cpu: for ``-cpu``, with its flags; where TCG comes out of it, ``host`` is no CPU that it has
    :param limit_s: seconds that the firmware may take
    :param device: the kernel's interface; QEMU opens ``/dev/kvm`` whatever is said here
    :raises NotPermitted: where KVM is insisted on and *device* may not be opened
    :raises Failed: where KVM is insisted on and does not work, or where there is no such binary, whatever is wanted
    :raises ValueError: for another *wanted*
    """
    if wanted not in ("auto", "kvm", "tcg"):
        raise ValueError(f"no accelerator is named {wanted!r}")
    path = find(binary)
    if wanted == "tcg":
        return Accelerator("tcg", "", _ARGUMENTS["tcg"])
    try:
        _check(path, machine, cpu, limit_s, device, believe_failure=wanted == "auto")
    except HostpartError as error:
        if wanted == "kvm":
            raise
        return Accelerator("tcg", str(error), _ARGUMENTS["tcg"])
    return Accelerator("kvm", "", _ARGUMENTS["kvm"])


# -- looking, what costs least first -------------------------------------------------------------------


# Raises what is in the way of KVM.
def _check(path: str, machine: str, cpu: str, limit_s: float, device: str, *, believe_failure: bool) -> None:
    host = os.uname().machine
    own = _TARGETS.get(host, host)
    name = os.path.basename(path)
    target = name.removeprefix("qemu-system-")
    if target not in (name, own):  # a QEMU of another name, such as qemu-kvm, says itself what it can
        raise Failed(
            f"{name} runs guests of another architecture ({target}) than this machine's ({host}), which KVM cannot",
            f'set accelerator = "tcg", or take qemu-system-{own} for a guest of this machine\'s architecture',
        )
    _ask_device(device)
    try:
        binary, node = os.stat(path), os.stat(device)
    except OSError as error:  # it was there a moment ago
        raise Failed(f"{error.filename} cannot be looked at: {error.strerror}", "run it again") from None
    key = (
        _CACHE_VERSION,
        boot_id(),
        f"{path} {binary.st_ino} {binary.st_mtime_ns} {binary.st_size}",
        f"{device} {node.st_ino} {node.st_ctime_ns}",  # made anew when the module is loaded again
        machine,
        cpu,
        f"{crc32(firmware.image()):x}",
    )
    trial = _recall(key)
    if trial is None or (not trial.works and not believe_failure):
        if own == "x86_64":
            trial = attempt(path, _ARGUMENTS["kvm"], machine=machine, cpu=cpu, limit_s=limit_s)
        else:
            trial = attempt_ioctls(device, limit_s)
        if trial.lasts_s:
            _remember(key, trial)
    if not trial.works:
        raise Failed(f"KVM does not work here with machine {machine} and CPU {cpu}: {trial.seen}", _remedy(device))


def find(binary: str) -> str:
    """Return the path of *binary*, which is one, or a name to look for in ``$PATH``.

    :raises Failed: where there is none that may be executed
    """
    folders = os.get_exec_path() if "/" not in binary else [""]
    reason = "there is no such file" if "/" in binary else "it is in no folder of $PATH"
    for folder in folders:
        path = os.path.join(folder, binary)
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                reason = f"{path} cannot be looked at ({error.strerror})"
            continue
        if stat.S_ISREG(mode) and os.access(path, os.X_OK):
            return os.path.abspath(path)
        reason = f"{path} may not be executed by you" if stat.S_ISREG(mode) else f"{path} is no file"
    raise Failed(
        f"QEMU ({binary}) cannot be started: {reason}",
        "install it ('sudo apt install qemu-system-x86', 'sudo dnf install qemu-kvm'), or name another one",
    )


def _ask_device(device: str) -> None:
    import fcntl

    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotPermitted(
                f"{device} may not be opened by {_user()} ({error.strerror}): {_owners(device)}", _access(device, error)
            ) from None
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise Failed(f"there is no {device} ({error.strerror})", _remedy(device)) from None
        raise Failed(f"{device} cannot be opened ({error.strerror})", _remedy(device)) from None
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        raise Failed(f"{device} does not answer as KVM does ({error.strerror})", _remedy(device)) from None
    finally:
        os.close(fd)
    if version != _API_VERSION:
        raise Failed(f"{device} has version {version} of KVM's interface, not {_API_VERSION}", _remedy(device))


# -- words ---------------------------------------------------------------------------------------------


def _user() -> str:
    import pwd

    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _owners(device: str) -> str:
    try:
        found = os.stat(device)
    except OSError:
        return "its owner cannot be seen either"
    return f"its mode is {found.st_mode & 0o777:04o}, its owner uid {found.st_uid}, its group {_group(found.st_gid)}"


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


def _access(device: str, error: OSError) -> str:
    if error.errno == errno.EPERM:  # root gets it too: a cgroup's device list
        return f'give this container the device (docker run --device {device}), or set accelerator = "tcg"'
    try:
        found = os.stat(device)
    except OSError:
        return as_root()
    # Being in a group helps only where the group may read and write, and root's is nobody's to join.
    if found.st_mode & 0o060 == 0o060 and found.st_gid:
        return f'sudo usermod -aG {_group(found.st_gid)} {_user()}, and log in again; or set accelerator = "tcg"'
    return f'run as root: {as_root()}; or set accelerator = "tcg"'


# What has to be there for KVM, by what the processor says of itself.
def _remedy(device: str) -> str:
    try:
        text = Host().read_text("proc/cpuinfo")
    except OSError:
        text = ""
    flags = set(text.partition("\nflags")[2].partition("\n")[0].split())
    nested = "nested virtualization in the host of this virtual machine (kvm_intel or kvm_amd with nested=1)"
    virtual = "hypervisor" in flags
    if not os.path.exists(device) and flags & {"vmx", "svm"}:
        module = "kvm_intel" if "vmx" in flags else "kvm_amd"
        way = f"load the module: 'sudo modprobe {module}', and if that fails see 'sudo dmesg | grep -i kvm'"
    elif flags & {"vmx", "svm"}:
        way = f"see 'sudo dmesg | grep -i kvm'{f', and have {nested} looked at' if virtual else ''}"
    elif virtual:
        way = f"have {nested} enabled"
    elif flags:
        way = "enable virtualization (VT-x, AMD-V, SVM) in the firmware's setup (BIOS)"
    else:
        way = "see 'sudo dmesg | grep -i kvm'"
    return f'set accelerator = "tcg"; or, for KVM, {way}'


# -- the answer kept -----------------------------------------------------------------------------------
#
# One file for each QEMU, machine and CPU: fields ended by null bytes, which no path and no argument can have. What is
# not what was asked is looked at anew.


def _cache_file(key: tuple[str, ...]) -> str:
    what = "\0".join((key[2].split(" ", 1)[0], *key[4:6])).encode(errors="surrogateescape")
    return os.path.join(runtime_directory(), f"accelerator-{crc32(what):08x}")


def _recall(key: tuple[str, ...]) -> Trial | None:
    try:
        content = kept.read(_cache_file(key))
    except HostpartError:  # whoever needs the runtime directory says what is wrong with it
        return None
    if content is None:
        return None
    fields = bytes(content).decode(errors="surrogateescape").split("\0")
    if len(fields) != len(key) + 4 or tuple(fields[: len(key)]) != key:
        return None
    works, until, seen, _ = fields[len(key) :]
    left_s = float(until) - time.clock_gettime(time.CLOCK_BOOTTIME)
    return Trial(works == "works", seen, left_s) if left_s > 0 else None


def _remember(key: tuple[str, ...], trial: Trial) -> None:
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + trial.lasts_s
    fields = (*key, "works" if trial.works else "fails", f"{until:.0f}", trial.seen)
    try:
        kept.write(_cache_file(key), "".join(f"{field}\0" for field in fields).encode(errors="surrogateescape"))
    except HostpartError:  # as above
        pass
