"""A real Slurm on this machine: munge, slurmctld and a slurmd on each of a few machines of `tests.support.machines`.

    this process -- sbatch, scontrol --> slurmctld (machine `controller`) --> slurmd on node1, node2, ...

Owns the configuration, the daemons and questions about jobs. Quick where a test would wait: jobs start within a second;
a requeued job would rest for two minutes, `start_now` takes that away. GPUs, cores and memory are declared, not there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.machines import Machine, Network, command, why_no_machines
from tests.support.patience import GUARD_S, wait_until
from trainer.distributed.ports import choose_port

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost=controller({controller})
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
# neither systemd nor cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# more is declared than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# quick reactions
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=10
SlurmdTimeout=30
MessageTimeout=5
TCPTimeout=2
InactiveLimit=0
UnkillableStepTimeout=20
CompleteWait=0
ReturnToService=2
MinJobAge=86400
JobRequeue=1
EnforcePartLimits=ALL
# a job in `urgent` takes the nodes of jobs in `main`, which are queued again
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={names} NodeAddr={addresses} CPUs=8 RealMemory=500000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_no_slurm() -> str:
    """Why no cluster can run here, or ""."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(missing)} not here: apt-get install slurm-wlm munge" if missing else why_no_machines()


class MiniSlurm:
    """A cluster of `num_nodes` nodes with one declared GPU each; `with` starts it and ends every process of it."""

    def __init__(self, num_nodes: int) -> None:
        # munge refuses a socket below a folder that only its owner may enter, and a socket's path is short.
        self.folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
        self.folder.chmod(0o755)
        for name in ("log", "state"):
            (self.folder / name).mkdir()
        self._network = Network(self.folder)
        self.controller = Machine(self._network, "controller", 0)
        self.nodes = {f"node{n}": Machine(self._network, f"node{n}", n) for n in range(1, num_nodes + 1)}
        self._configuration = self.folder / "slurm.conf"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**kept, "SLURM_CONF": str(self._configuration)}

    def __enter__(self) -> MiniSlurm:
        try:
            self._write_files()
            self.controller.start()
            files = ("key-file", "socket", "pid-file", "seed-file", "log-file")
            options = [f"--{kind}={self.folder}/munge.{kind.removesuffix('-file')}" for kind in files]
            self._serve(self.controller, "munged", "-F", *options)
            wait_until("munged serves", (self.folder / "munge.socket").exists)
            self.start_controller(clean=True)
            for name in self.nodes:
                self.boot(name)
            self.wait_for_nodes("idle", *self.nodes)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process, remove the bridge and the files."""
        for machine in (*self.nodes.values(), self.controller):
            machine.power_off()
        self._network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        machines = [self.controller, *self.nodes.values()]
        self._network.write_hosts({machine.name: machine.address for machine in machines})
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        os.mknod(self.folder / "nvidia0", 0o666 | 0o020000, os.makedev(1, 3))  # a GPU's device file, so to speak
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/nvidia0\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._configuration.write_text(
            CONFIGURATION.format(
                controller=self.controller.address,
                port=choose_port(),
                folder=self.folder,
                names=",".join(self.nodes),
                addresses=",".join(node.address for node in self.nodes.values()),
            )
        )

    def _serve(self, machine: Machine, *words: str) -> None:
        machine.start_service(list(words), self.environment, self.folder / "log" / f"{words[0]}-{machine.name}.out")

    # What happens to the cluster.

    def start_controller(self, *, clean: bool = False) -> None:
        """Start slurmctld; `clean` forgets every job."""
        self._serve(self.controller, "slurmctld", "-D", "-f", str(self._configuration), *(["-c"] if clean else []))
        ping = ["scontrol", "ping"]
        wait_until("slurmctld answers", lambda: "is UP" in self.ask(*ping, check=False))

    def stop_controller(self) -> None:
        """Kill slurmctld, without a warning."""
        self._kill_by_file(self.controller, self.folder / "slurmctld.pid")

    def boot(self, name: str) -> None:
        """Switch a node on, with nothing left of what it did before."""
        spool = self.folder / f"spool-{name}"
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        self.nodes[name].start()
        self.start_slurmd(name)

    def start_slurmd(self, name: str) -> None:
        """Start the node's daemon."""
        self._serve(self.nodes[name], "slurmd", "-D", "-N", name, "-f", str(self._configuration))

    def kill_slurmd(self, name: str) -> None:
        """Kill the node's daemon; jobs on it live on."""
        self._kill_by_file(self.nodes[name], self.folder / f"slurmd-{name}.pid")

    def declare_down(self, name: str) -> None:
        """What slurmctld finds out by itself when a node has not answered for SlurmdTimeout."""
        self.ask("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def _kill_by_file(self, machine: Machine, file: Path) -> None:
        number = file.read_text().strip()
        machine.run("kill", f"-{int(signal.SIGKILL)}", number)
        wait_until(f"{file.stem} is dead", lambda: not machine.run("ps", "-o", "args=", "-p", number, check=False))

    def wait_for_nodes(self, state: str, *names: str) -> None:
        """Until slurmctld says so of each of them."""

        def said() -> dict[str, str]:
            lines = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
            return dict(line.split() for line in lines)

        wait_until(f"{names} are {state}", lambda: all(said().get(name) == state for name in names))

    # Jobs.

    def ask(self, *words: str, check: bool = True) -> str:
        """What one of Slurm's commands answers."""
        done = subprocess.run(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Everything that slurmctld knows of a job."""
        told = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", told))

    def wait_for(self, number: str, *states: str) -> dict[str, str]:
        """Until the job is in one of these states; what is known of it then."""
        end_s = time.monotonic() + GUARD_S
        while (found := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end_s, f"job {number} is {found['JobState']} ({found['Reason']}), not {states}"
            time.sleep(0.1)
        return found

    def start_now(self, number: str, restarts: int) -> None:
        """Wait until a job is queued again for so many times, and start it without the usual two minutes' rest."""

        def is_queued() -> bool:
            found = self.job(number)
            return found["JobState"] == "PENDING" and found["Restarts"] == str(restarts)

        wait_until(f"job {number} is queued again", is_queued, every_s=0.1)
        # A node refuses a job in the second in which it ended it: "job credential revoked".
        self.ask("scontrol", "update", f"JobId={number}", "StartTime=now+2")
        self.wait_for(number, "RUNNING", "COMPLETED", "FAILED")

    def processes(self) -> dict[str, list[str]]:
        """What runs on each node that is up, but for Slurm's daemon."""
        alive = {name: machine for name, machine in self.nodes.items() if machine.pid}
        return {
            name: [words for words in machine.processes() if not words.startswith("slurmd ")]
            for name, machine in alive.items()
        }


__all__ = ["MiniSlurm", "command", "wait_until", "why_no_slurm"]
