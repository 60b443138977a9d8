"""Checks of packages, of the GPUs that torch sees, and of the decoders."""

import contextlib
import importlib
import platform
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.doctor.findings import Section
from pipeline.doctor.owners import DISTRIBUTION, examine_names, owners_of
from pipeline.doctor.probing import Trial, try_all
from pipeline.text import byte_size, count

DRIVER = Path("/proc/driver/nvidia/version")
WITHOUT_KERNEL = (
    f"Delete {Path(__file__).parents[1] / 'pixels/_kernel.abi3.so'}: torch renders the same pixels. Report this"
)
NEVER_ASKED = frozenset({"docs", "test"})  # extras for developers of the project
_NOT_TRIED = ("sklearn", "wandb")  # slow imports; only the demo's digits and W&B need them
GPUS, DECODERS, KERNEL = (f"pipeline.doctor.probing:{name}" for name in ("see_gpus", "compare_decoders", "try_kernel"))
_SLOW = (
    "torch",
    "torchvision",
    "timm",
    "webdataset",
)  # packages that import torch: one process for each would take long
_MODULES = {
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyopenssl": "OpenSSL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}


@dataclass(frozen=True)
class Package:
    """A distribution that the project requires.

    Attributes:
        name: name of the distribution.
        asked: requirement, such as `timm>=1.0.31`.
        version: installed version; None if it is not installed.
        fits: True if the version meets the requirement.
    """

    name: str
    asked: str
    version: str | None
    fits: bool

    @property
    def module(self) -> str:
        """Return the import name."""
        return _MODULES.get(self.name.lower(), self.name.replace("-", "_"))


def examine_packages(folder: Path) -> list[Section]:
    """Return findings on all imported packages; they are imported in other processes, because an import may crash.

    Args:
        folder: folder in which a new interpreter is started to test imports: the working directory.
    """
    packages = Section("packages")
    extras = Section("extras")
    required, optional = _asked_for(packages)
    present = [p.module for p in required if p.version] + [
        p.module for each in optional.values() for p in each if p.version
    ]
    slow = [name for name in _SLOW if name in present]
    fast = [name for name in dict.fromkeys(present) if name not in (*_SLOW, *_NOT_TRIED)]
    with ThreadPoolExecutor(3) as pool:
        heavy = pool.submit(try_all, [*slow, *([GPUS] if "torch" in slow else [])])
        light = pool.submit(try_all, [*fast, DECODERS, KERNEL])
        names = examine_names(folder)
        trials = {trial.name: trial for trial in (*heavy.result(), *light.result())}
    _packages(packages, required, trials)
    _extras(extras, optional, trials)
    _conflicts(packages, [*required, *(package for each in optional.values() for package in each)])
    return [names, packages, extras, _devices(trials.get(GPUS)), _decoders(trials[DECODERS]), _kernel(trials[KERNEL])]


def _asked_for(section: Section) -> tuple[list[Package], dict[str, list[Package]]]:
    """Return the required packages and those of each extra, from pyproject.toml in a checkout, else from the metadata."""
    try:
        requirements: Any = importlib.import_module("packaging.requirements")
    except ImportError:
        section.problem("the package packaging is missing, so versions cannot be compared", "pip install packaging")
        return [], {}
    base, extras = _declared(section, requirements.Requirement)
    return (
        [package for each in base for package in _wanted(each)],
        {
            name: [package for each in of_extra for package in _wanted(each)]
            for name, of_extra in extras.items()
            if name not in NEVER_ASKED
        },
    )


def _declared(section: Section, parse: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the requirements for this machine, and those of each extra; `parse` turns a line into a requirement."""
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError):
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        if project["name"] == DISTRIBUTION:
            extras = {name: map(parse, lines) for name, lines in project["optional-dependencies"].items()}
            return _of_this_machine(map(parse, project["dependencies"])), {
                name: _of_this_machine(each) for name, each in extras.items()
            }
    try:
        of_ours = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        section.problem(f"{DISTRIBUTION} is not installed, so its requirements are unknown", "pip install .")
        return [], {}
    everything = [parse(line) for line in of_ours.requires or []]
    base = _of_this_machine(everything)
    return base, {
        extra: [each for each in _of_this_machine(everything, extra) if each not in base]
        for extra in of_ours.metadata.get_all("Provides-Extra") or []
    }


def _of_this_machine(requirements: Iterable[Any], extra: str = "") -> list[Any]:
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})]


def _wanted(requirement: Any) -> list[Package]:
    """Return the package of a requirement, and the packages of the extras that it names."""
    version = version_of(requirement.name)
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    packages = [Package(requirement.name, f"{requirement.name}{requirement.specifier}", version, fits)]
    lines = metadata.requires(requirement.name) or [] if version and requirement.extras else []
    for nested in map(type(requirement), lines):
        if nested.marker and any(nested.marker.evaluate({"extra": extra}) for extra in requirement.extras):
            found = version_of(nested.name)
            packages.append(Package(nested.name, nested.name, found, found is not None))
    return packages


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages(section: Section, required: Sequence[Package], trials: Mapping[str, Trial]) -> None:
    section.row("python", f"{platform.python_version()}  {sys.executable}", platform.python_version())
    for package in required:
        _package(section, package, trials.get(package.module))
    installed = metadata.packages_distributions()
    for package in required:
        several = owners_of(package.module, installed)
        if package.version and len(several) > 1:
            section.warning(
                f"{' and '.join(several)} both own {package.module}: the one installed last has overwritten the other",
                f"pip uninstall {' '.join(several)}, then pip install '{package.asked}'",
            )


def _package(section: Section, package: Package, trial: Trial | None) -> None:
    if package.version is None:
        section.row(package.name, "missing")
        section.problem(f"{package.name} is missing", f"pip install '{package.asked}'")
    elif trial and trial.error:
        section.row(package.name, f"{package.version}, but it cannot be imported", package.version)
        section.problem(
            f"{package.name} {package.version} is installed but cannot be imported: {trial.error}",
            f"pip install --force-reinstall '{package.asked}'",
        )
    else:
        section.row(package.name, package.version)
        if not package.fits:
            section.problem(
                f"{package.name} must be {package.asked.removeprefix(package.name)}, it is {package.version}",
                f"pip install '{package.asked}'",
            )


def _conflicts(section: Section, packages: Sequence[Package]) -> None:
    """Warn if the installed version of a dependency does not meet the requirement of an installed package."""
    for package in {package.name: package for package in packages if package.version}.values():
        parse: Any = importlib.import_module("packaging.requirements").Requirement
        for wanted in _of_this_machine(map(parse, metadata.requires(package.name) or [])):
            found = version_of(wanted.name)
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                section.warning(
                    f"{package.name} {package.version} requires {wanted.name}{wanted.specifier}, {f'{found} is installed' if found else 'which is missing'}",
                    f"pip install --upgrade '{package.asked}'",
                )


def _extras(section: Section, optional: Mapping[str, Sequence[Package]], trials: Mapping[str, Trial]) -> None:
    for extra, packages in sorted(optional.items()):
        if not packages:
            section.row(extra, "not for this machine")
            continue
        missing = [package.name for package in packages if package.version is None]
        way_in = f"pip install '{DISTRIBUTION}[{extra}]'"
        if missing:
            section.row(extra, f"not installed: {way_in}", {"missing": missing})
            continue
        versions = {package.name: package.version for package in packages}
        section.row(extra, ", ".join(f"{name} {version}" for name, version in versions.items()), versions)
        for package in packages:
            trial = trials.get(package.module)
            if trial and trial.error:
                section.warning(
                    f"{package.name} {package.version} of the extra {extra} is installed but cannot be imported: {trial.error}",
                    f"pip install --force-reinstall '{package.asked}', if you need it",
                )
            elif not package.fits:
                section.warning(f"the extra {extra} requires {package.asked}, {package.version} is installed", way_in)


def _devices(trial: Trial | None) -> Section:
    section = Section("GPUs")
    if trial is None or trial.result is None:
        section.row("CUDA", f"unknown: {trial.error if trial else 'torch is missing'}")
        return section
    found, driver = trial.result, _driver()
    for device in found["others"]:
        bf16 = "bfloat16" if device["bf16"] else "float32"
        section.row(device["kind"], f"{device['name']}, {byte_size(device['memory'])}, {bf16} by default", device)
    for index, device in enumerate(found["devices"]):
        bf16 = "bfloat16" if device["bf16"] else "no fast bfloat16: pass --dtype float16 or float32"
        section.row(f"cuda:{index}", f"{device['name']}, {byte_size(device['memory'])}, {bf16}", device)
    if found["devices"]:
        built = f"torch is built for {found['built_for']}"
        text = built if found["rocm"] else f"{built}, driver {driver or 'unknown'}"
        section.row("ROCm" if found["rocm"] else "CUDA", text, found["built_for"])
        return section
    if found["others"]:
        return section
    section.row("CUDA", f"no GPU; torch is built for {found['built_for'] or 'CPUs only'}", found["built_for"])
    if driver and not found["built_for"]:
        section.problem(
            f"an NVIDIA driver ({driver}) is installed, but this torch is built for CPUs only",
            "Install a torch that is built for CUDA: https://pytorch.org/get-started/locally",
        )
    elif driver:
        section.problem(
            f"an NVIDIA driver ({driver}) is installed, but torch for CUDA {found['built_for']} sees no GPU",
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES; update the driver, or install a torch for an older CUDA",
        )
    return section


def _driver() -> str | None:
    """Return the version of the NVIDIA kernel driver, or None without one."""
    with contextlib.suppress(OSError):
        words = DRIVER.read_text().split()
        return next((word for word in words if word[:1].isdigit() and "." in word), None)
    return None


def _decoders(trial: Trial) -> Section:
    section = Section("decoders")
    if trial.result is None:
        section.row("self-test", "could not run")
        section.problem(f"no image can be decoded: {trial.error}", "Repair the packages named above")
        return section
    found = trial.result
    section.row("formats", ", ".join(found["formats"]), found["formats"])
    section.row("JPEG", f"libjpeg-turbo: simplejpeg's; Pillow's is {found['libjpeg_turbo']}", found["libjpeg_turbo"])
    without = f"no libjpeg-turbo 3: pip install '{DISTRIBUTION}[region]' (optional, a sixth faster)"
    section.row("region of a JPEG", "yes" if found["region"] else without, found["region"])
    if "WEBP" not in found["formats"]:
        section.warning("Pillow cannot read WebP", "pip install --force-reinstall Pillow, if your images are WebP")
    wrong = {name: far for name, far in found["differences"].items() if far != 0}
    agreed = count(len(found["differences"]), "decoder")
    section.row("self-test", "differs" if wrong else f"{agreed} give the same pixels", found["differences"])
    for name, far in wrong.items():
        how = "failed" if far is None else f"differs by up to {far} of 255 from Pillow's pixels"
        section.problem(
            f"decoding {name} in the self-test {how}: labels made elsewhere may not fit",
            "pip install --force-reinstall simplejpeg Pillow" + (" turbojpeg" if name == "region" else ""),
        )
    return section


def _kernel(trial: Trial) -> Section:
    section = Section("views")
    slowly = "torch renders the views on the CPU, about thirty times slower; the pixels are the same"
    if trial.result is None:
        section.row("kernel", "fails")
        section.problem(f"the kernel for views fails: {trial.error}", WITHOUT_KERNEL)
    elif trial.result["trouble"]:
        what, way_out = trial.result["trouble"]
        section.row("kernel", "cannot be used", False)
        section.warning(f"{what}: {slowly}", way_out)
    else:
        section.row("kernel", f"compiled, uses {trial.result['sets'][-1]}", trial.result["sets"][-1])
        for name in trial.result["differing"]:
            section.problem(f"the kernel's pixels with {name} are not those without it", WITHOUT_KERNEL)
    return section
