"""A real Slurm on this machine for tests: slurmctld, and two slurmd that say that each is a machine with a GPU."""

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.s3_server import free_ports

NODES = ("n1", "n2")
START_S = 60
# `config_overrides`: Slurm believes what is written here, not what the machine has. Nothing limits or binds a job.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,bf_interval=1
PartitionName=spot Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 State=UP
PartitionName=urgent Nodes={nodes} PriorityTier=10 PreemptMode=OFF State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=262144 Gres=gpu:8 State=UNKNOWN"


@contextlib.contextmanager
def slurm_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run Slurm while the block runs; give the environment in which `sbatch` and `squeue` reach it. Skip where there is none."""
    programs = {
        name: shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") for name in ("slurmctld", "slurmd")
    }
    if not all(programs.values()) or os.geteuid() != 0:
        pytest.skip("no Slurm that this user may start: as root, apt-get install slurm-wlm")
    host, (port, *ports) = socket.gethostname().split(".")[0], free_ports(1 + len(NODES))
    config = CONFIG.format(host=host, port=port, folder=folder, nodes=",".join(NODES))
    config += "\n".join(NODE.format(name=name, host=host, port=each) for name, each in zip(NODES, ports, strict=True))
    (folder / "slurm.conf").write_text(f"{config}\n")
    (folder / "gres.conf").write_text("".join(f"NodeName={name} Name=gpu File={folder}/gpu[0-7]\n" for name in NODES))
    for name in (*NODES, "state"):
        (folder / name).mkdir()
    make_gpus(folder)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = [[programs["slurmctld"], "-D", "-i"], *([programs["slurmd"], "-D", "-N", name] for name in NODES)]
    with contextlib.ExitStack() as stack:
        for command in daemons:
            process = stack.enter_context(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
            stack.callback(process.terminate)
        wait_for_nodes(environment, folder)
        yield environment


def make_gpus(folder: Path) -> None:
    """Make eight devices like /dev/null, because Slurm takes no plain file for a GPU; skip where this is forbidden."""
    try:
        for number in range(8):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this container may make no device, which Slurm needs for a GPU")


def wait_for_nodes(environment: dict[str, str], folder: Path) -> None:
    """Wait until Slurm has both nodes; skip with what its daemons say if this machine cannot run them."""
    end = time.monotonic() + START_S
    while states_of(environment, "sinfo", "-h", "-N", "-p", "spot", "-o", "%T") != ["idle"] * len(NODES):
        if time.monotonic() > end:
            said = {log.name: log.read_text()[-300:] for log in folder.glob("*.log")}
            pytest.skip(f"Slurm has no nodes here after {START_S} s: {said}")
        time.sleep(0.2)


def states_of(environment: dict[str, str], *command: str) -> list[str]:
    """Return the words that a command of Slurm prints; none while it cannot answer."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.split()


def submit(environment: dict[str, str], script: Path, *options: str) -> str:
    """Submit a script; return the number of its job."""
    command = ["sbatch", "--parsable", *options, str(script)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=script.parent
    ).stdout.strip()
