"""`deit-cli compare`: runs a study, and writes its result as a JSON file and a page."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.settings.files import describe_settings
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import pretty_json
from trainer.config import AnalyseConfig, CompareConfig, ReportConfig
from trainer.studies.images import images_of, remember
from trainer.studies.results import summarise
from trainer.studies.running import LocalEngine, RayEngine, Session, only_study_in
from trainer.studies.steps import plan_study, ranks_of
from trainer.studies.study import Scale, read_study

log = logging.getLogger("deit_cli.compare")


def compare(path: Path, config: CompareConfig) -> dict[str, Any]:
    """Run a study, and return the content of its JSON file, which is written after every step.

    Args:
        path: YAML file of the study.
        config: settings of the command.

    Raises:
        UsageError: the study or its scale is wrong, or another process compares in the folder.
        KeyboardInterrupt, Terminated: a signal; the running steps have saved their work.
    """
    study = read_study(path, config.scale, data=config.data, eval_data=config.eval_data)
    out = config.out or study.folder
    command = shlex.join(["deit-cli", "compare", str(path), *shlex.split(describe_settings(config))])

    def save(session: Session) -> None:
        replace_file(out / f"{study.name}.json", pretty_json(summarise(session, command)))

    with only_study_in(out):
        images = images_of(study.scale, out / "data")
        remember(images, out)
        plan = plan_study(study, *images, seeds=config.seed, chosen=config.cell, ranks=ranks_of(config.launcher))
        engine = RayEngine() if config.engine == "ray" else LocalEngine()
        session = Session(
            plan, out, engine, jobs=config.jobs, launcher=config.launcher, device=config.device, changed=save
        )
        save(session)
        session.run()
        save(session)
        result = summarise(session, command)
        if config.report and any(cell["seeds"] for cell in result["cells"]):
            log.info("%s shows all of it", write_page(result, out, images[1].location, study.scale, config.device))
        return result


def write_page(result: Mapping[str, Any], out: Path, evaluation: str, scale: Scale, device: str) -> Path:
    """Analyse the first student of each cell and the teachers that were trained here, and write STUDY.html.

    Args:
        result: content of the study's JSON file.
        out: folder of the study.
        evaluation: location of the evaluation images.
        scale: scale of the study.
        device: device of the networks.
    """
    from trainer.evidence.analyse import analyse_networks
    from trainer.evidence.networks import Network
    from trainer.evidence.report import write_report

    runs = {cell["name"]: cell["seeds"][0]["run"] for cell in result["cells"] if cell["seeds"]}
    runs |= {f"teacher {each['name']}": each["run"] for each in result["teachers"] if each["run"]}
    networks = [Network(name, run, out / run / "last", out / run) for name, run in runs.items()]
    analysis = out / f"{result['name']}-analysis"
    settings = {"crop_pct": scale.evaluate.get("crop_pct"), **scale.eval_reading}
    analyse_networks(networks, AnalyseConfig(data=evaluation, out=analysis, attention=2, device=device, **settings))
    config = ReportConfig(out=out / f"{result['name']}.html", device=device)
    return write_report(config, [str(out / f"{result['name']}.json"), str(analysis)])
