"""The command line: Hydra composes the files of `configs/` into the typed settings of `cosprobe.config`.

It is Hydra's: sweeps with `-m`, `--cfg job`, `--info`, `--config-dir`, interpolation and shell completion. Departures:
`--help` explains every setting; a mistake ends in one line with the nearest name and exit code 2; overrides with `+`
and `~` are refused, because settings are typed and their names fixed; every job of a sweep runs in a process of its own
and has a run folder that is named after its overrides. Hydra writes no log and no output folder.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints
from unittest.mock import patch

import hydra
import yaml
from docstring_parser import parse_from_object
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosprobe.config import SCHEMAS, CaptureConfig, TrainRun, UseRun
from cosprobe.differences import check_same, flattened
from cosprobe.errors import InputError, Terminated
from cosprobe.files import FULL, disk_error, make_folder, whole_file
from cosprobe.processes import LOST, end_others, tell
from cosprobe.runs import RUN_FILE, find_result, results
from cosprobe.tasks import identifying

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "commands"  # in a wheel; in a checkout, the commands and `configs/` are beside the package
CONFIGS = (INSTALLED if INSTALLED.is_dir() else PACKAGE.parent) / "configs"
FLAGS = {
    "--help": "print this text, for the chosen groups",
    "--cfg job": "print every setting as YAML",
    "-m": "sweep: one run for each combination of values separated by commas",
    "--config-dir": "a folder with further options of the groups, such as probe/mine.yaml",
    "--hydra-help": "print all other flags",
}
MARK = "# sha256 of the other lines: "  # first line of a saved configuration
SWEEP_FILE = Path("runs", "multirun.yaml")  # in hydra.sweep.dir of the configuration files
LONG = {"plan=true": "plan.only=true", "plan=false": "plan.only=false"}  # settings that can be written shorter
# settings that do not name the folder of a job in a sweep
NO_DIFFERENCE = ("run_dir", "store", "trainer", "plan", "hydra")
TRANSPORT = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")  # in errors of torch
# Parameters of `mallopt` and the values set by `keep_freed_memory`. Source: malloc.h of the GNU C library.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26}

Run = TypeVar("Run", TrainRun, UseRun)
Root = type[TrainRun] | type[UseRun]


@dataclass(frozen=True)
class Composed:
    """Settings as Hydra composed them. choices: the chosen option of each group. overrides: as typed."""

    settings: DictConfig
    choices: Mapping[str, str]
    overrides: tuple[str, ...]


def command(root: type[Run], body: Callable[[Run], None], about: str, argv: Sequence[str] | None = None) -> int:
    """Runs `body` on the settings in `argv` (default: the command line) and returns the exit code.

    root: class of the settings. about: first part of the help text.
    Exit codes: 0 success; 2 InputError, or an error of the operating system for a file, printed in one line on stderr;
    130 stopped by ctrl-C; 143 by SIGTERM. Any other exception is a bug and is raised with its traceback.
    """
    arguments = [LONG.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    keep_freed_memory()
    with _terminable():
        code = _command(root, body, about, arguments)
    if code:
        end_others()
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Raises Terminated in the block for SIGTERM, if it runs in the main thread and nothing else handles the signal.

    Python drops an exception that a signal raises while a finaliser runs. Such a signal is sent again. An error of a
    file in another thread is not printed: TensorBoard raises it in the main thread as well.
    """
    hook, of_threads = sys.unraisablehook, threading.excepthook

    def stop(signum: int, frame: Any) -> None:
        raise Terminated

    def again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            number = signal.SIGTERM if dropped.exc_type is Terminated else signal.SIGINT
            later = threading.Timer(0.05, os.kill, (os.getpid(), number))  # when the finaliser has ended
            later.daemon = True
            later.start()
        else:
            hook(dropped)

    def in_thread(failed: Any) -> None:
        if not issubclass(failed.exc_type, OSError):
            of_threads(failed)

    plain = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if plain:
        signal.signal(signal.SIGTERM, stop)
        sys.unraisablehook, threading.excepthook = again, in_thread
    try:
        yield
    finally:
        if plain:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.unraisablehook, threading.excepthook = hook, of_threads


def _command(root: type[Run], body: Callable[[Run], None], about: str, arguments: Sequence[str]) -> int:
    try:
        flags = _flags(arguments)
        if flags.help:
            print(describe(root, arguments, about))
            return 0
        if any(override.startswith(("+", "~")) for override in flags.overrides):
            raise _explained(root, arguments)  # typed settings have fixed names, but Hydra would add or delete some
        if flags.multirun:
            _check_sweep(root, arguments)
        elif any("${" in override for override in flags.overrides) and not (flags.cfg or flags.info):
            load(root, arguments)  # in our words, before Hydra finds an interpolation that leads nowhere
        for composed in _by_hydra(root, arguments):
            body(_instantiated(composed))
    except InputError as error:
        tell("error: " + " ".join(str(error).split()))
        return 2
    except MemoryError:
        tell("error: not enough memory: lower pipeline.batch, task.problems or probe.memory")
        return 2
    except KeyboardInterrupt as stopped:
        by_signal = isinstance(stopped, Terminated)
        how = "stopped by SIGTERM" if by_signal else "stopped"
        tell(f"{how}; the same command continues from what is on disk")
        return 143 if by_signal else 130
    except SystemExit as ended:  # Hydra's argument parser
        return ended.code if isinstance(ended.code, int) else 0
    except Exception as error:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in TRANSPORT):
            tell(LOST)
            _end_group()
            return 2
        if (of_disk := disk_error(error)) is None:
            raise
        where = repr(str(of_disk.filename)) if of_disk.filename else "a file cannot be read or written"
        full = "; free some space" if of_disk.errno in FULL else ""
        tell(f"error: {where}: {of_disk.strerror}{full}")
        return 2
    return 0


def _end_group() -> None:
    """Ends this process if it is one of several: threads of gloo whose partner is gone would abort it at its end."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        end_others()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(2)


def load(root: type[Run], overrides: Sequence[str]) -> Run:
    """Reads settings into dataclasses. Raises InputError, in one line, for the first mistake."""
    return _instantiated(_composed(root, overrides))


def describe(root: Root, argv: Sequence[str], about: str) -> str:
    """The help text: `about` (purpose and examples), the groups and their options, every setting with its meaning."""
    composed = _composed(root, argv)
    lines: list[str] = [about.strip(), "", "Groups (group=option; * = chosen):"]
    for group in _groups(root):
        options = _options(group, _flags(argv).config_dir)
        marked = [f"{option}*" if option == composed.choices[group] else option for option in options]
        lines.append(f"  {group:<12}{', '.join(marked)}")
    lines += ["", "Settings (name=value):"]
    meanings = dict(_meanings(composed.settings))
    needed = OmegaConf.missing_keys(composed.settings)
    for name in _names(composed.settings):
        if not isinstance(OmegaConf.select(composed.settings, name), DictConfig):
            setting = f"{name}={'(needed)' if name in needed else _shown(composed.settings, name)}"
            lines += [f"  {setting}", f"      {meanings[name]}"]
    return "\n".join([*lines, "", "Flags:", *(f"  {flag:<14}{meaning}" for flag, meaning in FLAGS.items())])


def save_config(run: TrainRun, folder: Path, model: Mapping[str, str] | None = None) -> Path:
    """Writes every setting of `run` to `folder/config.yaml`, atomically, and returns the file. See also `read_run`.

    model: fingerprint of the model. A file with the same content stays. Raises InputError when `folder` is a file or
    cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run_dir={str(folder)!r}: is a file; expected a folder, or a name that is free")
    make_folder(folder)
    path, text = folder / RUN_FILE, _text(run, model or {})
    text = f"{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    if not path.is_file() or path.read_bytes() != text.encode():
        with whole_file(path) as part:  # every process of a distributed run writes the same text
            part.write_text(text)
    return path


def read_run(folder: str | Path) -> TrainRun:
    """Reads the settings of a result. folder: its folder, or a run folder with one result.

    Raises InputError when `config.yaml` is missing, damaged or was edited, and for several results.
    """
    path = find_result(folder) / RUN_FILE
    saved = _saved(path)
    saved.pop("model", None)
    try:
        cfg = OmegaConf.structured(TrainRun)
        for group, option in saved.pop("groups").items():
            cfg[group] = OmegaConf.structured(SCHEMAS[group][option])
        cfg.merge_with(saved)
        return cast(TrainRun, OmegaConf.to_object(cfg))
    except (OmegaConfBaseException, AttributeError, KeyError, TypeError) as error:
        reason = str(error).strip("'").splitlines()[0]
        raise InputError(
            f"run={str(folder)!r}: {RUN_FILE} is of another version ({reason}); run train.py again"
        ) from error


def _saved(path: Path) -> dict[str, Any]:
    """The content of a `config.yaml`, after its checksum was compared."""
    if not path.is_file():
        raise InputError(f"run={str(path.parent)!r}: expected the folder of a train.py run, found no {RUN_FILE}")
    head, _, text = path.read_bytes().partition(b"\n")
    if head.decode(errors="replace") != f"{MARK}{hashlib.sha256(text).hexdigest()}":
        raise InputError(
            f"run={str(path.parent)!r}: {RUN_FILE} is damaged, was edited, or is of another version, but it says what "
            "the result was made with; restore it, or delete it and run the same train.py command, which writes it"
        )
    return yaml.safe_load(text)


def shell_command(run: TrainRun | UseRun) -> str:
    """The command line that gives these settings, whatever was typed: every setting that differs from its default."""
    groups = {name: value for name, value in _chosen(run).items() if name != "experiment" or value != "probes"}
    words = [f"{group}={option}" for group, option in groups.items()]
    plain = _composed(type(run), words).settings
    for name, value in flattened(asdict(run)).items():
        default = OmegaConf.select(plain, name, throw_on_missing=False)
        if value != (OmegaConf.to_object(default) if OmegaConf.is_config(default) else default):
            words.append(f"{name}={_typed(value)}")
    # words with quotes of Hydra are easier to read in double quotes
    return " ".join(
        f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)
        for word in ("python", f"{run.entry}.py", *words)
    )


def _typed(value: Any) -> str:
    """A value as it is typed on Hydra's command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"


def check_results(run: TrainRun, run_dir: Path, model: Mapping[str, str] | None = None) -> None:
    """Raises InputError when a run folder has a result with another model, other problems or other activations, or the
    training of a video model.

    model: fingerprint of the model of `run`; default: models are not compared, which needs neither torch nor diffusers.
    """
    if (run_dir / RUN_FILE).is_file():
        raise InputError(
            f"run_dir={str(run_dir)!r}: a model was trained in this folder; expected a folder of probes, or a new one"
        )
    advice = "choose another run_dir (activations are shared between run folders) or delete that folder"
    for folder in results(run_dir):
        made_with = _saved(folder / RUN_FILE).get("model")
        if not isinstance(made_with, dict):  # one hash for the whole model
            raise InputError(f"run_dir: {str(folder)!r} is a result of another version of cosprobe; {advice}")
        before = _of_activations(read_run(folder), made_with if model is not None else {})
        now = _of_activations(run, model or {})
        if model is None:  # what is left to the defaults of the model is not known yet
            now["pipeline"] = {name: v or before["pipeline"].get(name) for name, v in now["pipeline"].items()}
        check_same(before, now, f"run_dir: {str(run_dir)!r} has a result", advice)


def _of_activations(run: TrainRun, model: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a run that its activations depend on. The model is known by its content, not by its place."""
    kept = {entry.name for entry in fields(CaptureConfig)}
    return {
        "model": dict(model),
        "task family": next(name for name, kind in SCHEMAS["task"].items() if kind is type(run.task)),
        "task": identifying(run.task),
        "pipeline": run.pipeline.shaping,
        "probe": {name: v for name, v in vars(run.probe).items() if name in kept},
        "seed": run.seed,
    }


def keep_freed_memory() -> None:
    """Lets this process reuse up to 2 GiB of freed memory for later tensors.

    By default the GNU C library returns such memory to the kernel. Every tensor of several megabytes then gets new
    pages, and the kernel has to zero each of them. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        for name, value in KEPT.items():
            ctypes.CDLL(None).mallopt(name, value)


def job_name(overrides: Sequence[str]) -> str:
    """What distinguishes a job of a sweep, in letters that need no quotes: `seed=1 probe.kind=ridge` is
    `seed-1-kind-ridge`.

    A name is the last part of its dotted name, or all of it when two overrides end alike. A value with other letters
    than `A-Za-z0-9._-` gets a short hash, so that two values never give one name.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    named = [o for o in parsed if (o.key_or_group or "").split(".")[0].split("/")[0] not in NO_DIFFERENCE]
    tails = [str(o.key_or_group).rpartition(".")[2] for o in named]
    parts = []
    for override, tail in zip(named, tails, strict=True):
        text = (override.input_line or "").partition("=")[2]
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")
        code = "" if plain == text else f"-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
        name = tail if tails.count(tail) == 1 else str(override.key_or_group).replace(".", "-")
        parts.append(f"{name}-{plain}{code}")
    return "-".join(parts)


def _by_hydra(root: Root, arguments: Sequence[str]) -> list[Composed]:
    """Runs Hydra's command line. Returns the settings of the run; none after a sweep or a flag that only prints."""
    found: list[Composed] = []
    folder = _flags(arguments).config_dir
    program = [*sys.argv[: len(sys.argv) - len(arguments)], *(["--config-dir", folder] if folder else [])]

    def job(settings: DictConfig) -> None:
        state = HydraConfig.get()
        composed = Composed(settings, dict(state.runtime.choices), tuple(state.overrides.task))
        if state.mode == RunMode.MULTIRUN:
            _run_job(root, composed, program)
        else:  # the body runs when Hydra has ended, so that Lightning starts its processes with the same command
            found.append(composed)

    _register()
    main = hydra.main(config_path=str(CONFIGS), config_name=root.entry, version_base="1.3")
    with patch.object(sys, "argv", [sys.argv[0], *arguments]), patch.dict(os.environ, HYDRA_FULL_ERROR="1"):
        try:
            main(job)()
        except InputError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise _explained(root, arguments, error) from error
        finally:
            if _flags(arguments).multirun:  # Hydra writes its own settings beside the run folders
                SWEEP_FILE.unlink(missing_ok=True)
    return found


def _run_job(root: Root, composed: Composed, program: Sequence[str]) -> None:
    """Runs one job of a sweep in a process of its own. Raises InputError when it fails."""
    overrides = _job_overrides(root, composed)
    ended = subprocess.run([sys.executable, *program, *overrides], check=False)
    if ended.returncode:
        raise InputError(f"job {' '.join(overrides)}: ended with exit code {ended.returncode}")


def _job_overrides(root: Root, composed: Composed) -> list[str]:
    """The overrides of a job of a sweep, with a run folder of its own."""
    overrides: list[str] = [o for o in composed.overrides if not o.lstrip("+").startswith("hydra.")]
    if root is TrainRun and not composed.settings.run_dir:
        values = [o for o in overrides if o.partition("=")[0] not in ("task", "probe", "experiment")]
        overrides.append(f"run_dir={'-'.join(part for part in (_run_dir(composed.choices), job_name(values)) if part)}")
    return overrides


def _check_sweep(root: Root, arguments: Sequence[str]) -> None:
    """Raises InputError for the first mistake in any job of a sweep, and for two jobs with one run folder."""
    flags = _flags(arguments)
    if any(o.lstrip("+").startswith("hydra") for o in flags.overrides):
        return  # another sweeper may decide on the jobs
    try:
        jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(flags.overrides), None)[0]
    except HydraException as error:
        raise _explained(root, arguments, error) from error
    folders: dict[str, list[str]] = {}
    for job in jobs:
        composed = _composed(root, [*job, *(["--config-dir", flags.config_dir] if flags.config_dir else [])])
        run = _instantiated(composed)
        if isinstance(run, TrainRun):
            last = _job_overrides(root, composed)[-1] if not composed.settings.run_dir else f"run_dir={run.run_dir}"
            if last in folders:
                raise InputError(
                    f"{last}: two jobs of the sweep ({' '.join(folders[last])}; {' '.join(job)}) have this folder; "
                    "leave run_dir out, or write one that differs, such as run_dir=runs/seed-${seed}"
                )
            folders[last] = job


def _composed(root: Root, arguments: Sequence[str]) -> Composed:
    """Composes the settings, without running anything."""
    flags = _flags(arguments)
    overrides = tuple(flags.overrides)
    try:
        if flags.config_dir:  # its files may change between two calls
            extra = f"hydra.searchpath=[file://{Path(flags.config_dir).resolve()}]"
            return Composed(*_compose.__wrapped__(root.entry, (*overrides, extra)), overrides)
        settings, choices = _compose(root.entry, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _explained(root, arguments, error) from error
    return Composed(deepcopy(settings), choices, overrides)


@lru_cache(maxsize=256)
def _compose(entry: str, overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """The settings, and the chosen option of each group. entry: the configuration file of a command.

    They are kept: Hydra takes a tenth of a second, a mistake needs the defaults, and a command is composed before Hydra
    runs it.
    """
    _register()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose(entry, list(overrides), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    return cfg, choices


def _flags(arguments: Sequence[str]) -> Namespace:
    """The flags and overrides among the arguments. Raises InputError for an unknown flag."""
    known, unknown = get_args_parser().parse_known_args(list(arguments))
    if unknown:
        raise InputError(f"{unknown[0]}: unknown flag; flags: {', '.join(FLAGS)}; settings are name=value")
    return known


def _instantiated(composed: Composed) -> Any:
    """The settings as dataclasses, with the default of `run_dir`. Raises InputError for a setting without a value."""
    try:
        _check_conversions(composed)
        missing = OmegaConf.missing_keys(composed.settings)
        if missing:
            raise InputError(f"{min(missing)}: expected {min(missing)}=FOLDER, the folder of a finished train.py run")
        run = OmegaConf.to_object(composed.settings)
    except OmegaConfBaseException as error:  # an interpolation of an unknown setting
        raise InputError(f"{' '.join(composed.overrides)}: {' '.join(str(error).split())}") from error
    if isinstance(run, TrainRun) and not run.run_dir:
        run.run_dir = _run_dir(composed.choices)
    return run


def _check_conversions(composed: Composed) -> None:
    """Raises InputError for values that OmegaConf would turn into others: a number in place of true or false (any but 0
    is true to it), and numbers or true in place of a text (`run_dir=1e3` would be the folder 1000.0)."""
    for override in OverridesParser.create().parse_overrides(list(composed.overrides)):
        name = str(override.key_or_group)
        found = OmegaConf.select(composed.settings, name)
        if isinstance(found, bool):
            for value in _values(override):
                if value.lower() not in ("true", "false") and "${" not in value:
                    raise InputError(f"{override.input_line}: expected true or false")
        if isinstance(found, str) and not override.is_sweep_override() and not isinstance(override.value(), str):
            typed = str(override.input_line).partition("=")[2]
            if isinstance(override.value(), int | float) and found != typed:
                raise InputError(f"{override.input_line}: would be read as {found}; write \"{name}='{typed}'\"")


def _run_dir(choices: Mapping[str, str]) -> str:
    return f"runs/{choices['task']}-{choices['probe'] if choices['experiment'] == 'probes' else choices['experiment']}"


@cache
def _register() -> None:
    """Tells Hydra the dataclasses of all groups, once."""
    store = ConfigStore.instance()
    for kind in (TrainRun, UseRun):
        store.store(group="schema/root", name=kind.entry, node=kind)
    for group, options in SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def _explained(root: Root, arguments: Sequence[str], error: Exception | None = None) -> InputError:
    """The first mistake in the overrides, with what is possible instead; Hydra's own words if none is found."""
    reason = " ".join(str(error.__cause__ or error).split()) if error else "expected no + or ~"
    overrides: list[Override] = []
    flags = _flags(arguments)
    texts, folder = flags.overrides, flags.config_dir
    if not texts:
        return InputError(f"configs/: {reason}")
    for text in texts:
        try:
            overrides += OverridesParser.create().parse_overrides([text])
        except HydraException:
            name = text.partition("=")[0]
            signs = "; a value with signs such as ~ or , needs quotes"
            quoted = f"{signs}: \"{name}='...'\"" if "=" in text[1:] else ""
            return InputError(f"{text}: expected name=value, such as seed=0{quoted}")
    base = _composed(root, [])
    for override in overrides:
        if found := _wrong_option(base, override, folder):
            return InputError(found)
    if chosen := [str(o.input_line) for o in overrides if o.key_or_group in base.choices]:
        base = _composed(root, [*chosen, *(["--config-dir", folder] if folder else [])])
    for override in overrides:
        if override.key_or_group not in base.choices and (found := _wrong_setting(base, override)):
            return InputError(found)
    return InputError(f"{' '.join(texts)}: {reason}")


def _wrong_option(base: Composed, override: Override, folder: str | None) -> str:
    """What is wrong with the choice of an option of a group; empty if nothing is."""
    name, text = str(override.key_or_group), str(override.input_line)
    if name not in base.choices or "/" in name:
        return ""
    if added := _added(override):
        return added
    options = _options(name, folder)
    for value in _values(override):
        if value not in options:
            return (
                f"{text}: unknown option.{_guess(value, options, name + '=')} Options of {name}: {', '.join(options)}"
            )
    return ""


def _added(override: Override) -> str:
    """What is wrong with an override of a setting that exists, if it begins with a +; empty otherwise."""
    text = str(override.input_line)
    plus = override.is_add() or override.is_force_add()
    return f"{text}: {override.key_or_group} exists; write {text.lstrip('+')}, without the +" if plus else ""


def _values(override: Override) -> list[str]:
    """The texts that a setting gets, several in a sweep."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.input_line).partition("=")[2]]


def _wrong_setting(base: Composed, override: Override) -> str:
    """What is wrong with the value of a setting; empty if nothing is."""
    name, text = str(override.key_or_group), str(override.input_line)
    if name.split(".")[0].split("/")[0] == "hydra":
        return ""
    try:
        parent, leaf = _locate(base.settings, name)
    except KeyError as error:
        here, options = error.args
        return (
            f"{text}: unknown option.{_guess(name, list(_names(base.settings)))} "
            f"Options{' of ' + here if here else ''}: {', '.join(options) or 'none'}"
        )
    if added := _added(override):
        return added
    if override.is_delete():
        return f"{text}: expected name=value, such as seed=0"
    inside = OmegaConf.select(parent, leaf)
    if isinstance(inside, DictConfig):
        return f"{text}: {name} holds several options, set one of {', '.join(_names(inside, f'{name}.'))}"
    hint = get_type_hints(OmegaConf.get_type(parent))[leaf]
    for value in _values(override):
        try:
            parent[leaf] = value if hint is str else yaml.safe_load(value)
        except (yaml.YAMLError, OmegaConfBaseException):
            return f"{text}: expected {_words(hint)}; now it is {_shown(base.settings, name)}"
    if override.is_sweep_override():
        return f"{text}: a sweep needs -m; for one value with commas write \"{name}='{text.partition('=')[2]}'\""
    return ""


def _groups(root: Root) -> list[str]:
    """The groups of a command, in the order of its configuration file."""
    defaults = OmegaConf.load(CONFIGS / f"{root.entry}.yaml").defaults
    names = [str(name) for entry in defaults if isinstance(entry, DictConfig) for name in entry]
    return [name for name in names if not name.startswith(("/", "override"))]


def _options(group: str, folder: str | None = None) -> list[str]:
    """The options of a group: in `configs/`, and in the folder of `--config-dir`."""
    places = [CONFIGS, *([Path(folder)] if folder else [])]
    return sorted({path.stem for place in places for path in (place / group).glob("*.yaml")})


def _locate(cfg: DictConfig, name: str) -> tuple[DictConfig, str]:
    """The dict that holds the option `name`, and the last part of the name.

    Raises KeyError(name of the deepest existing dict, its options) when there is no such option.
    """
    *path, leaf = name.split(".")
    here = ""
    for part in path:
        inner = OmegaConf.select(cfg, part)
        if not isinstance(inner, DictConfig):
            raise KeyError(here, sorted(map(str, cfg.keys())))
        cfg, here = inner, f"{here}.{part}".strip(".")
    if leaf not in list(cfg.keys()):  # `leaf in cfg` is False for options without a value
        raise KeyError(here, sorted(map(str, cfg.keys())))
    return cfg, leaf


def _names(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options and groups."""
    for key in map(str, cfg.keys()):
        yield f"{prefix}{key}"
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig):
            yield from _names(node, f"{prefix}{key}.")


def _meanings(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of all options with the strings that follow the fields of their dataclasses."""
    schema = OmegaConf.get_type(cfg)
    for kind in reversed(schema.__mro__ if schema else ()):
        if is_dataclass(kind):
            yield from (
                (f"{prefix}{entry.arg_name}", str(entry.description)) for entry in parse_from_object(kind).params
            )
    for key in map(str, cfg.keys()):
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig):
            yield from _meanings(node, f"{prefix}{key}.")


def _shown(cfg: DictConfig, name: str) -> str:
    """The value of an option as it would be typed on the command line."""
    value = OmegaConf.select(cfg, name)
    value = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
    return value if isinstance(value, str) else json.dumps(value)


def _guess(word: str, options: Sequence[str], prefix: str = "") -> str:
    """` Did you mean X?` for the option most similar in its full name or in its last part; empty if none is similar."""

    def likeness(option: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, word, option).ratio()
        tail = difflib.SequenceMatcher(None, word.rpartition(".")[2], option.rpartition(".")[2]).ratio()
        return max(whole, tail), whole

    close = max((o for o in options if not word.startswith(f"{o}.")), key=likeness, default="")
    return f" Did you mean {prefix}{close}?" if close and likeness(close)[0] >= 0.6 else ""


def _words(hint: Any, many: bool = False) -> str:
    """A description of a type: `a whole number`, `a list of numbers`."""
    known = {int: "whole number", float: "number", str: "text"}
    if hint in known:
        return f"{known[hint]}s" if many else f"a {known[hint]}"
    if hint is bool:
        return "true or false"
    if hint is NoneType:
        return "null"
    inner = [part for part in get_args(hint) if part is not ...]
    if get_origin(hint) in (list, tuple):
        return f"{'lists' if many else 'a list'} of {_words(inner[0], many=True)}"
    return " or ".join(_words(part) for part in inner)


def _chosen(run: TrainRun | UseRun) -> dict[str, str]:
    """The chosen option of each group in SCHEMAS."""
    return {
        group: next(name for name, schema in options.items() if schema is type(getattr(run, group)))
        for group, options in SCHEMAS.items()
        if hasattr(run, group)
    }


def _text(run: TrainRun, model: Mapping[str, str]) -> str:
    """YAML of every setting. At the top, `groups` has the chosen option of each group in SCHEMAS, and `model` the
    fingerprint of the model."""
    made_from = OmegaConf.create({"groups": _chosen(run), "model": dict(model)})
    return OmegaConf.to_yaml(made_from) + OmegaConf.to_yaml(OmegaConf.structured(run))
