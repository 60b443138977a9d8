"""Doctor names what is wrong and the way out, whatever is broken: names, packages, limits, folders, label sets."""

import base64
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.background import wait_until
from support.builders import files_of, make_labels, with_checkout, write_tars
from support.label_sets import seal_again
from support.s3_server import BUCKET, credentials

from pipeline.doctor import examine as examining
from pipeline.doctor import machine, owners, packages, places, probing
from pipeline.doctor.buckets import examine_bucket
from pipeline.doctor.examine import compare_environments, examine_images, examine_labels
from pipeline.doctor.findings import Section, report_json, report_table, verdict
from pipeline.doctor.machine import examine_machine
from pipeline.doctor.places import examine_folder
from pipeline.images.decode import encode
from pipeline.pixels import kernel
from pipeline.storage import atomic as storage
from pipeline.storage.remote import list_tree
from pipeline.storage.stores import store_of

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0


def doctor(
    *arguments: str, cwd: Path, code: int | None = None, site: tuple[Path, ...] = (), **variables: str
) -> tuple[int, str]:
    """Run the command in its own process, as the installed one runs: without the working directory in its path.

    What lies in the folders of `site` hides what is installed.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import cli; cli.main()", "doctor", *arguments],
        capture_output=True,
        text=True,
        env=with_checkout(*site, **variables),
        cwd=cwd,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.returncode, done.stdout


def told(section: Section, *, warnings: bool = False) -> list[str]:
    """Return the problems of a section, or its warnings, each with its way out."""
    return [f"{each.what}. {each.way_out}" for each in section.findings if each.is_warning == warnings]


def value(section: Section, name: str) -> str:
    return next(row.text for row in section.rows if row.name == name)


def mounted(folder: Path, options: str) -> None:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    if not IS_ROOT:
        pytest.skip("only root mounts file systems")
    folder = tmp_path / "disk"
    mounted(folder, "size=1m,mode=777")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Return what is said of our names for programs that start in tmp_path, with this checkout on PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)

    def look() -> Section:
        return owners.examine_names(tmp_path)

    return look


def shadow(folder: Path, name: str = "pipeline") -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise SystemExit('the wrong one')")


def test_names_that_nobody_hides_are_no_problem(names):
    section = names()
    assert told(section) == []
    assert value(section, "cli").startswith(str(ROOT / "cli.py"))


def test_a_folder_of_our_name_in_the_working_directory_is_named_with_a_way_out(names, tmp_path):
    shadow(tmp_path)
    (tmp_path / "cli.py").write_text("")
    section = names()
    assert told(section) == [
        f"programs started in {tmp_path} import pipeline, cli from there, not from {ROOT}."
        " Start programs in another folder, rename these files, or set PYTHONSAFEPATH=1"
    ]
    assert value(section, "pipeline").startswith(str(ROOT / "pipeline"))


def test_a_checkout_that_is_what_was_installed_is_a_warning(names, tmp_path):
    """README installs from a checkout, and whoever stays in it starts there."""
    for name in ("pipeline", "trainer"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "cli.py", tmp_path)
    section = names()
    assert told(section) == []
    (warning,) = told(section, warnings=True)
    assert "import pipeline, trainer, cli from there" in warning
    assert "The files are equal today" in warning
    (tmp_path / "trainer/loop.py").write_text("changed = True")
    assert len(told(names())) == 1


def test_the_way_out_of_a_hidden_name_works(names, tmp_path, monkeypatch):
    shadow(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert told(names()) == []


def test_a_folder_that_python_passes_over_is_no_problem(names, tmp_path):
    (tmp_path / "pipeline").mkdir()  # no __init__.py: a package further down the path goes before it
    assert told(names()) == []


def test_a_folder_that_hides_an_installed_module_is_a_problem(names, tmp_path, monkeypatch):
    """Where ours is found by an import hook, as an editable installation's is, any folder of the name goes before it."""
    site = tmp_path / "site"
    (site / "pipeline").mkdir(parents=True)
    (site / "trainer").mkdir()
    (site / "trainer" / "__init__.py").write_text("")
    (site / "cli.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setattr(owners.sys, "executable", bare_python(tmp_path))
    assert (
        f"pipeline is the folder {site}/pipeline, which has no __init__.py: it belongs to another project or an old installation."
        " Delete or rename it, then pip install --force-reinstall deit-cli" in told(names())
    )


def bare_python(folder: Path) -> str:
    """Return an interpreter without site-packages, in which nothing of ours is installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    return str(folder / "venv" / "bin" / "python")


def test_names_from_two_places_are_a_problem(names, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    shadow(other, "trainer")
    monkeypatch.setenv("PYTHONPATH", f"{other}{os.pathsep}{ROOT}")
    assert told(names())[0].startswith(
        f"pipeline, trainer, cli come from 2 folders: {', '.join(sorted([str(ROOT), str(other)]))}"
    )


def test_two_distributions_that_own_one_name_are_a_problem(names, tmp_path, monkeypatch):
    info = tmp_path / "site" / "data_pipeline-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: data_pipeline\nVersion: 2.0\n")
    (info / "top_level.txt").write_text("pipeline\n")
    ours = tmp_path / "site" / "deit_cli-0.1.0.dist-info"
    ours.mkdir()
    (ours / "METADATA").write_text("Metadata-Version: 2.1\nName: deit-cli\nVersion: 0.1.0\n")
    (ours / "top_level.txt").write_text("pipeline\ntrainer\ncli\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    section = names()
    (problem,) = told(section)
    assert problem.startswith("data-pipeline and deit-cli both own the name pipeline: the one installed last")
    assert "python -m venv" in problem
    assert "(data-pipeline 2.0 and deit-cli 0.1.0)" in value(section, "pipeline")


def test_nothing_to_import_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "OURS", ("no_such_name",))
    assert told(owners.examine_names(tmp_path)) == [
        "a new interpreter cannot import no_such_name. pip install --force-reinstall deit-cli"
    ]


# --- packages ------------------------------------------------------------------------------------------------------

BROKEN = [
    # what the module does, what is said of it
    ("raise ImportError('libfancy.so.8: cannot open shared object file')", "libfancy.so.8: cannot open shared object file"),
    ("raise ValueError('first line\\nsecond')", "ValueError: first line"),
    ("import sys; sys.exit(3)", "SystemExit: 3"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it ended the interpreter with SIGSEGV"),
    ("import os, sys; print('out of luck', file=sys.stderr, flush=True); os._exit(7)", "it ended the interpreter with exit code 7: out of luck"),
    ("import time; time.sleep(60)", "it took more than 2 s"),
    ("import sys; print('half a line', end=''); sys.stdout = None", None),
    ("print('deit-cli-probe of another kind')", None),
]  # fmt: skip


@pytest.mark.parametrize(("code", "error"), BROKEN, ids=range(len(BROKEN)))
def test_whatever_an_import_does_is_told_and_the_next_one_is_tried(code, error, tmp_path, monkeypatch):
    (tmp_path / "broken_one.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    trials = probing.try_all(["json", "broken_one", "csv"], timeout_s=2 if "sleep" in code else 60)
    assert [(trial.name, trial.error) for trial in trials] == [("json", None), ("broken_one", error), ("csv", None)]


def test_packages_are_missing_old_broken_or_good():
    section = Section("packages")
    required = [
        packages.Package("good", "good>=1", "1.2", True),
        packages.Package("gone", "gone>=1", None, False),
        packages.Package("old-one", "old-one>=2", "1.9", False),
        packages.Package("Pillow", "Pillow>=11", "12.0", True),
    ]
    packages._packages(section, required, {"PIL": probing.Trial("PIL", None, "no _imaging")})
    assert told(section) == [
        "gone is missing. pip install 'gone>=1'",
        "old-one must be >=2, it is 1.9. pip install 'old-one>=2'",
        "Pillow 12.0 is installed but cannot be imported: no _imaging. pip install --force-reinstall 'Pillow>=11'",
    ]
    assert value(section, "good") == "1.2"
    assert value(section, "gone") == "missing"


def test_a_package_that_asks_for_another_version_is_a_warning(tmp_path, monkeypatch):
    for name, version, asked in (
        ("one", "1.0", ["two>=3", "three", "four; extra == 'x'", "two<9"]),
        ("two", "2.0", []),
    ):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = "".join(f"Requires-Dist: {line}\n" for line in asked)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
    (tmp_path / "~orch-1.0.dist-info").mkdir()  # what pip leaves of an installation that was interrupted
    monkeypatch.syspath_prepend(str(tmp_path))
    section = Section("packages")
    packages._conflicts(section, [packages.Package("one", "one>=1", "1.0", True)])
    assert told(section, warnings=True) == [
        "one 1.0 requires two>=3, 2.0 is installed. pip install --upgrade 'one>=1'",
        "one 1.0 requires three, which is missing. pip install --upgrade 'one>=1'",
    ]


def test_extras_say_how_they_are_installed():
    section = Section("extras")
    optional = {
        "s3": [packages.Package("s3fs", "s3fs>=2024.6", None, False)],
        "ray": [packages.Package("ray", "ray>=2.50", "2.60.0", True)],
        "hub": [packages.Package("huggingface_hub", "huggingface_hub>=0.23", "0.1", False)],
        "region": [],
    }
    packages._extras(section, optional, {"ray": probing.Trial("ray", None, "boom")})
    assert told(section) == []
    assert value(section, "s3") == "not installed: pip install 'deit-cli[s3]'"
    assert value(section, "region") == "not for this machine"
    assert [each.split(".")[0] for each in told(section, warnings=True)] == [
        "the extra hub requires huggingface_hub>=0",
        "ray 2",
    ]
    assert "of the extra ray is installed but cannot be imported: boom" in told(section, warnings=True)[1]


def test_what_is_asked_for_is_what_pyproject_says_and_every_extra_is_there():
    section = Section("packages")
    required, optional = packages._asked_for(section)
    assert told(section) == []
    assert {"torch", "Pillow", "fsspec", "simplejpeg"} <= {package.name for package in required}
    assert {"s3", "gcs", "hub", "ray"} <= set(optional)
    assert "test" not in optional
    if (http := optional["http"])[0].version:
        assert "aiohttp" in [package.name for package in http]


def test_requirements_of_an_installed_distribution_are_those_of_the_checkout(monkeypatch, tmp_path):
    """Installed, there is no pyproject.toml; the lines of METADATA must give the same."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [f"Requires-Dist: {line}" for line in project["dependencies"]]
    for extra, of_extra in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        for line in of_extra:
            name, _, marker = line.partition(";")
            lines.append(f"Requires-Dist: {name}; " + (f"({marker}) and " if marker else "") + f'extra == "{extra}"')
    info = tmp_path / "deit_cli-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deit-cli\nVersion: 0.1.0\n" + "\n".join(lines) + "\n")
    expected = packages._asked_for(Section("checkout"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "site" / "pipeline" / "packages.py"))
    section = Section("installed")
    assert packages._asked_for(section) == expected
    assert told(section) == []


def test_a_project_that_is_not_installed_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "pipeline" / "packages.py"))
    monkeypatch.setattr(packages, "DISTRIBUTION", "no-such-distribution")
    section = Section("packages")
    assert packages._asked_for(section) == ([], {})
    assert told(section) == ["no-such-distribution is not installed, so its requirements are unknown. pip install ."]


GPUS = [
    # what torch says, driver file, problem
    ({"built_for": "13.0", "devices": []}, None, None),
    ({"built_for": None, "devices": [], "others": [{"kind": "xpu:0", "name": "Max 1550", "memory": 64e9, "bf16": True}]}, None, None),
    ({"built_for": None, "devices": [], "others": [{"kind": "mps", "name": "Apple GPU", "memory": 37e9, "bf16": False}]}, None, None),
    ({"built_for": "7.2", "rocm": True, "devices": [{"name": "MI300X", "memory": 206e9, "capability": "9.4", "bf16": True}]}, None, None),
    ({"built_for": None, "devices": []}, "NVRM version: NVIDIA UNIX Module  580.82.07  x", "but this torch is built for CPUs only"),
    ({"built_for": "13.0", "devices": []}, "NVRM version: NVIDIA UNIX Module  470.1  x", "(470.1) is installed, but torch for CUDA 13.0 sees no GPU"),
    ({"built_for": "13.0", "devices": [{"name": "H100", "memory": 85e9, "capability": "9.0", "bf16": True}]}, "Module  580.82.07  x", None),
]  # fmt: skip


@pytest.mark.parametrize(("found", "driver", "problem"), GPUS, ids=range(len(GPUS)))
def test_a_driver_without_a_gpu_is_a_problem(found, driver, problem, tmp_path, monkeypatch):
    file = tmp_path / "version"
    if driver:
        file.write_text(driver)
    monkeypatch.setattr(packages, "DRIVER", file)
    found = {"rocm": False, "others": []} | found
    section = packages._devices(probing.Trial(packages.GPUS, found, None))
    assert [problem in each for each in told(section)] == ([True] if problem else [])
    if found["rocm"]:
        assert value(section, "cuda:0") == "MI300X, 206.0 GB, bfloat16"
        assert value(section, "ROCm") == "torch is built for 7.2"
    elif found["devices"]:
        assert value(section, "cuda:0") == "H100, 85.0 GB, bfloat16"
        assert value(section, "CUDA") == "torch is built for 13.0, driver 580.82.07"
    for other in found["others"]:
        said = {"xpu:0": "Max 1550, 64.0 GB, bfloat16 by default", "mps": "Apple GPU, 37.0 GB, float32 by default"}
        assert [(row.name, row.text) for row in section.rows] == [(other["kind"], said[other["kind"]])]


def test_the_decoders_of_this_machine_agree():
    (trial,) = probing.try_all([packages.DECODERS])
    section = packages._decoders(trial)
    assert told(section) == []
    assert trial.result["differences"] | {"simplejpeg": 0, "PNG": 0} == trial.result["differences"]
    assert set(trial.result["differences"].values()) == {0}


def test_a_decoder_of_other_pixels_is_a_problem(tmp_path, monkeypatch):
    """A simplejpeg that decodes fast and inexactly, as a build of another library would."""
    code = f"""
import sys
del sys.modules["simplejpeg"]
sys.path.remove({str(tmp_path)!r})
import simplejpeg
exact = simplejpeg.decode_jpeg
simplejpeg.decode_jpeg = lambda data, colour, **_: exact(data, colour, fastdct=True, fastupsample=True)
"""
    (tmp_path / "simplejpeg.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (trial,) = probing.try_all([packages.DECODERS])
    (problem,) = told(packages._decoders(trial))
    assert problem.startswith("decoding simplejpeg in the self-test differs by up to ")
    assert "labels made elsewhere may not fit. pip install --force-reinstall simplejpeg Pillow" in problem


def tried_kernel() -> Section:
    (trial,) = probing.try_all([packages.KERNEL])
    return packages._kernel(trial)


@pytest.mark.skipif(not kernel.is_compiled(), reason="the kernel was not compiled")
def test_the_kernel_of_this_machine_gives_the_same_pixels_with_each_instruction_set():
    section = tried_kernel()
    assert section.findings == []
    assert value(section, "kernel") == f"compiled, uses {kernel.INSTRUCTION_SETS[kernel.best_level()]}"


KERNELS = [
    # what happens when the kernel is tried, row, whether it is a warning, what is said
    ("kernel._opened = lambda: (None, kernel.Trouble('it is gone', 'Get it'))", "cannot be used", True, "it is gone: torch renders the views on the CPU, about thirty times slower; the pixels are the same. Get it"),
    ("kernel.render_views = lambda *_, **__: os.kill(os.getpid(), 4)", "fails", False, "the kernel for views fails: it ended the interpreter with SIGILL. Delete "),
    ("kernel.render_views = lambda image, views, out, level: out[3].fill(level)", "compiled, uses AVX2", False, "the kernel's pixels with AVX2 are not those without it. Delete "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "row", "is_warning", "said"), KERNELS, ids=range(len(KERNELS)))
def test_a_kernel_that_is_missing_or_broken_is_named_with_the_way_out(
    change, row, is_warning, said, tmp_path, monkeypatch
):
    broken = f"import os\nfrom pipeline.pixels import kernel\nkernel._opened = lambda: (None, None)\n{change}\n"
    (tmp_path / "sitecustomize.py").write_text(f"{broken}kernel.best_level = lambda: 1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    section = tried_kernel()
    assert value(section, "kernel") == row
    (finding,) = told(section, warnings=is_warning)
    assert finding.startswith(said)
    assert len(section.findings) == 1


# --- machine -------------------------------------------------------------------------------------------------------


def test_the_machine_is_described():
    section = examine_machine()
    assert {"system", "CPU", "cores", "memory", "open files"} <= {row.name for row in section.rows}


def test_a_low_limit_of_open_files_is_a_warning_with_the_way_out():
    script = "from pipeline.doctor.machine import examine_machine as e; print(*[f for f in e().findings], sep='\\n')"
    command = f'ulimit -Sn 200 && "{sys.executable}" -c "{script}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "open only 200 files" in line]
    assert line.startswith("warning: ")
    assert "ulimit -n " in line


def test_little_shared_memory_is_a_problem(small_disk, monkeypatch):
    monkeypatch.setattr(machine, "SHARED_MEMORY", small_disk)
    (problem,) = [each for each in told(examine_machine()) if "shared memory" in each]
    assert "1.0 MB is free" in problem
    assert "--shm-size" in problem


CGROUPS = [
    # /proc/self/cgroup, files, cores, bytes
    ("0::/job/step\n", {"job/cpu.max": "150000 100000\n", "job/step/cpu.max": "max 100000\n", "job/memory.max": "4000000000\n", "job/step/memory.max": "max\n"}, 1.5, 4 * 10**9),
    ("3:cpu,cpuacct:/a\n2:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000", "memory/a/memory.limit_in_bytes": "9000", "memory/memory.limit_in_bytes": "9223372036854771712"}, 0.5, 9000),
    ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None, None),
    ("0::/\n", {}, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("mine", "files", "cores", "limit"), CGROUPS, ids=range(len(CGROUPS)))
def test_the_limits_of_a_container_are_found(mine, files, cores, limit, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text(mine)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MY_CGROUPS", tmp_path / "mine")
    assert (machine.cpu_quota(), machine.memory_limit()) == (cores, limit)
    warnings = " ".join(told(examine_machine(), warnings=True))
    assert ("OMP_NUM_THREADS=1" in warnings) == (cores is not None and cores + 0.5 < len(os.sched_getaffinity(0)))
    assert ("of memory is available" in warnings) == (limit == 9000)


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_sound_folder_has_no_problem_and_keeps_its_files(tmp_path):
    (tmp_path / "mine").write_text("mine")
    section = examine_folder(tmp_path)
    assert told(section) == []
    for name in ("hard links", "file locks", "swapping files"):
        assert value(section, name) == "yes"
    assert value(section, "temporary files") == "none"
    assert "MB/s" in value(section, "writing") or "GB/s" in value(section, "writing")
    assert files_of(tmp_path) == {"mine": b"mine"}


def test_a_folder_that_does_not_exist_is_not_made(tmp_path):
    section = examine_folder(tmp_path / "a" / "b")
    assert value(section, "looked at") == f"{tmp_path}, its nearest existing parent"
    assert told(section) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert told(examine_folder(tmp_path / "file")) == [f"{tmp_path / 'file'} is not a folder. Choose a folder"]
    assert told(examine_folder(tmp_path / "file" / "set")) == [f"{tmp_path / 'file'} is not a folder. Choose a folder"]


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    folder = tmp_path / "locked"
    if IS_ROOT:  # rights do not hold root up
        mounted(folder, "size=1m,ro")
    else:
        folder.mkdir(mode=0o555)
    try:
        (problem,) = told(examine_folder(folder))
    finally:
        if IS_ROOT:
            subprocess.run(["umount", str(folder)], check=True)
    assert problem.startswith(f"{folder} cannot be written: ")
    assert "Choose a folder that can be written" in problem


def test_a_small_disk_in_memory_is_warned_of_and_not_filled(small_disk):
    section = examine_folder(small_disk)
    assert told(section) == []
    warnings = told(section, warnings=True)
    assert any("a restart deletes it" in each for each in warnings)
    assert any("has 1.0 MB left" in each for each in warnings)
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_is_a_problem(small_disk):
    (small_disk / "full").write_bytes(bytes(2**20))
    assert told(examine_folder(small_disk)) == [
        f"{small_disk} cannot be written: No space left on device. Free some space"
    ]
    assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_no_hard_links_and_no_locks_are_warnings(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(places.fcntl, "flock", refuse)
    section = examine_folder(tmp_path)
    assert told(section) == []
    assert (value(section, "hard links"), value(section, "file locks")) == ("no", "no")
    assert [each.split(",")[0] for each in told(section, warnings=True)] == [
        f"{tmp_path} does not support hard links",
        f"file locks are refused in {tmp_path}: two runs in one folder",
    ]
    assert files_of(tmp_path) == {}


def test_locks_that_do_not_hold_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(places.fcntl, "flock", lambda *_: None)
    assert "file locks are not kept in" in told(examine_folder(tmp_path), warnings=True)[0]


def test_files_with_the_times_of_another_clock_are_a_warning(tmp_path, monkeypatch):
    real = places.time.time
    monkeypatch.setattr(places.time, "time", lambda: real() + 100)
    (warning,) = told(examine_folder(tmp_path), warnings=True)
    assert "get times 100 s behind this machine's clock" in warning


def test_what_killed_writers_left_behind_is_counted(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from pipeline.storage.atomic import temporary_name\n"
        "Path(sys.argv[1], 'labels', temporary_name()).write_bytes(bytes(5))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "labels").mkdir()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    (tmp_path / ".tmp-elsewhere-1-0123456789abcdef").write_bytes(bytes(7))
    section = examine_folder(tmp_path)
    assert value(section, "temporary files") == "2 files, 12 B; 1 of killed writers"
    (warning,) = told(section, warnings=True)
    assert warning.startswith(f"1 temporary file of killed writers is in {tmp_path}")
    assert storage.sweep_temporaries(tmp_path) == 1


def test_a_doctor_killed_while_it_writes_leaves_what_is_swept(tmp_path):
    script = "import sys; from pathlib import Path; from pipeline.doctor import places; places.MOST_S = 600; places.examine_folder(Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT) as process:
        wait_until(lambda: any(map(is_being_written, tmp_path.iterdir())), "a file that is being written")
        process.kill()
    assert storage.sweep_temporaries(tmp_path) >= 1
    assert files_of(tmp_path) == {}


def is_being_written(path: Path) -> bool:
    try:
        return path.stat().st_size > 2**20
    except FileNotFoundError:
        return False


# --- buckets -------------------------------------------------------------------------------------------------------


def names_in(url: str) -> list[str]:
    return list(list_tree(url))


def test_a_bucket_takes_a_file_once_and_keeps_nothing_of_the_trial():
    section = examine_bucket("memory://doctor-sound")
    assert told(section) + told(section, warnings=True) == []
    assert value(section, "creating only") == "yes"
    assert "/s over 8.4 MB" in value(section, "writing")
    assert names_in("memory://doctor-sound") == []


def test_a_store_that_overwrites_is_warned_of(monkeypatch):
    """As some stores do, which do not know the condition and ignore it."""
    system, _ = store_of("memory://x").file_system("memory://x")
    real = type(system).pipe_file
    monkeypatch.setattr(type(system), "pipe_file", lambda self, path, data, mode="x", **_: real(self, path, data))
    section = examine_bucket("memory://doctor-careless")
    assert told(section) == []
    assert "ignores conditional writes" in told(section, warnings=True)[0]
    assert names_in("memory://doctor-careless") == []


@pytest.mark.slow
def test_a_real_store_is_looked_at_and_its_refusals_are_named(store, monkeypatch):
    credentials(monkeypatch, store)
    section = examine_bucket(f"s3://{BUCKET}/doctor")
    assert told(section) == []
    assert value(section, "creating only") == "yes"
    assert names_in(f"s3://{BUCKET}/doctor") == []
    (problem,) = told(examine_bucket("s3://no-such-bucket/shards"))
    assert "there is no such bucket" in problem


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://host/shards", "a web server takes no files; push to a bucket"),
        ("file:///tmp/shards", "a URL must begin with http://"),
    ],
)
def test_what_takes_no_files_is_a_problem(url, why):
    (problem,) = told(examine_bucket(url))
    assert why in problem


# --- label sets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"))


@pytest.fixture
def labels(data, tmp_path) -> Path:
    return Path(str(make_labels(tmp_path / "set", data).folder))


def test_a_label_set_that_replays_is_compared_with_what_is_installed_here(labels):
    section = examine_labels(str(labels), None)
    assert told(section) == []
    assert value(section, "replay").endswith("every pixel equal")
    assert value(section, "numpy").endswith(" at labelling and here")
    assert value(section, "device") == "cpu at labelling"


def change_probes(manifest: dict, shift: int) -> None:
    for probe in manifest["probes"]:
        sample = bytes((byte + shift) % 256 for byte in base64.b64decode(probe["sample"]))
        probe |= {"pixels_sha256": "0" * 64, "sample": base64.b64encode(sample).decode()}


def test_a_label_set_that_does_not_replay_is_a_problem(labels):
    seal_again(labels, lambda manifest: change_probes(manifest, 90))
    section = examine_labels(str(labels), None)
    assert value(section, "replay") == "no"
    (problem,) = told(section)
    assert "differs from the labelled pixels by" in problem


def test_a_label_set_that_replays_nearly_is_a_warning(labels):
    seal_again(labels, lambda manifest: change_probes(manifest, 0))
    section = examine_labels(str(labels), None)
    assert told(section) == []
    (warning,) = told(section, warnings=True)
    assert "which training accepts: another image decoder, or a damaged kernel" in warning


def test_a_label_set_of_other_images_is_a_problem(labels, tmp_path):
    other = write_tars(tmp_path / "other", (13, 9))
    (problem,) = told(examine_labels(str(labels), other))
    assert problem.endswith("Pass the --data that was labelled")
    (problem,) = told(examine_labels(str(labels), str(tmp_path / "none")))
    assert "does not exist" in problem


def test_a_self_contained_set_needs_no_originals(tmp_path):
    data = Path(write_tars(tmp_path / "data"))
    labels = str(make_labels(tmp_path / "set", str(data), include_images="original").folder)
    data.rename(tmp_path / "gone")
    section = examine_labels(labels, None)
    assert told(section) == []
    assert value(section, "images") == f"{labels}/images"
    assert value(section, "replay").endswith("every pixel equal")


def test_a_url_in_a_strangers_plan_is_not_opened(labels, data, monkeypatch):
    opened: list[str] = []
    for module in ("images.source", "labels.labelset"):
        monkeypatch.setattr(f"pipeline.{module}.open_source", lambda location, **_: opened.append(location))
    plan = (labels / "plan.json").read_text()
    assert data in plan
    (labels / "plan.json").write_text(plan.replace(data, "http://169.254.169.254/latest"))
    seal_again(labels)
    (problem,) = told(examine_labels(str(labels), None))
    assert "URLs are opened only on request: pass --data http://169.254.169.254/latest" in problem
    assert opened == []


def test_a_folder_without_a_label_set_is_a_problem(tmp_path):
    (problem,) = told(examine_labels(str(tmp_path), None))
    assert problem == f"{tmp_path} is not a label set: it has no plan.json. Make one with: deit-cli precompute"


def test_versions_then_and_here():
    recorded = [{"numpy": "1.0", "device": "cpu"}, {"numpy": "1.1", "device": "cpu"}]
    rows = {name: text for name, text, _ in compare_environments(recorded)}
    assert rows["device"] == "cpu at labelling"
    assert rows["numpy"].startswith("1.0, 1.1 at labelling, ")
    assert rows["numpy"].endswith(" here")


# --- the report ----------------------------------------------------------------------------------------------------


def test_a_report_counts_problems_and_warnings_apart():
    section = Section("things")
    section.row("one", "two")
    section.row("number", "3 of them", 3)
    assert (
        report_table([section])
        == "things\n  one                      two\n  number                   3 of them\n\nno problem, 0 warnings"
    )
    section.warning("a is b", "Do c")
    section.problem("d is e", "Do f")
    section.problem("g is h", "Do i")
    assert verdict([section]) == (2, 1)
    assert "  ! warning: a is b. Do c\n  ! PROBLEM: d is e. Do f\n" in report_table([section])
    assert report_table([section]).endswith("\n\n2 problems, 1 warning")
    assert report_json([section]) == {
        "sections": {"things": {"one": "two", "number": 3}},
        "problems": [
            {"section": "things", "what": w, "way_out": o} for w, o in (("d is e", "Do f"), ("g is h", "Do i"))
        ],
        "warnings": [{"section": "things", "what": "a is b", "way_out": "Do c"}],
    }


@pytest.mark.slow
def test_the_command_tells_everything_and_its_exit_code_is_its_verdict(tmp_path):
    code, output = doctor("--json", "--out", "shards", "--labels", str(ROOT / "tests/golden/v1/shards"), "--data", str(ROOT / "tests/golden/v1/images"), cwd=tmp_path)  # fmt: skip
    found = json.loads(output)
    assert code == (1 if found["problems"] else 0)
    assert list(found["sections"])[:6] == ["machine", "names", "packages", "extras", "GPUs", "decoders"]
    assert {"python", "torch", "timm", "numpy", "fsspec"} <= set(found["sections"]["packages"])
    assert found["sections"]["folder shards"]["hard links"] is True
    assert found["sections"][f"labels {ROOT}/tests/golden/v1/shards"]["replay"]["probes"] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_survives_broken_packages_and_a_hidden_name(tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    site.mkdir()
    here.mkdir()
    shadow(here)
    for name, code in (("timm", "raise ImportError('no timm today')"), ("simplejpeg", "import os; os._exit(9)")):
        (site / f"{name}.py").write_text(code)
    _, output = doctor("--labels", str(ROOT / "tests/golden/v1/shards"), cwd=here, code=1, site=(site,))
    problems = [line for line in output.splitlines() if "! PROBLEM: " in line]
    assert any("import pipeline from there" in line for line in problems)
    assert any("timm" in line and "cannot be imported: no timm today" in line for line in problems)
    assert any("simplejpeg" in line and "it ended the interpreter with exit code 9" in line for line in problems)
    assert any("no image can be decoded" in line for line in problems)
    assert any("shards could not be checked: it ended the interpreter" in line for line in problems)
    assert output.splitlines()[-1].startswith(f"{len(problems)} problems, ")


@pytest.mark.slow
def test_the_command_runs_where_nothing_but_click_is_installed(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for name in ("click", "packaging"):
        (site / name).symlink_to(Path(importlib.import_module(name).__file__ or "").parent)
    done = subprocess.run(
        [bare_python(tmp_path), "-P", "-c", "import cli; cli.main()", "doctor", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=with_checkout(site),
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "! PROBLEM: torch is missing. pip install 'torch>=" in done.stdout
    assert "! PROBLEM: no image can be decoded: No module named 'numpy'" in done.stdout
    assert "hard links               yes" in done.stdout


def folder_of(tmp_path: Path, damaged: int) -> Path:
    for number in range(14):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.full((9, 9, 3), number, np.uint8), "JPEG"))
        if number < damaged:
            path.write_bytes(path.read_bytes()[:-20])
    return tmp_path / "photos"


@pytest.mark.parametrize(("damaged", "more"), [(1, ""), (12, ", and 2 more")])
def test_damaged_images_are_listed(tmp_path, damaged, more):
    section = examine_images(str(folder_of(tmp_path, damaged)))
    assert value(section, "decoded") == f"{14 - damaged} of 14 that were looked at, of 14"
    (problem,) = told(section)
    assert f"image{'s' * (damaged > 1)} cannot be decoded: " in problem
    assert problem.count(str(tmp_path)) == min(damaged, 10)
    assert problem.endswith(
        f"{more}. Repair or delete them; precompute and pack leave them out with --on-bad-image skip"
    )


def test_images_are_decoded_for_a_limited_time(tmp_path, monkeypatch):
    monkeypatch.setattr(examining, "IMAGES_S", 0.0)
    section = examine_images(str(folder_of(tmp_path, 0)))
    assert value(section, "decoded") == "1 of 1 that were looked at, of 14"
    assert told(section) == []


def test_images_that_are_not_there_are_a_problem(tmp_path):
    (problem,) = told(examine_images(str(tmp_path / "nothing")))
    assert "nothing: does not exist" in problem


def test_the_command_decodes_images_in_a_process_of_its_own(tmp_path):
    folder_of(tmp_path, 1)
    _, output = doctor("--data", "photos", "--class-depth", "1", cwd=tmp_path, code=1)
    assert "1 image cannot be decoded: photos/a/00.jpg (damaged or truncated: " in " ".join(output.split())
