"""Generated bad settings, models, adapters, run folders, checkpoints: refused in one line, or the result is right."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from cosprobe.command import load
from cosprobe.config import SAMPLING, TrainRun, UseRun
from cosprobe.models import fingerprint
from cosprobe.probes import ChecksumIO
from cosprobe.runs import RUN_FILE, find_result
from tests.examples.adapters import adapter
from tests.torture import killed
from tests.torture.world import Ended, World, content, differences, run

Say = Callable[[str], None]
NUMBERS = (
    *("-1", "0", "1000000000000", "9223372036854775808", "1.5", "-0.5", ".nan", "-.inf", ".inf", "1e400", "abc", "''"),
    *("null", "[]", "[1,2]", "{a:1}", "true", "0x10", "1_0", "é", "${nope}", "${seed}", "--", "1,2", "1;2"),
)
LISTS = (
    *("[]", "[.nan]", "[.inf,1]", "[-1]", "[0]", "[[1]]", "[1,[2]]", "null", "abc", "3", "[null]", "[true]", "[a]"),
    *("[1000000000000]", "{a:[1]}", "[9,1]", "[63,64]"),
)
TEXTS = (
    *("''", "' '", "/dev/null", "/proc/self/mem", "/nowhere/x", "..", ".", "nowhere", "x" * 300, "'a b'", "日本"),
    *("'$(x)'", "'a\\nb'", "'%s'", "null", "[]", "{a:1}", "-1", "0:0:0", "1:", ":,", "5,5", "99", "a,b", "'*'"),
    *("~nobody/x", "true"),
)
SLOW = ("trainer.num_nodes",)  # a second machine that never comes is waited for
FEW = ["task.problems=24", "probe.random_weights=0", "probe.decode=0", "probe.epochs=1", "pipeline.steps=2"]


def give(world: World, count: int, rng: np.random.Generator, say: Say) -> dict[str, int]:
    """Gives `count` bad inputs of all kinds. Returns the numbers of inputs and of faults."""
    counts = {"inputs": 0, "refused": 0, "accepted": 0, "tracebacks": 0, "silent": 0, "no end": 0, "outside": 0}
    few = [settings, settings, uses, models, adapters, folders]
    kinds = [*few, *few, fits, fits, trainings]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind in (fits, trainings):
            killed.make(world)  # before new folders are counted
        before = set(world.root.iterdir()) | {world.root / name for name in ("tried", "log", "model", "lora")}
        what, ended, wrong = kind(world, rng)
        counts["inputs"] += 1
        counts["refused"] += ended.one_line
        counts["accepted"] += ended.code == 0
        counts["no end"] += ended.code is None
        bad = not (ended.one_line or ended.code == 0 or ended.code is None)
        counts["tracebacks"] += ended.traceback or bad
        counts["silent"] += bool(wrong)
        typed = what.partition("=")[2].strip("'") if what.startswith(("run_dir", "store")) else ""
        new = {path for path in set(world.root.iterdir()) - before if path.name != typed}
        (world.root / typed).is_dir() and typed not in ("", ".", "..") and shutil.rmtree(world.root / typed)
        counts["outside"] += bool(new)
        if ended.traceback or bad or wrong or ended.code is None or new:
            say(f"{what}: exit code {ended.code} {wrong} {[path.name for path in new]} {ended.said[-400:]}")
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
    return counts


def settings(world: World, rng: np.random.Generator) -> tuple[str, Ended, str]:
    """A value for a setting of train.py. An accepted value has to be the one in the saved configuration."""
    base = load(TrainRun, ["probe=layers", f"pipeline.path={world.model}"])
    name, kind = _choose(rng, [pair for pair in _leaves(base) if pair[0] not in SLOW])
    value = _choose(rng, LISTS if kind is list else NUMBERS if kind in (int, float, bool) else TEXTS)
    folder = world.place("tried")
    command = [*world.train(folder, *FEW), f"{name}={value}"]
    ended = run(command, world.root / "log", folder=world.root)
    if ended.code != 0:
        return " ".join(command[-1:]), ended, ""
    return command[-1], ended, _recorded(folder, name, value)


def _recorded(folder: Path, name: str, value: str) -> str:
    """What is wrong with the record of a setting that was accepted."""
    if name in ("run_dir", "store"):
        return ""  # the run is elsewhere, if anywhere; files outside are counted apart
    result = find_result(folder)
    saved = yaml.safe_load((result / RUN_FILE).read_text())
    for part in name.split("."):
        saved = saved[part]
    typed = yaml.safe_load(value) if not isinstance(saved, str) else value.strip("'")
    same = (
        saved == typed
        or str(saved) == str(typed)
        or "${" in value
        or isinstance(saved, float)
        and saved == float(typed)
    )
    content(folder)
    return "" if same else f"saved as {saved!r}"


def uses(world: World, rng: np.random.Generator) -> tuple[str, Ended, str]:
    """A value for a setting of probe.py."""
    which = _choose(rng, ("predict", "early", "ensemble"))
    folder = world.copy("tried")
    base = load(UseRun, [f"use={which}", f"run={folder}"])
    name, kind = _choose(rng, [pair for pair in _leaves(base) if pair[0] not in SLOW])
    value = _choose(rng, LISTS if kind is list else NUMBERS if kind in (int, float, bool) else TEXTS)
    quick = {"predict": ["use.step=1", "use.problems=2"], "early": ["use.calibration=59", "use.problems=2"]}
    command = ["probe", f"use={which}", f"run={folder}", *quick.get(which, []), f"{name}={value}"]
    return f"use={which} {command[-1]}", run(command, world.root / "log", folder=world.root), ""


def models(world: World, rng: np.random.Generator) -> tuple[str, Ended, str]:
    """A change of the files of a model. What is accepted has to be known as another model, and to be complete."""
    model = world.root / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(world.model, model)
    path = _choose(rng, sorted(path for path in model.rglob("*") if path.is_file()))
    kinds = [*ANY, *(TENSORS if path.suffix == ".safetensors" else JSON if path.suffix == ".json" else ())]
    change = _choose(rng, kinds)
    change(path, rng)
    what = f"model: {change.__name__} of {path.relative_to(model)}"
    folder = world.place("tried")
    command = [*world.train(folder, *FEW), f"pipeline.path={model}"]
    ended = run(command, world.root / "log", folder=world.root)
    wrong = ""
    if ended.code == 0:
        if change in (missing, extra, reshaped, not_finite):
            wrong = "weights that do not fit were accepted"
        elif path.name == SAMPLING:  # no part of the model: values of settings, which are saved
            saved = yaml.safe_load((find_result(folder) / RUN_FILE).read_text())["pipeline"]
            typed = {"steps": 2, "frames": saved["frames"]}
            wrong = " ".join(n for n, v in (json.loads(path.read_text()) | typed).items() if saved[n] != v)
        elif fingerprint(model) == fingerprint(world.model) and _bytes(model) != _bytes(world.model):
            wrong = "known as the model it was before"
    return what, ended, wrong


def adapters(world: World, rng: np.random.Generator) -> tuple[str, Ended, str]:
    """Adapters that do not fit, or damaged ones."""
    shutil.rmtree(world.root / "lora", ignore_errors=True)
    names = [["attn1.to_q"], ["attn1.to_z"], ["attn1.to_q", "attn1.to_z"], ["ffn.net.2", "other"]]
    prefix = _choose(rng, ("transformer.", "", "diffusion_model.", "unet.", "transformer_2.", "lora_unet_"))
    layers = tuple(_choose(rng, names))
    path = adapter(world.root / "lora", prefix, layers)
    fits = prefix in ("transformer.", "diffusion_model.") and layers == ("attn1.to_q",)
    change = _choose(rng, [None, *ANY, *TENSORS])
    if change is not None:
        change(path, rng)
    command = [*world.train(world.place("tried"), *FEW), f"pipeline.lora={_choose(rng, (path, path.parent))}"]
    ended = run(command, world.root / "log", folder=world.root)
    what = f"adapters: {prefix!r} {layers} {change.__name__ if change else ''}"
    accepted_wrongly = ended.code == 0 and not (fits and change in (None, flipped))
    return what, ended, "adapters that do not fit were accepted" if accepted_wrongly else ""


def folders(world: World, rng: np.random.Generator) -> tuple[str, Ended, str]:
    """A damaged or foreign file in a run folder. The next command refuses it, or gives what it gave before."""
    folder = world.copy("tried")
    kept = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".yaml", ".nc", ".safetensors")
    )
    path = _choose(rng, kept)
    change = _choose(rng, [*ANY, *(JSON if path.suffix == ".json" else ()), foreign])
    change(path, rng)
    what = f"run folder: {change.__name__} of {path.relative_to(folder)}"
    for command in world.commands(folder):
        ended = run(command, world.root / "log", folder=world.root)
        if ended.code != 0:
            return f"{what}, then {' '.join(command[:2])}", ended, ""
    return what, ended, " ".join(differences(content(world.finished), content(folder)))


def fits(world: World, rng: np.random.Generator) -> tuple[str, Ended, str]:
    """A damaged or foreign file of a killed fit. The fit is whole afterwards, or the file is refused."""
    return _continued(world, killed.fit(world), "checkpoints", rng)


def trainings(world: World, rng: np.random.Generator) -> tuple[str, Ended, str]:
    """The same for the killed training of a model or of adapters."""
    return _continued(world, killed.training(world, _choose(rng, killed.EXPERIMENTS)), "", rng)


def _continued(world: World, left: killed.Killed, inside: str, rng: np.random.Generator) -> tuple[str, Ended, str]:
    folder = world.copy("tried", left.left)
    kept = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".ckpt", ".safetensors", ".json") and inside in str(path.relative_to(folder))
    )
    saved = [path for path in kept if path.suffix == ".ckpt"]
    path = _choose(rng, [*saved, *saved, *saved, *kept])
    change = _choose(rng, [*ANY, *(CHECKPOINTS if path.suffix == ".ckpt" else (foreign,))])
    change(path, rng)
    ended = run(left.again(folder), world.root / "log", folder=world.root)
    what = f"{left.command[1]}: {change.__name__} of {path.relative_to(folder)}"
    if ended.code != 0:
        return what, ended, ""
    differ = differences if inside else killed.other
    return what, ended, " ".join(differ(left.found, killed.found(folder)))


# changes of a file


def emptied(path: Path, rng: np.random.Generator) -> None:
    """No bytes."""
    path.write_bytes(b"")


def cut(path: Path, rng: np.random.Generator) -> None:
    """The beginning only."""
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content)))])


def flipped(path: Path, rng: np.random.Generator) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    at = int(rng.integers(8 * len(content)))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def replaced(path: Path, rng: np.random.Generator) -> None:
    """Random bytes."""
    path.write_bytes(rng.bytes(200))


def deleted(path: Path, rng: np.random.Generator) -> None:
    """No file."""
    path.unlink()


def folder_instead(path: Path, rng: np.random.Generator) -> None:
    """A folder of this name."""
    path.unlink()
    path.mkdir()


def foreign(path: Path, rng: np.random.Generator) -> None:
    """JSON of something else."""
    path.write_text('{"a": [1, 2], "sha256": "0"}')


def another_value(path: Path, rng: np.random.Generator) -> None:
    """One value of a JSON file becomes something else."""
    tree = json.loads(path.read_text())
    places = list(_places(tree))
    if places:
        holder, key = _choose(rng, places)
        holder[key] = _choose(rng, (None, -1, 0, 10**9, "x", [], {}, True, 1.5, "WanTransformer3DModel"))
    path.write_text(json.dumps(tree))


def missing_key(path: Path, rng: np.random.Generator) -> None:
    """One entry of a JSON file is left out."""
    tree = json.loads(path.read_text())
    places = list(_places(tree))
    if places:
        holder, key = _choose(rng, places)
        del holder[key]
    path.write_text(json.dumps(tree))


def missing(path: Path, rng: np.random.Generator) -> None:
    """One tensor is left out."""
    tensors = load_file(path)
    tensors.pop(_choose(rng, sorted(tensors)))
    save_file(tensors, path, {"format": "pt"})


def extra(path: Path, rng: np.random.Generator) -> None:
    """One tensor too many."""
    save_file(load_file(path) | {"extra.weight": torch.ones(3)}, path, {"format": "pt"})


def reshaped(path: Path, rng: np.random.Generator) -> None:
    """One tensor has another shape."""
    tensors = load_file(path)
    name = _choose(rng, sorted(tensors))
    tensors[name] = torch.cat([tensors[name].flatten(), torch.ones(1)])
    save_file(tensors, path, {"format": "pt"})


def not_finite(path: Path, rng: np.random.Generator) -> None:
    """One number is NaN or infinite."""
    tensors = load_file(path)
    name = _choose(rng, sorted(name for name, values in tensors.items() if values.is_floating_point()))
    tensors[name].view(-1)[int(rng.integers(tensors[name].numel()))] = _choose(rng, (float("nan"), float("inf")))
    save_file(tensors, path, {"format": "pt"})


class Opened:
    """Unpickling it makes a file in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def pickled(path: Path, rng: np.random.Generator) -> None:
    """A pickle that runs code."""
    path.write_bytes(pickle.dumps(Opened()))


def pickled_by_torch(path: Path, rng: np.random.Generator) -> None:
    """The same in a file of torch, in place of a checkpoint or in one."""
    inside = rng.random() < 0.5
    torch.save({"state_dict": {}, "global_step": 10**6, "x": Opened()} if inside else Opened(), path)


def pickled_with_checksum(path: Path, rng: np.random.Generator) -> None:
    """A checkpoint with code in it, as whoever knows the format would write it."""
    ChecksumIO().save_checkpoint(ChecksumIO().load_checkpoint(path) | {"callbacks": Opened()}, path)


def other_keys(path: Path, rng: np.random.Generator) -> None:
    """A checkpoint with the right checksum that lacks an entry, or has another name for a tensor."""
    saved = ChecksumIO().load_checkpoint(path)
    where = saved if rng.random() < 0.5 else saved["state_dict"]
    name = _choose(rng, sorted(where))
    values = where.pop(name)
    if rng.random() < 0.5:
        where[f"old.{name}"] = values
    ChecksumIO().save_checkpoint(saved, path)


CHECKPOINTS = (pickled, pickled_by_torch, pickled_with_checksum, other_keys)
ANY = (emptied, cut, flipped, replaced, deleted, folder_instead)
JSON = (another_value, another_value, missing_key)
TENSORS = (missing, extra, reshaped, not_finite)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted names of all settings, and the type of their values."""
    for entry in fields(tree):
        value = getattr(tree, entry.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", type(value)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: the object or list, and the key or index."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(value)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]
