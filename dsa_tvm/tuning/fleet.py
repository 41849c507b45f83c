"""The machines of a fleet that TVM's RPC tracker knows."""

from __future__ import annotations

import reprlib
import socket
import time
from dataclasses import dataclass

from ..errors import ArgumentError, DsaError

#: How long to wait for a tracker and its first server.
WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Remote:
    """A fleet behind a tracker of TVM's RPC.

    Parameters
    ----------
    host : str
    port : int
    key : str
        The key that the servers registered with.
    session_seconds : int
        Time after which a server ends a session by itself, whatever the candidate does.
    """

    host: str
    port: int
    key: str
    session_seconds: int = 120


def parse(address: str, key: str) -> Remote:
    """Parse ``HOST:PORT`` and the key that the servers register with.

    Raises
    ------
    ArgumentError
        The address is not ``HOST:PORT``, or the key is missing.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
        raise ArgumentError(f"tune: rpc: expected HOST:PORT of a tracker, got {reprlib.repr(address)}")
    if not key:
        raise ArgumentError("tune: key: expected the key that the RPC servers were started with, got none")
    return Remote(host, int(port), key)


def count(remote: Remote, seconds: float = WAIT_SECONDS) -> int:
    """The number of servers that are registered with the key, after waiting up to `seconds` for the first.

    Raises
    ------
    DsaError
        No tracker answers, or no server registers in time. The message says what to start.
    """
    deadline = time.monotonic() + seconds
    where = f"{remote.host}:{remote.port}"
    while True:
        try:
            found = _registered(remote)
        except (OSError, RuntimeError) as error:
            problem = (
                f"expected a tracker at {where} within {seconds:.0f} s, got {type(error).__name__}: {error}; "
                f"start one: python -m tvm.exec.rpc_tracker --host {remote.host} --port {remote.port}"
            )
        else:
            if found:
                return found
            problem = (
                f"expected a server with the key {remote.key} at the tracker {where} within {seconds:.0f} s, got none; "
                f"start one on every machine: python -m tvm.exec.rpc_server --tracker {where} --key {remote.key} "
                "--host ADDRESS --port 9500 --port-end 9600, with its ADDRESS in a network that only you reach"
            )
        if time.monotonic() > deadline:
            raise DsaError(f"rpc: {problem}")
        time.sleep(0.5)


def _registered(remote: Remote) -> int:
    # TVM itself would try for a minute to reach a missing tracker.
    socket.create_connection((remote.host, remote.port), timeout=2).close()
    from tvm import rpc

    tracker = rpc.connect_tracker(remote.host, remote.port)
    try:
        servers = tracker.summary()["server_info"]
    finally:
        tracker.close()
    return sum(server["key"] == f"server:{remote.key}" for server in servers)
