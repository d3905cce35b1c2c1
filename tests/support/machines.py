"""Machines that are namespaces: each its own host name, network card, process table and /dev/shm; files are shared.

    Network (a bridge on this machine) -- veth --> Machine (PID, network, UTS, mount and IPC namespace)

Killing a machine's first process is a power cut: the kernel ends every process on it, and nothing is said to anyone.
Nothing outlives the process that made it: the first processes die with it. Needs root, util-linux and iproute2.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.patience import GUARD_S, wait_until

FIRST_PROCESS = r"""
read -r outer _ < /proc/self/stat      # our number as the whole machine sees it
mount -t proc proc /proc
hostname "$1"
mount --bind "$2" /etc/hosts
if [ "$4" = yes ]; then mount -t tmpfs -o mode=1777 tmpfs /dev/shm; fi
echo "$outer" > "$3.tmp" && mv "$3.tmp" "$3"
while :; do sleep 86400 & wait $!; done
"""


def command(*words: str, check: bool = True) -> str:
    """What a command prints; its complaint as an exception."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GUARD_S, check=False)
    assert not check or done.returncode == 0, f"{shlex.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def why_no_machines() -> str:
    """Why this process may not make namespaces and bridges here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    words = "mount -t proc proc /proc; ip link add sltry type bridge && ip link del sltry"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--uts", "--mount", "--ipc", "--fork", "sh", "-c", words],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()[:200]}"


@dataclass
class Network:
    """A bridge `10.231.N.0/24`; address .1 is this machine's. Left-over bridges of ended processes are removed."""

    folder: Path
    """For the hosts file and the machines' numbers; shared by all."""
    name: str = field(default_factory=lambda: f"sl{os.getpid()}")

    def __post_init__(self) -> None:
        self._remove_left_over()
        used = command("ip", "-o", "-4", "addr")
        first = os.getpid() % 249  # two that start at once do not take the same
        numbers = [(first + n) % 249 + 1 for n in range(249)]
        self.prefix = next(f"10.231.{n}" for n in numbers if f" 10.231.{n}.1/" not in used)
        command("ip", "link", "add", self.name, "type", "bridge", "forward_delay", "0")
        command("ip", "addr", "add", f"{self.prefix}.1/24", "dev", self.name)
        command("ip", "link", "set", self.name, "up")
        self.hosts = self.folder / "hosts"

    def write_hosts(self, addresses: dict[str, str]) -> None:
        """Names of all machines. torch's store listens on IPv6 and looks clients up as mapped addresses."""
        lines = [f"{address} {name}\n::ffff:{address} {name}\n" for name, address in addresses.items()]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))

    def close(self) -> None:
        """Take the bridge away."""
        command("ip", "link", "del", self.name, check=False)

    def _remove_left_over(self) -> None:
        for line in command("ip", "-o", "link", "show", "type", "bridge").splitlines():
            name = line.split(":")[1].strip()
            if name.startswith("sl") and name[2:].isdigit() and not Path(f"/proc/{name[2:]}").exists():
                command("ip", "link", "del", name, check=False)


@dataclass
class Machine:
    """One of them. `number` is 0 for the one that shares this machine's network (the controller), else 1, 2, ..."""

    network: Network
    name: str
    number: int
    _parent: subprocess.Popen[bytes] | None = None
    pid: int = 0

    @property
    def address(self) -> str:
        """On the bridge."""
        return f"{self.network.prefix}.{10 + self.number if self.number else 1}"

    @property
    def _card(self) -> str:
        return f"{self.network.name}n{self.number}"

    def start(self) -> None:
        """Power on: namespaces and the network card; no service runs yet."""
        told = self.network.folder / f"{self.name}.pid"
        told.unlink(missing_ok=True)
        own_network = ["--net"] if self.number else []
        self._parent = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--uts", "--mount", "--ipc", *own_network, "--fork",
             "--kill-child", "bash", "-c", FIRST_PROCESS, "first", self.name, str(self.network.hosts), str(told),
             "yes" if self.number else "no"],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip
        wait_until(f"{self.name} is up", told.exists, every_s=0.005)
        self.pid = int(told.read_text())
        if self.number:
            self._plug_in()

    def _plug_in(self) -> None:
        command("ip", "link", "add", self._card, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        command("ip", "link", "set", self._card, "master", self.network.name, "up")
        # A fixed hardware address: the others remember the one that the machine had before it was switched off.
        address = f"02:53:4c:00:00:{self.number:02x}"
        self.run(
            "sh", "-c",
            f"ip link set lo up && ip link set eth0 address {address} && ip addr add {self.address}/24 dev eth0"
            " && ip link set eth0 up",
        )  # fmt: skip

    def run(self, *words: str, check: bool = True) -> str:
        """What a command prints on this machine."""
        return command("nsenter", "-t", str(self.pid), "-a", "--", *words, check=check)

    def start_service(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        """A daemon whose parent is the machine's first process."""
        line = f"setsid {shlex.join(words)} </dev/null >>{shlex.quote(str(log))} 2>&1 &"
        subprocess.run(
            ["nsenter", "-t", str(self.pid), "-a", "--", "bash", "-c", line],
            env=environment,
            check=True,
            timeout=GUARD_S,
        )

    def processes(self) -> list[str]:
        """Command lines of what runs here, the first process and its sleep left out."""
        lines = self.run("ps", "-e", "-o", "stat=,args=").splitlines()
        own = ("sleep 86400", "ps -e", FIRST_PROCESS.strip()[:20])
        found = [line.split(None, 1)[1] for line in lines if not line.startswith("Z") and len(line.split(None, 1)) == 2]
        return [words for words in found if not words.startswith("bash -c") and not any(part in words for part in own)]

    def power_off(self) -> None:
        """Every process ends at once."""
        if not self.pid:
            return
        os.kill(self.pid, signal.SIGKILL)
        self.pid = 0
        if self._parent is not None:
            self._parent.wait(20)
        if self.number:  # a namespace and its card may outlive the last process by seconds
            command("ip", "link", "del", self._card, check=False)

    def link(self, state: str) -> None:
        """Pull ("down") or plug ("up") the network cable."""
        command("ip", "link", "set", self._card, state)
