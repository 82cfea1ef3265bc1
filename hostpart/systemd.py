"""What hostpart says to systemd: that the guests run, and the unit that launches a scenario at boot."""

from __future__ import annotations

import os

__all__ = ["CONFIG_DIRECTORY", "notify", "unit"]

CONFIG_DIRECTORY = "/etc/hostpart"


def notify(state: str) -> bool:
    """Tell the service manager *state*; whether there is one that listens.

    :param state: lines such as ``READY=1`` and ``STATUS=…``

    Source: sd_notify(3).
    """
    where = os.environ.get("NOTIFY_SOCKET", "")
    if where[:1] not in ("/", "@"):
        return False
    import _socket

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        sock.sendto(state.encode(), "\0" + where[1:] if where[0] == "@" else where)
    except OSError:
        return False  # it listens no more, and has other ways to see what becomes of its service
    finally:
        sock.close()
    return True


def unit(command: str, name: str = "%i") -> str:
    """Return the unit that launches ``/etc/hostpart/NAME.toml``.

    :param command: the hostpart command's absolute path
    :param name: the scenario's; ``%i`` makes it a template, ``hostpart@.service``
    """
    return f"""\
[Unit]
Description=CPU partition {name} (hostpart)
Documentation=man:systemd.resource-control(5)
After=local-fs.target
ConditionPathExists={CONFIG_DIRECTORY}/{name}.toml

[Service]
Type=notify
# What a killed hostpart left, also at boot: nothing is done where there is nothing.
ExecStartPre={command} restore
ExecStart={command} launch {CONFIG_DIRECTORY}/{name}.toml
ExecStopPost={command} restore
# The front ends its guests in order, then puts the host back; only what is left after that is killed.
KillMode=mixed
TimeoutStopSec=60
Restart=no
# 128 and SIGTERM's number: what the front says when it was told to stop, and did.
SuccessExitStatus=143
# A cgroup below this one for each guest, and no controller with it: systemd leaves on what it once switched on.
Delegate=
OOMPolicy=continue
LimitMEMLOCK=infinity

[Install]
WantedBy=multi-user.target
"""
