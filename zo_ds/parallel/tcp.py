"""The channel over TCP: every rank has a connection to every other one, and an exchange is one hop.

gloo asks the receiver whether it is ready before it sends, so that each of its exchanges takes a round trip.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from contextlib import suppress
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from zo_ds.errors import MachineError, PeerError
from zo_ds.parallel.channel import Seat, gone

_HEAD = struct.Struct("<Q")
_GREETING = struct.Struct("<8sQ")
_MAGIC = b"zo_ds-01"
_GREETING_S = 5.0


class TCPChannel:
    """Ranks of a launched job, which find each other through a store at MASTER_ADDR:MASTER_PORT.

    Args:
        seat: of this process.
        timeout_s: after how long a silent peer counts as dead.

    Raises:
        MachineError: rank 0 cannot open the port.
        PeerError: the other ranks did not join in time.
    """

    def __init__(self, seat: Seat, timeout_s: float) -> None:
        self.rank, self.world_size = seat.rank, seat.world_size
        self.local_rank, self.local_world_size = seat.local_rank, seat.local_world_size
        self.sent = 0
        self._timeout_s = timeout_s
        self._peers: dict[int, socket.socket] = {}
        try:
            self._join(seat, *_meeting_place(seat, timeout_s))
        except (RuntimeError, OSError) as error:
            self._hang_up()
            raise join_error(error, seat, timeout_s) from error

    def _join(self, seat: Seat, store: TCPStore, number: int) -> None:
        """Connect to the ranks before this one, and be called by those after it."""
        deadline = time.monotonic() + self._timeout_s
        family, _, _, _, rank_0 = socket.getaddrinfo(seat.address, seat.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the system tells which of this host's addresses leads to rank 0.
            probe.connect(rank_0)
            host = probe.getsockname()[0]
        with socket.create_server((host, 0), family=family, backlog=self.world_size) as listener:
            store.set(f"zo_ds/{number}/{self.rank}", f"{host}:{listener.getsockname()[1]}")
            for other in range(self.rank):
                name, _, port = store.get(f"zo_ds/{number}/{other}").decode().rpartition(":")
                peer = socket.create_connection((name, int(port)), self._timeout_s)
                peer.sendall(_GREETING.pack(_MAGIC, self.rank))
                self._keep(other, peer)
            while len(self._peers) < self.world_size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                peer, _ = listener.accept()
                other = _greeted(peer)
                if self.rank < other < self.world_size:
                    self._keep(other, peer)
                else:
                    peer.close()  # somebody else who knocked at the port

    def _keep(self, other: int, peer: socket.socket) -> None:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer.setblocking(False)
        self._peers[other] = peer

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The CPU tensor of every rank, in rank order.

        Raises:
            PeerError: a rank died, stayed silent for the time-out, or is at another exchange.
        """
        own = values.contiguous()
        raw = own.view(-1).view(torch.uint8).numpy().tobytes() if own.numel() else b""
        received = self._exchange(dict.fromkeys(self._peers, raw), dict.fromkeys(self._peers, len(raw)))
        gathered = []
        for rank in range(self.world_size):
            got = raw if rank == self.rank else received[rank]
            empty = own.new_empty(0)
            flat = torch.frombuffer(bytearray(got), dtype=torch.uint8).view(own.dtype) if got else empty
            gathered.append(flat.view(own.shape))
        return gathered

    def broadcast(self, payload: bytes) -> bytes:
        """Rank 0's bytes.

        Raises:
            PeerError: see `all_gather`.
        """
        size = int(self.all_gather(torch.tensor([len(payload)]))[0])
        if self.rank == 0:
            self._exchange(dict.fromkeys(self._peers, payload), {})
            return payload
        return self._exchange({}, {0: size})[0]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1))

    def close(self) -> None:
        """Leave once every rank is done."""
        self.barrier()
        self._hang_up()

    def _exchange(self, out: dict[int, bytes], wanted: dict[int, int]) -> dict[int, bytes]:
        """Send to some ranks and hear from some, all at once; both may be more than the system buffers."""
        left = {rank: memoryview(_HEAD.pack(len(data)) + data) for rank, data in out.items()}
        buffers = {rank: bytearray(_HEAD.size + size) for rank, size in wanted.items()}
        missing = {rank: memoryview(buffer) for rank, buffer in buffers.items()}
        self.sent += sum(map(len, out.values()))
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            for rank in left.keys() | missing.keys():
                selector.register(self._peers[rank], _events(rank, left, missing), rank)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise self._gone(min(left.keys() | missing.keys()), f"no word for {self._timeout_s:g} s")
                for key, events in ready:
                    self._move(key.data, events, left, missing)
                    now = _events(key.data, left, missing)
                    if not now:
                        selector.unregister(key.fileobj)
                    elif now != key.events:
                        selector.modify(key.fileobj, now, key.data)
        for rank, buffer in buffers.items():
            (size,) = _HEAD.unpack_from(buffer)
            if size != wanted[rank]:
                raise self._gone(rank, f"it is at another exchange: {size} bytes for {wanted[rank]}")
        return {rank: bytes(buffer[_HEAD.size :]) for rank, buffer in buffers.items()}

    def _move(self, rank: int, events: int, left: dict[int, memoryview], missing: dict[int, memoryview]) -> None:
        """Send and receive what the system takes and has."""
        peer = self._peers[rank]
        try:
            if events & selectors.EVENT_WRITE and rank in left:
                left[rank] = left[rank][peer.send(left[rank]) :]
            if events & selectors.EVENT_READ and rank in missing:
                got = peer.recv_into(missing[rank])
                if not got:
                    raise self._gone(rank, "it closed the connection")
                missing[rank] = missing[rank][got:]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise self._gone(rank, error.strerror or str(error)) from error
        for waiting in (left, missing):
            if rank in waiting and not len(waiting[rank]):
                del waiting[rank]

    def _gone(self, rank: int, why: str) -> PeerError:
        return gone(f"rank {self.rank} of {self.world_size}, about rank {rank}", why)

    def _hang_up(self) -> None:
        for peer in self._peers.values():
            with suppress(OSError):
                peer.close()
        self._peers.clear()


_places: dict[tuple[str, int, int], tuple[TCPStore, int]] = {}
"""Stores that this process has opened, and how many channels met there: a second must not read the first's ports."""


def _meeting_place(seat: Seat, timeout_s: float) -> tuple[TCPStore, int]:
    """The store at which ranks tell their ports, and how many channels of this process have met there before."""
    key = (seat.address, seat.port, seat.rank)
    if key in _places:
        store, before = _places[key]
        store.set_timeout(timedelta(seconds=timeout_s))
    else:
        timeout = timedelta(seconds=timeout_s)
        store, before = TCPStore(seat.address, seat.port, seat.world_size, seat.serve, timeout), -1
    _places[key] = store, before + 1
    return _places[key]


def _events(rank: int, left: dict[int, memoryview], missing: dict[int, memoryview]) -> int:
    return (selectors.EVENT_WRITE if rank in left else 0) | (selectors.EVENT_READ if rank in missing else 0)


def _greeted(peer: socket.socket) -> int:
    """The rank that has just connected, -1 if it does not say so at once."""
    peer.settimeout(_GREETING_S)
    raw = b""
    with suppress(OSError):
        while len(raw) < _GREETING.size and (got := peer.recv(_GREETING.size - len(raw))):
            raw += got
    magic, rank = _GREETING.unpack(raw.ljust(_GREETING.size, b"\0"))
    return int(rank) if magic == _MAGIC else -1


def join_error(error: Exception, seat: Seat, timeout_s: float) -> MachineError | PeerError:
    """Why ranks could not find each other through the store at this address."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return MachineError(
            f"port {seat.port} is taken",
            where=f"MASTER_PORT={seat.port} on {seat.address}",
            why=reason,
            remedy=f"choose another one: deepspeed --master_port {seat.port + 1} ... (or torchrun --master_port)",
        )
    return PeerError(
        f"the ranks did not find each other within {timeout_s:g} s",
        where=f"rank {seat.rank}, MASTER_ADDR={seat.address} MASTER_PORT={seat.port}",
        why=reason,
        remedy="check that every rank was started and that the address is reachable from all nodes",
    )
