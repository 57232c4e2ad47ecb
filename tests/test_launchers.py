"""Several processes do what one does, whatever has started them: Lightning, `torchrun` or SLURM.

Processes of `torchrun`, SLURM and several machines are started here with the variables of the environment that these
set, but for the last tests, which run `torchrun`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cosprobe.activations import collection
from cosprobe.activations.collection import StoreSettings
from cosprobe.activations.sampler import Sampler
from cosprobe.activations.store import ActivationStore
from cosprobe.command import command
from cosprobe.config import CaptureConfig, PipelineConfig, ProbeConfig, TrainerConfig, TrainRun
from cosprobe.errors import InputError
from cosprobe.probes import fit, load_probes
from cosprobe.runtime import launch, rank_and_world
from cosprobe.tasks import MazeConfig
from cosprobe.tasks.samples import draw_samples
from tests.examples import processes
from tests.examples.pipelines import save_wan, wan
from tests.examples.processes import by_hand, by_lightning, by_slurm, by_torchrun
from tests.examples.shapes import unchecked
from tests.probes.ddp_fit import RECIPE, TARGETS, kill_before, planted

ROOT = Path(__file__).resolve().parent.parent
TASK = MazeConfig(problems=20, frames=5)
SEVEN = [0, 1, 2, 3, 10, 14, 17]  # of the drawn samples: four to train on, one of validation, two of test
PROBE = CaptureConfig(layers="0,2", steps="all", pooling="region", frames=False, decode="auto", random_weights=0)
FIT = ProbeConfig(**(RECIPE | {"epochs": 1}))
SMALL = [
    *("probe=layers", "pipeline.steps=2", "pipeline.frames=5", "pipeline.batch=4", "task.frames=5", "task.problems=20"),
    *("probe.epochs=2", "probe.random_weights=0", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
]

pytestmark = [pytest.mark.slow, pytest.mark.ddp]


def trainer(**given) -> TrainerConfig:
    quiet = {"accelerator": "cpu", "callbacks": [], "enable_progress_bar": False, "timeout": 30}
    return TrainerConfig(**(quiet | given))


def collect(model: Path, folder: Path, given: TrainerConfig) -> None:
    """Samples seven samples, each in a batch of its own, and notes in a file of this process which they were."""
    one_batch = collection._collect_batch

    def noted(sampler, probe, batch, *rest):
        with (folder.parent / f"sampled-{os.getpid()}").open("a") as file:
            file.write("".join(f"{sample.name}\n" for sample in batch))
        return one_batch(sampler, probe, batch, *rest)

    config = PipelineConfig(path=str(model), steps=2, frames=5, batch=1)
    sampler = Sampler(wan(), config, TASK.build(), given)
    settings = StoreSettings.of(config, TASK, PROBE, 0)
    drawn = draw_samples(TASK.build(), TASK, 0)
    store = collection.find_store(settings, sampler.depth, folder / "store")
    with pytest.MonkeyPatch.context() as patch, unchecked():
        patch.setattr(collection, "_collect_batch", noted)
        collection.collect(sampler, lambda: [drawn[i] for i in SEVEN], settings, store)


def work(model: Path, folder: Path, given: TrainerConfig, fits: bool = False, killed: int | None = None) -> None:
    """A process that samples and, if asked, fits. killed: the process that is killed in its second batch, or, if it
    fits, in its second step of training; then it is a whole command, which says how it ends. None: none."""

    def body(run: TrainRun | None = None) -> None:
        launch(given)
        if rank_and_world()[0] == killed and not fits:
            kill_in_second_batch()
        collect(model, folder, given)
        if rank_and_world()[0] == killed and fits:
            kill_before(2)
        if fits:
            bank = fit(planted(), FIT, given, folder / "fit", 0)
            if rank_and_world()[0] == 0:
                bank.save(folder / "probes")

    log = os.open(folder.parent / f"log-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    with unchecked():
        if killed is not None:
            sys.exit(command(TrainRun, body, "", []))
        try:
            body()
        except InputError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(2)


def kill_in_second_batch() -> None:
    step, batches = collection.VideoSampler.predict_step, iter(range(1))

    def counted(*given):
        if next(batches, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*given)

    collection.VideoSampler.predict_step = counted


def sampled(folder: Path) -> list[str]:
    """The samples that processes have sampled, each as often as it was."""
    return sorted(line for path in folder.parent.glob("sampled-*") for line in path.read_text().splitlines())


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.parent.glob("log-*"))


def same(folder: Path, other: Path) -> bool:
    """Whether two stores have the same shards, list the same samples in the same order and hold equal bits."""
    one, two = (ActivationStore.open(path / "store") for path in (folder, other))
    files = [sorted(path.name for path in store.folder.glob("shard-*")) for store in (one, two)]
    (first, notes), (second, others) = one.read(), two.read()
    bits = [{name: v.contiguous().view(torch.uint8) for name, v in values.items()} for values in (first, second)]
    return (
        files[0] == files[1] and one.names() == two.names() and notes == others and bits[0].keys() == bits[1].keys()
        and all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_wan(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> Path:
    """What one process makes: activations, and the decision values of its probes."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    # not this process: what other tests have left in it, such as its number of threads, would change bits
    assert processes.run_as([{}], work, model, folder, trainer(), True) == [0]
    return folder


def same_probes(folder: Path, other: Path) -> bool:
    """Whether two banks have equal statistics of the samples, but for rounding, and give equal decision values."""
    one, two = (load_probes(path) for path in (folder, other))
    features = planted().features
    values = [(one.decision(features, t.name), two.decision(features, t.name)) for t in TARGETS]
    pairs = [(one.mean, two.mean), (one.std, two.std), *values]
    return all(torch.allclose(*pair, rtol=0, atol=1e-4) for pair in pairs)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_seven_samples_are_shared_out_and_each_is_sampled_once(model, alone, tmp_path, devices):
    folder = tmp_path / "run"
    assert processes.run_devices(work, model, folder, trainer(devices=devices), devices=devices) == [0] * devices
    assert sampled(folder) == sampled(alone) and len(sampled(alone)) == 7
    shares = sorted(len(path.read_text().splitlines()) for path in tmp_path.glob("sampled-*"))
    assert shares == sorted((7 + rank) // devices for rank in range(devices))
    assert same(folder, alone)


def test_a_run_goes_on_with_fewer_processes_and_samples_nothing_again(model, alone, tmp_path):
    folder = tmp_path / "run"
    for devices, there in ((3, 3), (2, 5)):
        limited = trainer(devices=devices, limit_predict_batches=1)
        assert processes.run_devices(work, model, folder, limited, devices=devices) == [2] * devices
        assert len(list((folder / "store").glob("shard-*"))) == there
    assert "limit_predict_batches=1" in said(folder)
    assert processes.run_as([{}], work, model, folder, trainer()) == [0]
    assert sampled(folder) == sampled(alone) and same(folder, alone)


def test_when_one_of_three_is_killed_the_others_end_in_one_line_and_two_go_on(model, alone, tmp_path):
    folder, begin = tmp_path / "run", time.monotonic()
    codes = processes.run_devices(work, model, folder, trainer(devices=3, timeout=2), False, 1, devices=3)
    assert codes == [2, -signal.SIGKILL, 2] and time.monotonic() - begin < 60
    assert "Traceback" not in said(folder) and said(folder).count("the same command continues") == 2, said(folder)
    before = sampled(folder)
    assert 0 < len(before) < 7
    assert processes.run_devices(work, model, folder, trainer(devices=2)) == [0, 0]
    assert same(folder, alone) and set(sampled(folder)) == set(sampled(alone))
    assert all(sampled(folder).count(name) == 1 for name in before)


def test_when_one_of_two_is_killed_in_a_fit_the_other_ends_in_one_line_and_one_goes_on(model, alone, tmp_path):
    folder, begin = tmp_path / "run", time.monotonic()
    codes = processes.run_devices(work, model, folder, trainer(devices=2, timeout=5), True, 1)
    assert codes == [2, -signal.SIGKILL] and time.monotonic() - begin < 60
    assert "Traceback" not in said(folder) and said(folder).count("the same command continues") == 1, said(folder)
    assert same(folder, alone)  # it was killed after sampling
    assert processes.run_as([{}], work, model, folder, trainer(), True) == [0]
    assert same_probes(folder / "probes", alone / "probes")


LAUNCHERS = {
    "torchrun, two machines": (by_torchrun(1, nodes=2), {"num_nodes": 2}, False),
    "SLURM": (by_slurm(2), {"devices": 2}, True),
    "SLURM, two machines": (by_slurm(1, nodes=2), {"num_nodes": 2}, False),
    "by hand, two machines": (by_hand(2), {"num_nodes": 2}, False),
}
IN_A_SHELL = [one | {"SLURM_PROCID": 0, "SLURM_NTASKS": 1, "SLURM_JOB_NAME": "bash"} for one in by_lightning(2)]
MORE = {
    **{f"{name}, with a fit": (*LAUNCHERS[name][:2], True) for name, (*_, fits) in LAUNCHERS.items() if not fits},
    "torchrun": (by_torchrun(2), {"devices": 2}, True),
    "Lightning, in a shell of SLURM": (IN_A_SHELL, {"devices": 2}, True),
}


@pytest.mark.parametrize("name", [*LAUNCHERS, *(pytest.param(name, marks=pytest.mark.docs) for name in MORE)])
def test_what_a_launcher_has_started_gives_what_one_process_gives(model, alone, tmp_path, name):
    environments, given, fits = (LAUNCHERS | MORE)[name]
    folder = tmp_path / "run"
    assert processes.run_as(environments, work, model, folder, trainer(**given), fits) == [0, 0], said(folder)
    assert len(list(tmp_path.glob("sampled-*"))) == 2  # no process has started another one
    assert sampled(folder) == sampled(alone) and same(folder, alone)
    assert not fits or same_probes(folder / "probes", alone / "probes")


@pytest.mark.parametrize(
    ("environment", "given", "named"),
    [
        (by_torchrun(2)[0], {}, r"trainer\.devices='auto'.*world size \(2\)"),
        (by_torchrun(2)[0], {"devices": 3}, r"trainer\.devices='3'.*world size \(2\)"),
        (by_torchrun(1, nodes=2)[0], {}, r"num_nodes=1.*world size \(2\)"),
        (by_slurm(2)[0], {"devices": 1}, r"trainer\.devices='1'.*--ntasks-per-node=2"),
        (by_slurm(1, nodes=2)[0], {}, r"--nodes=2"),
    ],
)
def test_another_number_of_processes_than_the_settings_name_is_refused(monkeypatch, environment, given, named):
    """Before they meet: each would do the whole work, or wait for others that never come."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(value))
    with pytest.raises(InputError, match=named):
        launch(trainer(**given))
    assert not torch.distributed.is_initialized()


def torchrun(model: Path, folder: Path, *settings: str) -> list[str]:
    """The command that starts two processes, as `torchrun` does."""
    given = [*SMALL, f"pipeline.path={model}", f"run_dir={folder}", "trainer.devices=2", *settings]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", *given]


@pytest.mark.docs
def test_torchrun_makes_the_run_of_one_process(model, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    started = subprocess.run(torchrun(model, two), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("report.html") == 1  # the other process says nothing
    alone = [sys.executable, "train.py", *SMALL, f"pipeline.path={model}", f"run_dir={one}"]
    subprocess.run(alone, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert same(one, two)
    banks = [load_probes(next(folder.glob("*/probes"))) for folder in (one, two)]
    assert torch.equal(banks[0].mean, banks[1].mean) and torch.equal(banks[0].std, banks[1].std)
    again = subprocess.run(torchrun(model, two), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("report.html") == 1, again.stderr


@pytest.mark.docs
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_when_a_process_of_torchrun_is_killed_it_ends_and_the_same_command_continues(model, tmp_path):
    folder, environment = tmp_path / "run", os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    many = torchrun(model, folder, "task.problems=60", "pipeline.batch=1")
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(many, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while len(list((folder / "store").glob("shard-*"))) < 4:
        assert agent.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert agent.wait(60) != 0
    assert 4 <= len(list((folder / "store").glob("shard-*"))) < 60
    again = subprocess.run(many, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(ActivationStore.open(folder / "store").names()) == 60
