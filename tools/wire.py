"""A slow network on one machine: namespaces joined by a thread that carries their packets, with a rate and a delay."""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from zo_ds.errors import MachineError

HEADERS = 52
"""Bytes of IP and TCP, time stamps included, in each packet."""
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_ECHO = """
import socket, sys, time, statistics
address, serve = (sys.argv[1], 7), sys.argv[2] == "serve"
if serve:
    with socket.create_server(address) as server:
        print("ready", flush=True)
        peer, _ = server.accept()
        while data := peer.recv(64):
            peer.sendall(data)
else:
    with socket.create_connection(address) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(15):
            begin = time.perf_counter()
            peer.sendall(b"x" * 64)
            peer.recv(64)
            times.append(time.perf_counter() - begin)
    print(statistics.median(times[5:]))
"""


@dataclass(frozen=True)
class Condition:
    """A network, and how many times slower the last rank is made."""

    name: str
    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    slow: float = 1.0


def call(*command: str) -> str:
    """What a command prints.

    Raises:
        MachineError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MachineError("this machine does not let us", where=" ".join(command), why=done.stderr.strip())
    return done.stdout


class Wire(threading.Thread):
    """Carries IP packets between TUN devices; one queue for each sender, as a network card has.

    Args:
        ends: file of each device, by its address as four bytes.
    """

    def __init__(self, ends: dict[bytes, int]) -> None:
        super().__init__(name="wire", daemon=True)
        self._ends = ends
        self.condition = Condition("none")
        self._over = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        on_the_way: list[tuple[float, int, bytes]] = []
        free_at = dict.fromkeys(self._ends.values(), 0.0)
        number = 0
        while not self._over.is_set():
            pause = on_the_way[0][0] - time.monotonic() if on_the_way else 0.2
            ready, _, _ = select.select(list(free_at), [], [], max(0.0, pause))
            for end in ready:
                packet = os.read(end, 65536)
                condition = self.condition
                sent = max(time.monotonic(), free_at[end]) + len(packet) / condition.bytes_per_s
                free_at[end] = sent
                number += 1
                heapq.heappush(on_the_way, (sent + condition.delay_s, number, packet))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                packet = heapq.heappop(on_the_way)[2]
                end_of = self._ends.get(packet[16:20])
                if end_of is not None:
                    with suppress(OSError):  # a device that is not up yet
                        os.write(end_of, packet)

    def stop(self) -> None:
        """Let go of the devices."""
        self._over.set()
        self.join()


class Network:
    """Namespaces with one device each, on a wire; gone when the context is left.

    Args:
        ranks: how many.
    """

    def __init__(self, ranks: int) -> None:
        self.names = [f"zo{os.getpid() % 10**7}n{rank}" for rank in range(ranks)]
        self.addresses = [f"10.213.7.{rank + 1}" for rank in range(ranks)]
        self._files: list[int] = []

    def __enter__(self) -> Network:
        """Make them."""
        try:
            for name, address in zip(self.names, self.addresses, strict=True):
                self._add(name, address)
        except BaseException:
            self._remove()
            raise
        packed = [bytes(map(int, address.split("."))) for address in self.addresses]
        self.wire = Wire(dict(zip(packed, self._files, strict=True)))
        self.wire.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove them."""
        self.wire.stop()
        self._remove()

    def _add(self, name: str, address: str) -> None:
        call("ip", "netns", "add", name)
        file = os.open("/dev/net/tun", os.O_RDWR)
        self._files.append(file)
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        call("ip", "link", "set", name, "netns", name)
        # Without IPv6 an idle device is silent.
        call("ip", "netns", "exec", name, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || :")
        call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", name)
        for device in (name, "lo"):
            call("ip", "-n", name, "link", "set", device, "up")

    def _remove(self) -> None:
        for file in self._files:
            os.close(file)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def within(self, rank: int, *command: str) -> list[str]:
        """A command in a rank's namespace, under a host name of its own."""
        name = self.names[rank]
        named = ["sh", "-c", 'hostname "$0"; exec "$@"', f"node{rank}"]
        return ["ip", "netns", "exec", name, "unshare", "--uts", *named, *command]

    def counted(self) -> list[Counts]:
        """What went over each device so far."""
        found = []
        for name in self.names:
            stats = json.loads(call("ip", "-n", name, "-s", "-j", "link", "show", "dev", name))[0]["stats64"]
            figures = [stats[way][what] for way in ("tx", "rx") for what in ("bytes", "packets")]
            found.append(Counts(time.monotonic(), *figures))
        return found

    def round_trip(self) -> float:
        """Median seconds of 64 bytes there and back over TCP, from the first rank to the last."""
        address, python = self.addresses[-1], sys.executable
        last = len(self.names) - 1
        server = subprocess.Popen(self.within(last, python, "-c", _ECHO, address, "serve"), stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            return float(call(*self.within(0, python, "-c", _ECHO, address, "ask")))
        finally:
            server.kill()
            server.wait()


@dataclass(frozen=True)
class Counts:
    """Bytes and packets at a device since it was made."""

    at: float
    sent: int
    sent_packets: int
    received: int
    received_packets: int

    def since(self, before: Counts, idle: Counts | None, steps: int) -> dict[str, float]:
        """Bytes a step, less what is counted when nothing runs (rates in `idle`)."""
        seconds = self.at - before.at
        found: dict[str, float] = {}
        for way in ("sent", "received"):
            quiet = {key: getattr(idle, key) * seconds if idle else 0.0 for key in (way, f"{way}_packets")}
            count, packets = (getattr(self, key) - getattr(before, key) - quiet[key] for key in quiet)
            found |= {f"wire_{way}": count / steps, f"payload_{way}": (count - HEADERS * packets) / steps}
        return found
