"""The Ray engine on Ray's own multi-node test cluster: the same files, also when a node is lost (fault 11)."""

import os
import threading
import warnings
from pathlib import Path

import pytest
from support.background import in_background
from support.builders import make_labels, named_files, teacher_of, write_tars
from support.slow import node_of_this_process

from pipeline.errors import TeacherError, WorkerError
from pipeline.machine.progress import WorkDone
from pipeline.stage1 import ray as ray_engine
from pipeline.stage1.ray import plan_ray

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")]

TESTS = str(Path(__file__).parents[1])
SETTINGS = {"views": (0, 12), "views_per_shard": 2, "workers": 1, "accuracy_samples": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16, 16))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    teacher = teacher_of("support.slow:slow_cnn")
    return named_files(make_labels(tmp_path_factory.mktemp("whole") / "set", data, teacher=teacher, **SETTINGS).folder)


@pytest.fixture
def cluster(monkeypatch):
    """A head that runs nothing, and two nodes of one core."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'deit-cli[ray]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("SLOW_TEACHER_S", "0.2")  # so that a node is lost in the middle of its work
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made, nodes
    ray.shutdown()
    made.shutdown()


def labelled(out: Path, data: str, cluster, **settings) -> dict[str, bytes]:
    settings = SETTINGS | {"engine": "ray", "address": cluster.address} | settings
    return named_files(make_labels(out, data, **settings).folder)  # a worker of a lost node may still be writing


def test_a_lost_node_changes_no_byte(cluster, data, whole, tmp_path, monkeypatch):
    import ray

    made, nodes = cluster
    start, nodes_of_tasks = ray_engine._RayWorkers._start, []

    def start_and_look(workers: ray_engine._RayWorkers) -> None:
        nodes_of_tasks.append(ray.get(workers._dispatcher.__ray_call__.remote(node_of_this_process)))
        start(workers)

    monkeypatch.setattr(ray_engine._RayWorkers, "_start", start_and_look)

    def lose_a_node(ended: threading.Event) -> None:
        while len(list(tmp_path.glob("set/labels/*/*.parquet"))) < 3:
            if ended.wait(0.05):
                return
        made.remove_node(nodes[0], allow_graceful=False)

    with in_background(lose_a_node):
        got = labelled(tmp_path / "set", data, made, teacher=teacher_of("support.slow:slow_cnn"))
    assert got == whole
    assert len(nodes_of_tasks) >= 3  # two workers, and another for the one that was lost
    assert set(nodes_of_tasks) == {node_of_this_process()}  # or the tasks of all would be lost with some node


def test_what_a_worker_cannot_do_arrives_as_its_own_error(cluster, data, tmp_path):
    made, _ = cluster
    with pytest.raises(TeacherError, match="is not the teacher that this run began with"):
        labelled(tmp_path / "set", data, made, teacher=teacher_of("support.builders:changing_cnn"))


def test_where_no_cluster_answers_the_address_is_named(data, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'deit-cli[ray]'")
    with pytest.raises(WorkerError, match=r"--address 127.0.0.1:1: no Ray cluster answers"):
        make_labels(tmp_path / "set", data, engine="ray", address="127.0.0.1:1", **SETTINGS)


def test_reports_can_be_sent():
    import pickle

    assert pickle.loads(pickle.dumps(WorkDone(views=3))) == WorkDone(views=3)


@pytest.mark.parametrize(
    ("nodes", "device", "processes", "plan"),
    [
        ([{"CPU": 4.0}, {"CPU": 2.0}], "auto", None, ("cpu", 6, 1)),
        ([{}, {"CPU": 2.0}], "auto", None, ("cpu", 2, 1)),
        ([{"CPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}], "auto", None, ("cuda", 4, 8)),  # the node without a GPU is left
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 2.0}], "cuda", None, ("cuda", 6, 4)),
        ([{"CPU": 1.0, "GPU": 4.0}], "auto", 2, ("cuda", 2, 1)),
        ([{"CPU": 32.0, "GPU": 4.0}], "cpu", None, ("cpu", 32, 1)),
        ([{}], "auto", None, ("cpu", 1, 1)),
    ],
)
def test_a_ray_cluster_has_a_worker_for_each_gpu_with_its_share_of_the_cores(nodes, device, processes, plan):
    assert plan_ray(nodes, device, processes) == plan
