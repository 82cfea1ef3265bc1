"""What a lab's scheduler says of its workers, asked from where its clients are.

Run by its path with the scheduler's address; the certificates come by Dask's environment. Each line of its standard
input is a question, each line of its output the answer, JSON: ``{"workers": {name: ...}}`` or ``{"error": why}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from distributed.core import rpc
from distributed.security import Security

__all__ = ["main"]

_LIMIT_S = 5.0


async def _workers(address: str) -> dict[str, Any]:
    async with rpc(address, connection_args=Security().get_connection_args("client")) as scheduler:
        said = await asyncio.wait_for(scheduler.identity(n_workers=-1), _LIMIT_S)
    return {
        str(worker["name"]): {
            "address": where,
            "status": worker["status"],
            "resources": worker["resources"],
            "hostpart": worker.get("hostpart"),
            "metrics": worker["metrics"].get("hostpart"),
        }
        for where, worker in said["workers"].items()
    }


async def _serve(address: str) -> None:
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer: dict[str, Any] = {"workers": await asyncio.wait_for(_workers(address), _LIMIT_S)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def main() -> None:
    """See the module; ends with its standard input."""
    asyncio.run(_serve(sys.argv[1]))


if __name__ == "__main__":
    main()
