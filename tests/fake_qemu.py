#!/usr/bin/env python3
"""A stand-in for QEMU that speaks QMP over the descriptor it inherits, and misbehaves as the variable FAKE says.

It has a thread for its one vCPU, boots nothing, and takes ``cont``, ``stop``, ``quit`` and the like at their word.
``FAKE`` is the body of a function that is called with each command: what it returns is the answer, None is silence.
"""

import json
import os
import re
import signal  # noqa: F401 - for the test's code
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any


class Fake:
    """What a test's code gets as ``qemu``."""

    def __init__(self) -> None:
        (fd,) = map(int, re.findall(r"id=qmp,fd=(\d+)", " ".join(sys.argv)))
        self.sock = socket.socket(fileno=fd)
        self.running = False
        self.vcpu = self.thread()
        self.heard: list[str] = []

    @staticmethod
    def thread(beside: int = 0) -> int:
        """Start a thread that sleeps, where the thread *beside* is if there is one, and return its number."""
        born: list[int] = []

        def run() -> None:
            if beside:
                os.sched_setaffinity(0, os.sched_getaffinity(beside))
            born.append(threading.get_native_id())
            while True:
                time.sleep(3600)

        threading.Thread(target=run, daemon=True).start()
        while not born:
            time.sleep(0.001)
        return born[0]

    def say(self, message: object) -> None:
        """Send one message."""
        self.sock.sendall(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, **data: object) -> None:
        """Send an event."""
        self.say({"event": name, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}})

    def cpu(self, tid: int, **props: int) -> dict[str, object]:
        """Return a vCPU as ``query-cpus-fast`` lists it."""
        return {"cpu-index": 0, "qom-path": "/cpu", "target": "x86_64", "thread-id": tid, "props": props}

    def usual(self, command: str) -> object:
        """Return what a QEMU in order answers."""
        if command == "query-cpus-fast":
            return [self.cpu(self.vcpu, **{"socket-id": 0, "core-id": 0, "thread-id": 0})]
        if command == "query-status":
            return {"running": self.running, "status": "running" if self.running else "paused", "singlestep": False}
        if command in ("cont", "stop"):
            was, self.running = self.running, command == "cont"
            if was != self.running:
                self.event("RESUME" if self.running else "STOP")
        if command == "quit":
            self.say({"return": {}})
            os._exit(0)
        return {}


def orders(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield the commands that come; they have nothing between them."""
    text = ""
    while part := sock.recv(65536):
        text += part.decode()
        while text := text.lstrip():
            try:
                order, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            yield order


def main() -> None:
    code = os.environ.get("FAKE", "")
    body = "\n".join(f"    {line}" for line in (code or "pass").splitlines())
    space = {name: globals()[name] for name in ("json", "os", "signal", "sys", "threading", "time")}
    exec(f"def answer(qemu, command):\n{body}\n    return qemu.usual(command)\n", space)  # noqa: S102
    answer = space["answer"]
    qemu = Fake()
    if answer(qemu, "born") is None:
        return
    qemu.say({"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}})
    for order in orders(qemu.sock):
        found = answer(qemu, order["execute"])
        if found is not None:
            qemu.say({"return": found, "id": order["id"]} if "id" in order else {"return": found})
    while True:  # as QEMU does without its monitor
        time.sleep(3600)


if __name__ == "__main__":
    main()
