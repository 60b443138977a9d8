"""The tests of a GPU (`pytest -m gpu`) as a phase of `gpu.py`: what passed, and what failed with its text."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from rounds import Job

ROOT = Path(__file__).resolve().parent.parent
TEXT = 4000  # characters of a failure, its end


def on_gpu(job: Job) -> None:
    """Run them in a process of their own, and note its summary."""
    report = job.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "gpu and not slow" if job.rehearse else "gpu"]
    command += ["--durations", "10", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    environment = os.environ | {"PYTEST_ADDOPTS": ""}  # several workers would share the GPU
    log = job.work / "tests.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, timeout=max(5.0, job.left()), env=environment, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text()
    print(text, flush=True)
    lines = text.strip().splitlines() or [""]
    job.note("summary", {"exit_code": code, "line": lines[-1] if code is not None else f"no end in time: {lines[-1]}"})
    if report.is_file():
        cases = list(ElementTree.parse(report).iter("testcase"))
        job.note("seconds", {case.get("name"): float(case.get("time", 0)) for case in cases})
        properties = [[each.get("name"), each.get("value")] for case in cases for each in case.iter("property")]
        job.note("properties", properties)
        failures = {case.get("name"): said.text or "" for case in cases for said in (*case.findall("failure"), *case.findall("error"))}  # fmt: skip
        job.note("failures", {name: said[-TEXT:] for name, said in failures.items()})
    if code not in (0, 5):  # 5: none is there
        raise SystemExit(f"pytest ended with {code}: {lines[-1]}")
