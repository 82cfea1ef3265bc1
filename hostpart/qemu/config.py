"""What ``[vm.qemu]`` says: the machine that a guest operating system gets, and what it boots.

Whether the files, the program and the accelerator are there is for :mod:`hostpart.qemu.machine` to say, at the launch.
"""

from __future__ import annotations

from ..toml_table import one_of, read_argv, read_flag, read_number, read_text, shown
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..toml_table import Table

__all__ = [
    "ACCELERATORS",
    "CONSOLES",
    "MAX_POWERDOWN_S",
    "REBOOTS",
    "TOPOLOGIES",
    "Disk",
    "QemuGuest",
    "read",
    "read_machine",
]

ACCELERATORS = ("auto", "kvm", "tcg")
TOPOLOGIES = ("mirror", "flat")
CONSOLES = ("stdio", "none", "file:PATH", "unix:PATH")
REBOOTS = ("restart", "end")
MAX_POWERDOWN_S = 86_400.0
_FORMATS = {"qcow2": "qcow2", "img": "raw", "raw": "raw", "iso": "raw", "vmdk": "vmdk", "vdi": "vdi", "vhdx": "vhdx"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LEAST_BYTES = 16 << 20  # a kernel that boots in less is not known
_BUILT_IN = "console=ttyS0 quiet panic=-1"  # a panic of it is a reset, which ends the VM


class Disk(Value):
    """One disk of a guest.

    :ivar format: as QEMU names it
    """

    path: str
    format: str
    readonly: bool = False


class QemuGuest(Value):
    """A machine under QEMU and what it boots.

    :ivar kernel: a file for QEMU's ``-kernel``; ``"host"``: this host's own; empty: the machine boots from its disks
    :ivar run: what the built-in guest runs, as text for its shell, in place of an *initrd*; None: there is none
    :ivar append: the kernel's command line
    :ivar memory_bytes: of the machine
    :ivar machine: QEMU's machine type; empty: ``q35``, or ``virt`` where that is none
    :ivar cpu: QEMU's CPU model; empty: what comes nearest to the host's
    :ivar accelerator: one of :data:`ACCELERATORS`
    :ivar topology: one of :data:`TOPOLOGIES`
    :ivar console: ``stdio``, ``none``, ``file:PATH`` or ``unix:PATH``
    :ivar output: the file that gets what the built-in guest's command writes to its standard output, byte by byte;
        empty: that goes to the console
    :ivar on_reboot: one of :data:`REBOOTS`
    :ivar powerdown_s: how long the guest has to power off when it is to stop
    :ivar binary: QEMU's program; empty: ``qemu-system-`` and this machine's architecture
    :ivar args: more of QEMU's arguments, after hostpart's own
    """

    kernel: str = ""
    initrd: str = ""
    run: str | None = None
    append: str = ""
    disks: tuple[Disk, ...] = ()
    memory_bytes: int = 256 << 20
    machine: str = ""
    cpu: str = ""
    accelerator: str = "auto"
    topology: str = "mirror"
    console: str = "stdio"
    output: str = ""
    on_reboot: str = "restart"
    powerdown_s: float = 30.0
    binary: str = ""
    args: tuple[str, ...] = ()


def read(table: Table) -> QemuGuest:
    """Return what *table* says; its faults are noted in it."""
    run = table.read("run", _run, None)
    default = QemuGuest(kernel="host", append=_BUILT_IN, on_reboot="end") if run is not None else QemuGuest()
    guest = QemuGuest(
        kernel=table.read("kernel", read_text, default.kernel),
        initrd=table.read("initrd", read_text, ""),
        run=run,
        append=table.read("append", read_text, default.append),
        disks=table.read("disks", _disks, ()),
        memory_bytes=table.read("memory", _memory, default.memory_bytes),
        machine=table.read("machine", read_text, ""),
        cpu=table.read("cpu", read_text, ""),
        accelerator=table.read("accelerator", one_of(ACCELERATORS), default.accelerator),
        topology=table.read("topology", one_of(TOPOLOGIES), default.topology),
        console=table.read("console", _console, default.console),
        output=table.read("output", read_text, ""),
        on_reboot=table.read("on_reboot", one_of(REBOOTS), default.on_reboot),
        powerdown_s=table.read("powerdown", lambda value: read_number(value, 0, MAX_POWERDOWN_S), default.powerdown_s),
        binary=table.read("binary", read_text, ""),
        args=table.read("args", read_argv, ()),
    )
    if not guest.kernel and not guest.disks and not table.faults.found:
        table.fault(
            None, "want something to boot: kernel = FILE, disks = [FILE], or run = COMMAND for the built-in guest"
        )
    if run is not None and guest.initrd:
        table.fault("run", "is for the built-in guest, which has an initrd of its own; leave initrd out")
    if guest.output and run is None:
        table.fault("output", "is of the built-in guest's command, and there is none: run is missing")
    for key in ("initrd", "append"):
        if getattr(guest, key) and not guest.kernel:
            table.fault(key, "is for a kernel, and none is given")
    table.refuse_others()
    return guest


def read_machine(table: Table, run: str, output: str) -> QemuGuest:
    """Return a built-in guest for somebody who says himself what it runs; *table* has the machine.

    :param output: as :attr:`QemuGuest.output`
    """
    for key, of in (
        ("run", "what runs"),
        ("initrd", "what boots"),
        ("console", "its console"),
        ("output", "its output"),
    ):
        if table.take(key) is not None:
            table.fault(key, f"is not for this place: {of} is said already")
    table.rest["run"] = run
    return read(table).replace(console="none", output=output)


def _run(value: object) -> str:
    if isinstance(value, str):
        return read_text(value)
    import shlex

    return shlex.join(read_argv(value))


def _memory(value: object) -> int:
    text = value if isinstance(value, str) else ""
    number, unit = text.rstrip("KMGT"), text[len(text.rstrip("KMGT")) :]
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and unit in _UNITS):
        raise ValueError(f'want a size such as "512M" or "2G", got {shown(value)}')
    size = int(number) * _UNITS[unit]
    if not _LEAST_BYTES <= size <= 1 << 46 or size % (1 << 20):
        raise ValueError(f"want whole megabytes, {_LEAST_BYTES >> 20}M or more, got {shown(value)}")
    return size


def _console(value: object) -> str:
    text = read_text(value)
    kind, colon, path = text.partition(":")
    if text in ("stdio", "none") or (colon and path and kind in ("file", "unix")):
        return text
    raise ValueError(f"want one of {', '.join(CONSOLES)}, got {shown(value)}")


def _disks(value: object) -> tuple[Disk, ...]:
    if not isinstance(value, list):
        raise ValueError(
            f'want a list of files, or of tables such as {{ path = "a.img", format = "raw" }}, got {shown(value)}'
        )
    return tuple(_disk(one, place) for place, one in enumerate(value))


def _disk(value: object, place: int) -> Disk:
    table = {"path": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not set(table) <= {"path", "format", "readonly"}:
        raise ValueError(f"want a file, or a table of path, format and readonly, got {shown(value)} in place {place}")
    path = read_text(table.get("path"))
    # Not by its content: that is the guest's to write, and what looked like another format could name any file.
    known = _FORMATS.get(path.rpartition(".")[2].lower(), "")
    given = table.get("format", known)
    if not isinstance(given, str) or not given:
        raise ValueError(f'{shown(path)} does not say its format: want {{ path = {shown(path)}, format = "raw" }}')
    return Disk(path, given, read_flag(table.get("readonly", False)))
