"""Settings of `train.py` and `probe.py`: the root dataclasses. Only this module imports Hydra.

Hydra composes the groups of `configs/` into typed dataclasses. Overrides (`name=value`) are applied here and not by
Hydra: Hydra's own syntax accepts any name after a `+`, reads `probe.steps=0,10,20` as a sweep, and reports mistakes
with tracebacks. Only `save_config` writes to disk. No output folder is created, the working directory is not changed,
and no logging is set up.
"""

from __future__ import annotations

import difflib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosprobe.early_exit import EarlyConfig, PredictConfig
from cosprobe.ensembles import EnsembleConfig
from cosprobe.errors import InputError
from cosprobe.minimodel import AdapterConfig, MiniConfig
from cosprobe.models import PipelineConfig
from cosprobe.probes import ProbeConfig
from cosprobe.runtime import TrainerConfig, keep_freed_memory, make_folder, whole_file
from cosprobe.tasks import FAMILIES

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FLAGS = {"--help": "print this text, for the chosen groups", "--cfg": "print every setting and exit"}
RUN_FILE = "config.yaml"


@dataclass
class ProbeExperiment:
    """Trains probes on a frozen pipeline. It has no settings of its own: the other groups hold them."""


# Groups whose options are different classes. Options of the other groups are different values of one class.
SCHEMAS: dict[str, dict[str, type]] = {
    "task": dict(FAMILIES),
    "experiment": {"probes": ProbeExperiment, "mini": MiniConfig, "mini_small": MiniConfig, "lora": AdapterConfig},
    "use": {"predict": PredictConfig, "early": EarlyConfig, "ensemble": EnsembleConfig},
}


@dataclass
class TrainRun:
    """Settings of `train.py`.

    run_dir: the run folder; empty = `runs/<task>-<probe>`, or `runs/<task>-<experiment>` when the experiment is not
    `probes`. The same command continues its own run. seed: 0 or more.
    """

    entry: ClassVar[str] = "train"
    task: Any = MISSING  # a TaskConfig; OmegaConf does not support protocols as types
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    experiment: Any = MISSING
    run_dir: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)


@dataclass
class UseRun:
    """Settings of `probe.py`. use: what to do. run: folder of a finished `train.py` run. seed: 0 or more."""

    entry: ClassVar[str] = "probe"
    use: Any = MISSING
    run: str = MISSING
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)


Run = TypeVar("Run", TrainRun, UseRun)


def command(root: type[Run], body: Callable[[Run], None], about: str, argv: Sequence[str] | None = None) -> int:
    """Runs `body` on the settings in `argv` (default: the command line) and returns the exit code.

    root: class of the settings. about: first part of the help text.
    Exit codes: 0 success; 2 InputError, printed in one line on stderr; 130 stopped by ctrl-C.
    Any other exception is a bug and is raised with its traceback.
    """
    for module in ("lightning", "torch", "diffusers"):  # their warnings are for developers of cosprobe, not for users
        warnings.filterwarnings("ignore", module=rf"{module}\b")
    keep_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = [a for a in arguments if a in ("--help", "-h", "--cfg")]
    settings = [a for a in arguments if a not in wanted]
    try:
        if "--cfg" in wanted:
            print(_text(load(root, settings)), end="")
        elif wanted:
            print(describe(root, settings, about))
        else:
            body(load(root, settings))
    except InputError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues from what is on disk", file=sys.stderr)
        return 130
    return 0


def load(root: type[Run], argv: Sequence[str]) -> Run:
    """Reads the settings in `argv` into dataclasses. Raises InputError, in one line, for the first mistake."""
    choices, cfg = _composed(root, argv)
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise InputError(f"{min(missing)}: expected {min(missing)}=FOLDER, the folder of a finished train.py run")
    run = _instantiate(cfg)
    if isinstance(run, TrainRun) and not run.run_dir:
        last = choices["probe"] if choices["experiment"] == "probes" else choices["experiment"]
        run.run_dir = f"runs/{choices['task']}-{last}"
    return run


def describe(root: type[Run], argv: Sequence[str], about: str) -> str:
    """The help text: `about` (purpose and examples), the groups and their options, every setting with its value."""
    choices, cfg = _composed(root, argv)
    lines: list[str] = [about.strip(), "", "Groups (group=option; * = chosen):"]
    for group, chosen in choices.items():
        marked = [f"{option}*" if option == chosen else option for option in _options(group)]
        lines.append(f"  {group:<12}{', '.join(marked)}")
    lines += ["", "Settings (name=value):"]
    needed = OmegaConf.missing_keys(cfg)
    for name in _names(cfg):
        if not isinstance(OmegaConf.select(cfg, name), DictConfig):
            lines.append(f"  {name}={'(needed)' if name in needed else _shown(cfg, name)}")
    return "\n".join([*lines, "", "Flags:", *(f"  {flag:<12}{meaning}" for flag, meaning in FLAGS.items())])


def save_config(run: TrainRun, folder: Path) -> Path:
    """Writes every setting of `run` to `folder/config.yaml`, atomically, and returns the file. See also `read_run`.

    Raises InputError when `folder` is a file or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run_dir={str(folder)!r}: is a file; expected a folder, or a name that is free")
    make_folder(folder)
    with whole_file(folder / RUN_FILE) as part:  # every process of a distributed run writes the same text
        part.write_text(_text(run))
    return folder / RUN_FILE


def read_run(folder: str | Path) -> TrainRun:
    """Reads the settings of a run. Raises InputError when `config.yaml` is missing or cannot be read."""
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise InputError(f"run={str(folder)!r}: expected the folder of a train.py run, found no {RUN_FILE}")
    try:
        saved = yaml.safe_load(path.read_text())
        if not isinstance(saved, dict):
            raise TypeError("no settings in it")
        cfg = OmegaConf.structured(TrainRun)
        for group, option in saved.pop("groups").items():
            cfg[group] = OmegaConf.structured(SCHEMAS[group][option])
        cfg.merge_with(saved)
        return _instantiate(cfg)
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, KeyError, TypeError) as error:
        reason = str(error).strip("'").splitlines()[0]
        raise InputError(
            f"run={str(folder)!r}: {RUN_FILE} is damaged or of another version ({reason}); run train.py again"
        ) from error


def _composed(root: type[Run], argv: Sequence[str]) -> tuple[dict[str, str], DictConfig]:
    """The option chosen in each group, and the settings with all overrides in `argv` applied."""
    defaults = OmegaConf.load(CONFIGS / f"{root.entry}.yaml").defaults
    pairs = [pair for entry in defaults if isinstance(entry, DictConfig) for pair in entry.items()]
    choices = {str(group): str(option) for group, option in pairs if not str(group).startswith("/")}
    values = []
    for argument in argv:
        if argument.startswith("-"):
            raise InputError(f"{argument}: unknown flag; flags: {', '.join(FLAGS)}; settings are name=value")
        name, equals, text = argument.partition("=")
        if not equals or not name or name.startswith("~"):
            raise InputError(f"{argument}: expected name=value, such as seed=0")
        if name.lstrip("+") not in choices:
            values.append((argument, name, text))
            continue
        group = name.lstrip("+")
        if text not in _options(group):
            raise InputError(
                f"{argument}: unknown option.{_guess(text, _options(group), group + '=')} "
                f"Options of {group}: {', '.join(_options(group))}"
            )
        choices[group] = text
    cfg = _compose(root, choices)
    for argument, name, text in values:
        _assign(cfg, argument, name, text)
    return choices, cfg


def _compose(root: type[Run], choices: dict[str, str]) -> DictConfig:
    store = ConfigStore.instance()
    for kind in (TrainRun, UseRun):
        store.store(group="schema/root", name=kind.entry, node=kind)
    for group, options in SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
    overrides = [f"{group}={option}" for group, option in choices.items()]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(root.entry, overrides)
    except (HydraException, OmegaConfBaseException) as error:  # a mistake in a file in configs/
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"configs/ ({', '.join(overrides)}): {reason}") from error


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _assign(cfg: DictConfig, argument: str, name: str, text: str) -> None:
    """Sets one option. Options of type str keep the text as typed; others are read as YAML, checked by OmegaConf."""
    plain = name.lstrip("+")
    try:
        parent, leaf = _locate(cfg, plain)
    except KeyError as error:
        here, options = error.args
        raise InputError(
            f"{argument}: unknown option.{_guess(plain, list(_names(cfg)))} "
            f"Options{' of ' + here if here else ''}: {', '.join(options) or 'none'}"
        ) from None
    if name != plain:
        raise InputError(f"{argument}: {plain} exists; write {plain}={text}, without the +")
    inside = OmegaConf.select(parent, leaf)
    if isinstance(inside, DictConfig):
        several = ", ".join(_names(inside, f"{plain}."))
        raise InputError(f"{argument}: {plain} holds several options, set one of {several}")
    if "${" in text or "???" in text:
        raise InputError(f"{argument}: expected a value; interpolations belong in configs/")
    hint = get_type_hints(OmegaConf.get_type(parent))[leaf]
    try:
        parent[leaf] = text if hint is str else yaml.safe_load(text)
    except (yaml.YAMLError, OmegaConfBaseException):
        raise InputError(f"{argument}: expected {_words(hint)}; now it is {_shown(cfg, plain)}") from None


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


def _instantiate(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:  # an interpolation of an unknown option
        raise InputError(" ".join(str(error).split())) from error


def _text(run: TrainRun | UseRun) -> str:
    """YAML of every setting. `groups` at the top has the chosen option of each group in SCHEMAS."""
    groups = {
        group: next(name for name, schema in SCHEMAS[group].items() if schema is type(getattr(run, group)))
        for group in SCHEMAS
        if hasattr(run, group)
    }
    return OmegaConf.to_yaml(OmegaConf.create({"groups": groups})) + OmegaConf.to_yaml(OmegaConf.structured(run))


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"seed={seed}: expected 0 or more")
