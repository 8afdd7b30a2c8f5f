"""A network for each world: a Linux network namespace that contains only the loopback interface.

Torch's agent listens on loopback and unpickles what it is sent. So any process that can connect to
a rank can run code in it, and anything that is not a pickle ends the rank. In a network namespace
only the ranks of that world can connect. Two worlds that use the same fixed port do not meet.

A small process makes the namespaces (this file, run as a script: :func:`_serve`). It makes the
next one in advance, and passes each on as descriptors. The ranks enter it (:func:`enter`). Only
the maker and the ranks leave the machine's network.

If a process may not make a network namespace by itself, the maker first makes a user namespace
in which it may. User and group keep their numbers there (user_namespaces(7)). A machine may
forbid that; :func:`problem` then says so.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
import subprocess
import sys

#: Real seconds that the maker may take for its first answer; it takes 0.03 on an idle machine.
_START_SECONDS = 15.0
#: Real seconds between two checks whether the process that started the maker still lives.
_PARENT_CHECK_SECONDS = 1.0

_CLONE_NEWNET = 0x40000000
_CLONE_NEWUSER = 0x10000000
# ioctls of netdevice(7), the size of struct ifreq, and the flag of an interface that is up.
_SIOCGIFCONF, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8912, 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_IFREQ_BYTES = 40
_IFF_UP = 1
_MAX_ADDRESSES = 64
_MAY_PASS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
#: _LINUX_CAPABILITY_VERSION_3 of capset(2).
_CAPABILITIES_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class Maker:
    """The process that makes network namespaces; started when the first is asked for.

    Attributes:
        problem: why it cannot make any, in words; empty where it can.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    def start(self) -> None:
        """Start the process now, because it takes a moment and :meth:`take` should not wait."""
        with contextlib.suppress(OSError):
            # The first request will say why.
            self._started()

    def try_out(self) -> str:
        """Make a namespace and drop it; why that is impossible, in words, or an empty string."""
        for descriptor in self.take():
            os.close(descriptor)
        return self.problem

    def take(self) -> list[int]:
        """Descriptors of one more namespace, for :func:`enter`; the caller closes them.

        The list is empty if namespaces cannot be made; :attr:`problem` then says why.

        Raises:
            OSError: this process has no descriptors left for them now; that may pass.
        """
        if self.problem:
            return []
        descriptors, said = self._ask()
        if not descriptors and not said:
            # It made some before, and has been killed since.
            self.close()
            descriptors, said = self._ask()
        if not descriptors:
            self.close()
            why = said or "the process that makes them has died"
            self.problem = f"no network namespace can be made: {why}"
        return descriptors

    def _ask(self) -> tuple[list[int], str]:
        """The descriptors, or the process's message; neither if the process has died."""
        try:
            sock = self._started()
            sock.send(b"+")
            said, descriptors, flags, _ = socket.recv_fds(sock, 1024, 2)
        except TimeoutError:
            return [], f"the process that makes them did not answer within {_START_SECONDS:g} s"
        except ConnectionError:
            return [], ""
        except OSError as error:
            if error.errno in _MAY_PASS:
                raise
            return [], str(error)
        if flags & socket.MSG_CTRUNC:
            # The kernel has dropped descriptors that did not fit into this process's table.
            for descriptor in descriptors:
                os.close(descriptor)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return descriptors, said.decode(errors="replace")

    def _started(self) -> socket.socket:
        if self._sock is not None:
            return self._sock
        ours, theirs = socket.socketpair()
        with theirs:
            ours.settimeout(_START_SECONDS)
            self._sock = ours
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return ours

    def close(self) -> None:
        """End the process; it also exits when this process dies, because its socket closes."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@functools.cache
def problem() -> str:
    """Why worlds cannot have networks of their own here, in words; empty where they can.

    It is tried once, by making one.
    """
    maker = Maker()
    try:
        return maker.try_out()
    finally:
        maker.close()


def enter(descriptors: list[int]) -> None:
    """Move this process, which has one thread, into a namespace that a :class:`Maker` made.

    Closes the descriptors. In a user namespace this process would have all capabilities, so it
    drops them.

    Raises:
        OSError: the kernel refuses.
    """
    *users, network = descriptors
    try:
        for descriptor in users:
            _checked(_libc.setns(descriptor, _CLONE_NEWUSER))
        _checked(_libc.setns(network, _CLONE_NEWNET))
        if users:
            _drop_capabilities()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def loopback_is_up() -> bool:
    """Whether the loopback interface of this process's network is there, and up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _ifreq(b"lo", b""))
        except OSError:
            return False
    return bool(struct.unpack_from("h", answer, 16)[0] & _IFF_UP)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()))


def _ifreq(name: bytes, rest: bytes) -> bytes:
    return struct.pack(f"16s{_IFREQ_BYTES - 16}s", name, rest)


def _ipv4(address: bytes) -> bytes:
    """A sockaddr_in."""
    return struct.pack("=HH4s", socket.AF_INET, 0, address)


def _addresses() -> list[bytes]:
    """The IPv4 addresses of this network that are not loopback's own."""
    found = array.array("B", bytes(_IFREQ_BYTES * _MAX_ADDRESSES))
    address, _ = found.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFCONF, struct.pack("iL", len(found), address))
    (length,) = struct.unpack_from("i", answer)
    data = found.tobytes()[:length]
    addresses = [data[at + 20 : at + 24] for at in range(0, length, _IFREQ_BYTES)]
    return sorted({one for one in addresses if one[0] != 127})


def _bring_up_loopback(addresses: list[bytes]) -> None:
    """Give `addresses` to loopback too: a program that looks up its own host name still works."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = struct.pack("h", _IFF_UP)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _ifreq(b"lo", flags))
        for number, one in enumerate(addresses):
            name = f"lo:{number}".encode()
            fcntl.ioctl(sock, _SIOCSIFADDR, _ifreq(name, _ipv4(one)))
            fcntl.ioctl(sock, _SIOCSIFNETMASK, _ifreq(name, _ipv4(b"\xff\xff\xff\xff")))


def _enter_user_namespace() -> None:
    """Enter a user namespace in which the user and the group keep their numbers."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(_CLONE_NEWUSER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _serve(sock: socket.socket, parent: int) -> None:
    """Pass on one namespace for each byte that arrives."""
    addresses = _addresses()
    users: list[int] = []
    if _libc.unshare(_CLONE_NEWNET) != 0:
        if ctypes.get_errno() != errno.EPERM:
            _checked(-1)
        _enter_user_namespace()
        users.append(os.open("/proc/self/ns/user", os.O_RDONLY))
        _checked(_libc.unshare(_CLONE_NEWNET))
    while True:
        _bring_up_loopback(addresses)
        network = os.open("/proc/self/ns/net", os.O_RDONLY)
        # The namespace made in advance waits here. A fork of the parent may hold the socket open.
        while not select.select([sock], [], [], _PARENT_CHECK_SECONDS)[0]:
            if os.getppid() != parent:
                return
        if not sock.recv(1):
            return
        socket.send_fds(sock, [b"+"], [*users, network])
        os.close(network)
        _checked(_libc.unshare(_CLONE_NEWNET))


def _main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    try:
        _serve(sock, int(sys.argv[2]))
    except ConnectionError:
        return
    except OSError as error:
        sock.send(f"{error.strerror or error}".encode())


if __name__ == "__main__":
    _main()
