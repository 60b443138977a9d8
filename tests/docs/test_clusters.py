"""The job files of configs/clusters: their shell is sound, their command parses, and their variables make each process one rank."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

import cli
from pipeline.machine.ranks import Rank, rank_from
from pipeline.storage.yaml import read_yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/clusters"
# What a launcher sets: its variable, or the place of the number in a pod.
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def kubernetes() -> dict[str, Any]:
    return read_yaml(FOLDER / "kubernetes-job.yaml")


def container() -> dict[str, Any]:
    (found,) = kubernetes()["spec"]["template"]["spec"]["containers"]
    return found


def skypilot() -> dict[str, Any]:
    return read_yaml(FOLDER / "skypilot.yaml")


def script_of(name: str) -> str:
    if name == "kubernetes":
        assert container()["command"] == ["bash", "-c"]
        (script,) = container()["args"]
        return script
    return skypilot()["run"]


def ran_with(script: str, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Run a script in which a function stands for `exec deit-cli`; return its arguments and its variables RANK and WORLD_SIZE."""
    assert script.count("exec deit-cli ") == 1  # exec: signals reach the command
    shown = 'show() { printf "%s\\n" "${RANK-}" "${WORLD_SIZE-}" "$@"; }\nsource() { :; }\n'
    script = shown + script.replace("exec deit-cli ", "show ")
    done = subprocess.run(
        ["bash", "-euc", script],
        env={"PATH": "/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    rank, size, *arguments = done.stdout.splitlines()
    return arguments, {"RANK": rank, "WORLD_SIZE": size}


def pod(number: int) -> dict[str, str]:
    """Return the variables of a pod of the Job, as Kubernetes sets them."""
    found = {"JOB_COMPLETION_INDEX": f"{number}"}
    for each in container()["env"]:
        place = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        assert place in (None, INDEX)
        found[each["name"]] = f"{number}" if place else each["value"]
    return found


def machine(number: int) -> dict[str, str]:
    """Return the variables of a machine of the job, as SkyPilot sets them."""
    file = skypilot()
    return {"SKYPILOT_NODE_RANK": f"{number}", "SKYPILOT_NUM_NODES": f"{file['num_nodes']}"} | file["envs"]


CASES = [("kubernetes", pod, 16), ("skypilot", machine, 4)]


@pytest.mark.parametrize(("name", "variables", "size"), CASES)
def test_each_process_is_one_rank_of_all(name, variables, size):
    found = [rank_from(ran_with(script_of(name), variables(number))[1]) for number in range(size)]
    assert found == [Rank(number, size) for number in range(size)]


def test_the_job_has_a_pod_for_each_rank():
    spec = kubernetes()["spec"]
    assert spec["completionMode"] == "Indexed"
    assert {spec["completions"], spec["parallelism"], int(pod(0)["WORLD_SIZE"])} == {16}


@pytest.mark.parametrize(("name", "variables", "size"), CASES)
def test_the_command_parses(name, variables, size):
    arguments, _ = ran_with(script_of(name), variables(0))
    command = cli.commands
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    context = command.make_context("deit-cli", arguments)
    assert context.args == []
    assert all(not re.search(r"\$|^$", each) for each in arguments)  # every variable had a value


@pytest.mark.parametrize("script", ["setup", "run"])
def test_the_shell_of_skypilot_is_sound(script):
    subprocess.run(["bash", "-n"], input=skypilot()[script], text=True, check=True)


def test_the_pod_has_memory_for_batches_and_as_many_loaders_as_cores_allow():
    limits, asked = container()["resources"]["limits"], container()["resources"]["requests"]
    volumes = {each["name"]: each for each in kubernetes()["spec"]["template"]["spec"]["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container()["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    shared = int(mounts["/dev/shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert shared < int(limits["memory"].removesuffix("Gi"))
    words = shlex.split(script_of("kubernetes"))
    assert int(words[words.index("-j") + 1]) == int(asked["cpu"]) - 1


def test_a_pod_that_is_evicted_is_made_again_and_a_wrong_option_is_not():
    spec = kubernetes()["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert spec["template"]["spec"]["shareProcessNamespace"]  # SIGTERM would not reach process 1
    evicted, misused = spec["podFailurePolicy"]["rules"]
    assert (evicted["action"], evicted["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    assert misused["action"] == "FailJob"
    assert misused["onExitCodes"] == {"containerName": container()["name"], "operator": "In", "values": [2]}


def test_what_the_user_must_fill_in_is_plainly_that():
    assert "YOUR-" in container()["image"]
    claims = [
        each["persistentVolumeClaim"]["claimName"]
        for each in kubernetes()["spec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in each
    ]
    assert claims == ["YOUR-CLAIM"]
    assert all("YOUR-" in url for url in skypilot()["envs"].values())


def test_the_image_has_everything_that_the_package_is_built_from():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert {"pyproject.toml", "README.md", "LICENSE", "cli.py", "pipeline", "trainer"} <= set(names)
    assert all((ROOT / name).exists() for name in names)
