"""A network for each worker: namespaces that a bridge joins, whose links can be shaped."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

LIMIT = 30  # seconds that a command of these may take


def _done(*command: str) -> bool:
    """Whether a command went well."""
    try:
        return subprocess.run(command, capture_output=True, timeout=LIMIT).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def enter() -> list[str] | None:
    """How to run a program as root of networks and mounts of its own; None where that is not allowed."""
    if not all(shutil.which(tool) for tool in ("unshare", "ip", "tc")):
        return None
    for flags in ("-nm", "-rnm"):
        probe = (
            "mount -t tmpfs none /run && mkdir /run/netns && ip link add br0 type bridge && ip netns add probe && "
            "tc qdisc add dev br0 root tbf rate 1gbit burst 64kb latency 200ms"
        )
        if _done("unshare", flags, "sh", "-c", probe):
            return ["unshare", flags]
    return None


def build(workers: int) -> None:
    """Namespaces w0, w1, ... with one interface each, on a bridge; to be called by a program that `enter` started.

    All of it goes when the last process in it ends.
    """
    lines = ["mount -t tmpfs none /run", "mkdir -p /run/netns", "ip link add br0 type bridge", "ip link set br0 up"]
    for i in range(workers):
        lines += [
            f"ip netns add w{i}",
            f"ip link add v{i} type veth peer name eth0 netns w{i}",
            f"ip link set v{i} master br0 up",
            f"ip -n w{i} addr add {address(i)}/24 dev eth0",
            f"ip -n w{i} link set eth0 up",
            f"ip -n w{i} link set lo up",
        ]
    subprocess.run(["sh", "-ec", "\n".join(lines)], check=True, timeout=LIMIT)


def address(worker: int) -> str:
    return f"10.0.0.{worker + 1}"


def sent(interface: str) -> tuple[int, int]:
    """Bytes and packets that this process's network has sent through an interface."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            found = counters.split()
            return int(found[8]), int(found[9])
    raise RuntimeError(f"there is no interface {interface}")


def whole_packets(interface: str, whole: bool) -> None:
    """Whether packets have the size that Ethernet gives them, or the large ones that an interface would cut."""
    segments = "1" if whole else "65535"
    command = ["ip", "link", "set", "dev", interface, "gso_max_segs", segments]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)


def shape(interface: str, gbit: float | None) -> None:
    """Limits what an interface sends; None takes the limit away."""
    subprocess.run(["tc", "qdisc", "del", "dev", interface, "root"], capture_output=True, timeout=LIMIT)
    if gbit is not None:
        # A bucket of tokens that is small beside what a step sends, and large beside what a timer is late.
        tokens = "64kb" if gbit <= 1 else "256kb"
        limit = f"tc qdisc add dev {interface} root tbf rate {gbit:g}gbit burst {tokens} latency 200ms"
        subprocess.run(limit.split(), check=True, capture_output=True, timeout=LIMIT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
