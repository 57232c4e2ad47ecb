"""The page of a run: everything that is in the folder of a result, with its strongest caveat at the top."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cosprobe.errors import InputError
from cosprobe.evaluation import Claim, Grid
from cosprobe.files import read_json
from cosprobe.reporting import CAPTIONS, COLUMNS, SUMMARY, counted, shown_targets, summarise
from cosprobe.runs import FINISHED, REPORT, RUN_FILE
from cosprobe.tasks import ANSWER_ROLES, Role
from cosprobe.webpage.explanations import CHECKS, EDITS, QUANTITIES, TERMS, TOKEN_PICTURES
from cosprobe.webpage.grid_charts import LEGEND, colourings, curves, frame_maps, layer_map
from cosprobe.webpage.page import (
    Block,
    Bullets,
    Charts,
    Code,
    Folded,
    Heading,
    Maps,
    Page,
    PageTooLarge,
    Picture,
    Section,
    Table,
    Text,
    write_page,
)
from cosprobe.webpage.sentences import sentences

PAGE = "report.html"
AGAIN = "run the command that writes it again"
LIBRARIES = ("cosprobe", "torch", "diffusers", "transformers", "lightning", "numpy", "xarray", "plotly")
USES = {  # what `probe.py` adds, by the beginning of the names of its reports
    "film": "x0-hat at every step", "early": "early answers", "ensemble": "seed ensembles",
    "causal": "interventions", "lengths": "other numbers of frames and steps", "tokens": "maps of every token",
}  # fmt: skip
COMMANDS = {"causal": "intervene"}  # where the name of the use is another one
BEHAVIOUR_HEAD = ("claim", "about", "compared with", "difference [95 %]", "n", "verdict", "measured")
CLAIMS_HEAD = ("claim", "compared with", "difference [95 %]", "verdict", "measured")


def write_run_page(folder: Path, command: str) -> Path:
    """Writes report/report.html of a result from the files in its folder, and returns it.

    Parts that were not run are named with the command that adds them. A report that is damaged, or was made with other
    probes, is said to be so. If the maps of all targets are too large for a page, those of the answers are shown.
    folder: of the result. command: the `train.py` command that makes it.
    Raises InputError when there is no grid or config.yaml, and when the page cannot be written.
    """
    folder = Path(folder)
    try:
        return write_page(run_page(folder, command), folder / REPORT / PAGE)
    except PageTooLarge:
        return write_page(run_page(folder, command, every_target=False), folder / REPORT / PAGE)


def run_page(folder: Path, command: str, every_target: bool = True) -> Page:
    """The page of the result in a folder; see `write_run_page`. every_target: show the maps of all targets, not of the
    answers only."""
    grid, report = Grid.load(folder), folder / REPORT
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{str(folder)!r}: expected the folder of a train.py run, found no {RUN_FILE}")
    config = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
    task, model = str(config["groups"]["task"]), _model(config["pipeline"])
    marks = {path.name: mark for path in sorted(report.glob("*/")) if (mark := _mark(path))}
    bank = str(grid.provenance.get("bank", ""))
    sections = [
        _section("Where it is decodable", lambda: _decodable(grid, every_target)),
        _section("Along the denoising steps", lambda: _curves(grid)),
        _section("Checks", lambda: _checks(grid, report)),
        _section("What x0-hat shows", lambda: _films(report, marks, bank)),
        _section("Single tokens", lambda: _tokens(report, marks, bank)),
        _section("Behaviours", lambda: _behaviours(report, marks, bank)),
        _section("Other numbers of frames and steps", lambda: _lengths(report, marks, bank)),
        _section("Early answers", lambda: _early(report, marks, bank)),
        _section("Seed ensembles", lambda: _ensembles(report, marks, bank)),
        _section("Interventions", lambda: _interventions(report, marks, bank)),
        _section("How it was made", lambda: _made(folder, grid, config, command, marks)),
    ]
    probe = grid.provenance.get("probe", {})
    found = sentences(grid, model, task)
    return Page(
        f"Where a video model holds the answer: {task}",
        f"{model}, {probe.get('kind', '')} probes, result `{folder.parent.name}/{folder.name}`, seed {config['seed']}",
        tuple(found),
        len(found) - 1,
        tuple(section for section in sections if section.blocks),
    )


def _section(title: str, make: Callable[[], list[Block]]) -> Section:
    """A section; if a file that it needs is damaged, it says so."""
    try:
        return Section(title, tuple(make()))
    except InputError as error:
        return Section(title, (Text((str(error),), warning=True),))


def _model(pipeline: Mapping[str, Any]) -> str:
    adapters = [str(pipeline[name]) for name in ("lora", "lora_2") if pipeline.get(name)]
    named = str(pipeline.get("path") or pipeline.get("name"))
    return f"`{named}`" + (f" with adapters `{', '.join(adapters)}`" if adapters else "")


def _mark(report: Path) -> dict[str, Any]:
    """What the command that wrote a report noted at its end; empty if it has not ended."""
    try:
        return read_json(report / FINISHED, AGAIN)
    except InputError:
        return {}


def _state(name: str, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    """A warning about a report that is not complete, or not of these probes."""
    mark = marks.get(name)
    if mark is None:
        return [Text((f"report/{name} is not complete: the command that writes it has not ended.",), warning=True)]
    if mark["probes"] != bank:
        return [Text((f"report/{name} was made with other probes than those of this page; {AGAIN}.",), warning=True)]
    return []


# the grid


def _decodable(grid: Grid, every_target: bool) -> list[Block]:
    answers = grid.with_role(*ANSWER_ROLES) or grid.targets[:2]
    targets = sorted(shown_targets(grid), key=lambda name: name not in answers)
    if left_out := [] if every_target else [name for name in targets if name not in answers]:
        targets = list(answers)
    heat_maps = [one for target in targets for one in (layer_map(grid, target), *frame_maps(grid, target))]
    seen = {
        "best": any(one.best is not None for one in heat_maps), "struck": any(one.struck.any() for one in heat_maps),
        "outlined": any(one.outlined.any() for one in heat_maps), "grey": True,
    }  # fmt: skip
    note = f"Maps of these targets would make the page too large; they are in others.png: {', '.join(left_out)}."
    legend = [(mark, text if seen[mark] else f"{text} (none here)") for mark, text in LEGEND]
    return [
        Table(
            "The best cell of each target, chosen on validation problems and measured on test problems",
            COLUMNS,
            [row.cells() for row in summarise(grid)],
        ),
        Text(
            (
                "A square of a map, called a cell, is one linear probe on the output of one layer at one denoising "
                "step. Skill is (accuracy - reference) / (1 - reference); the reference is the accuracy of the best "
                "input at that step, or chance if that is higher. Inputs are everything that is known before the first "
                "layer runs. Intervals are 95 % intervals over problems. Point at a cell, or move with the arrow "
                "keys, to read its numbers.",
            )
        ),
        Maps("Colour of the maps", colourings(grid, targets), tuple(heat_maps), tuple(legend)),
        *([Text((note,), warning=True)] if left_out else []),
    ]


def _curves(grid: Grid) -> list[Block]:
    targets = grid.with_role(*ANSWER_ROLES, Role.MEMORY) or grid.targets[:2]
    return [Charts(tuple(curves(grid, target) for target in targets))]


def _checks(grid: Grid, report: Path) -> list[Block]:
    found: list[Block] = []
    if (report / SUMMARY).is_file():
        said = read_json(report / SUMMARY, AGAIN)
        found.append(Bullets(tuple(said["remarks"])))
        if said["checks"]:
            head, *rows = said["checks"]
            found.append(Table("Checks of the best cells, each against another explanation", head, rows))
            meant = [[name, *CHECKS[name]] for name, *_ in rows if name in CHECKS]
            found.append(Table("What the checks mean", ("check", "what it says", "what would be bad"), meant))
    else:
        text = f"The remarks and the table of checks are missing: this result is of an earlier version; {AGAIN}."
        found.append(Text((text,), warning=True))
    found += _worse(grid)
    for name, alt in (("checks.png", _alt_of_checks(grid)), ("generalisation.png", _alt_of_matrices(grid))):
        found += _figure(report / name, alt, CAPTIONS[name])
    return found


def _worse(grid: Grid) -> list[Block]:
    """Where the temperature that was fitted on validation problems made calibration worse on test problems."""
    said = []
    for target in grid.with_role(*ANSWER_ROLES):
        cell = grid.at(target, grid.best(target).cell)
        error, raw, heat = float(cell.ece), float(cell.ece_raw), float(cell.temperature)
        if error > raw:
            said.append(
                f"The temperature made the calibration of `{target}` worse: the error on test problems is {error:.3f} "
                f"with T = {heat:.2f}, and {raw:.3f} without it. It was fitted on other problems (validation)."
            )
    return [Text(tuple(said))] if said else []


def _alt_of_checks(grid: Grid) -> str:
    said, data = [], grid.dataset
    for target in grid.with_role(*ANSWER_ROLES):
        here, cell = data.sel(target=target), grid.at(target, grid.best(target).cell)
        parts = []
        if "learning" in data and (known := np.isfinite(here.learning.values)).any():
            sizes, values = here.problems.values[known], here.learning.values[known]
            first, last = (f"{values[i]:.2f} with {sizes[i]}" for i in (0, -1))
            parts.append(f"accuracy grows from {first} training problems to {last}")
        if np.isfinite(cell.ece):
            parts.append(f"calibration error {float(cell.ece):.3f}")
        if np.isfinite(cell.latency):
            parts.append(f"latency {float(cell.latency):.1f} steps")
        said.append(f"{target}: {', '.join(parts) or 'not measured'}.")
    return f"Panels of checks, a row per target. {' '.join(said)}"


def _alt_of_matrices(grid: Grid) -> str:
    said, data = [], grid.dataset
    for axis in ("step", "layer"):
        if f"transfer_{axis}" not in data:
            continue
        for target in grid.with_role(*ANSWER_ROLES):
            values = data[f"transfer_{axis}"].sel(target=target).values
            if values.ndim == 2 and np.isfinite(values).any() and values.shape[0] == values.shape[1] > 1:
                same = np.eye(len(values), dtype=bool)
                said.append(
                    f"{target}, {axis}s: mean accuracy {np.nanmean(values[same]):.2f} on the {axis} it was trained on, "
                    f"{np.nanmean(values[~same]):.2f} on others."
                )
    return f"Matrices of accuracy, trained on (rows) by tested on (columns). {' '.join(said)}"


def _figure(path: Path, alt: str, caption: str, still: Path | None = None, first: bool = False) -> Iterator[Picture]:
    """A picture, if its file is there."""
    if path.is_file():
        yield Picture(path, alt, caption, still if still is not None and still.is_file() else None, first)


# the reports


def _films(report: Path, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    found: list[Block] = [
        *_figure(
            report / "film.png",
            "The first frame and then the last frame of x0-hat at several denoising steps, one row per test problem: "
            "one that the model solves, one that it does not, and one with several right answers, where they exist.",
            CAPTIONS["film.png"],
        )
    ]
    films = sorted((report / "film").glob("*.gif"))
    if films:
        found += _state("film", marks, bank)
    for path in films:
        said = read_json(path.with_suffix(".json"), AGAIN)
        text = _alt_of_film(said)
        found += _figure(
            path, text, f"{path.stem}: the last frame of x0-hat at every step. Prompt: {said['prompt']!r}. {text}",
            path.with_suffix(".png"), True,
        )  # fmt: skip
    return found


def _alt_of_film(said: Mapping[str, Any]) -> str:
    steps, proba, right = said["steps"], said["probabilities"], said["right"]
    text = f"x0-hat at {len(steps)} steps, from step {steps[0]} to step {steps[-1]}."
    if proba is None:
        return f"{text} No probe is read."
    read = [(step, row) for step, row in zip(steps, proba, strict=True) if None not in row]
    if not read:
        return f"{text} No step has a probe."
    picks = [
        f"candidate {int(np.argmax(row))} at step {step} (probability {max(row):.2f})"
        for step, row in (read[0], read[-1])
    ]
    return f"{text} The probe reads {' and '.join(picks)}. Right: {', '.join(map(str, right)) or 'unknown'}."


def _behaviours(report: Path, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    place = _largest(report, "behaviour*/behaviour.json")
    if place is None:
        return []
    said = read_json(place / "behaviour.json", AGAIN)
    told, rows = [[name, *texts] for name, texts in said["sentences"].items()], []
    for saved in said["claims"]:
        claim = Claim.of(saved)
        n = str(saved["n"] or "")
        rows.append([claim.claim, str(saved["about"]), claim.control, claim.estimate, n, claim.verdict, claim.measure])
    return [
        *_state(place.name, marks, bank),
        Table("What was measured, and what it does not show", ["behaviour", "measured", "caveat"], told),
        *_figure(
            place / "behaviour.png",
            f"Four panels along denoising steps and layers. {' '.join(f'{name}: {text}' for name, text, _ in told)}",
            "What x0-hat shows, how sure the probe is, when answers settle, and accuracy over layers.",
        ),
        Folded(
            f"All {len(rows)} claims with intervals and verdicts",
            (Table("Claims about behaviours", BEHAVIOUR_HEAD, rows),),
        ),
        *_by_difficulty(said.get("groups", [])),
    ]  # fmt: skip


def _largest(report: Path, pattern: str) -> Path | None:
    """Of several reports of one use, the folder of the one with most problems; None without one."""
    found = [path.parent for path in report.glob(pattern)]
    return max(found, key=lambda place: [int(n) for n in re.findall(r"(\d+)problems", place.name)], default=None)


def _by_difficulty(groups: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What samples of similar difficulty show; nothing without groups."""
    names = list(dict.fromkeys(name for group in groups for name in group["shares"]))
    if not names:
        return []
    rows = [
        [f"{group['kind']}, {group['about']}", str(group["n"]), *(_share(group["shares"].get(name)) for name in names)]
        for group in groups
    ]
    about = (
        "Shares of the samples of a group, with 95 % intervals. Groups overlap, and are not corrected for each other."
    )
    return [Folded("By difficulty", (Table(about, ["problems", "n", *names], rows),))]


def _share(ends: Sequence[float] | None) -> str:
    return "" if ends is None else "{:.2f} [{:.2f}, {:.2f}]".format(*ends)


def _lengths(report: Path, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    place = _largest(report, "lengths*/lengths.json")
    if place is None:
        return []
    said = read_json(place / "lengths.json", AGAIN)
    claims = [Claim.of(saved) for saved in said["claims"]]
    rows = [[c.claim, c.control, c.estimate, c.verdict, c.measure] for c in claims]
    about = f"{said['about']} (n = {said['n']} problems)"
    told = "; ".join(f"{row['setting']}: right on {_share(row['right'])}" for row in said["settings"])
    return [
        *_state(place.name, marks, bank),
        Table(about, CLAIMS_HEAD, rows),
        *_figure(
            place / "lengths.png",
            f"Share of right answers by number of frames and by number of steps. {told}.",
            "The same problems and noise seeds with other numbers of frames and of steps.",
        ),
    ]


def _tokens(report: Path, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    found: list[Block] = [
        *_figure(
            report / "path.png",
            "Maps of the picture, one per layer, step and latent frame: the tokens whose probe tells whether the "
            "solution passes through them.",
            CAPTIONS["path.png"],
        )
    ]
    place = report / "tokens"
    pictures = [(path, name) for path in sorted(place.glob("*.png")) if (name := _quantity(path.stem))]
    if not pictures:
        return found
    found += [*_state("tokens", marks, bank), Text(TOKEN_PICTURES)]
    if (place / "tokens.json").is_file():
        found += _token_claim(read_json(place / "tokens.json", AGAIN))
    order = list(QUANTITIES)
    for path, quantity in sorted(pictures, key=lambda one: order.index(one[1])):
        sample, text = path.stem.removesuffix(f"_{quantity}"), QUANTITIES[quantity]
        found += _figure(
            path, f"Maps of tokens of the sample {sample}, by layer and step, drawn over the picture: {text}.",
            f"{text[0].upper()}{text[1:]}. Sample `{sample}`, tokens of the last latent frame, by layer (rows) and "
            "step (columns).", first=True,
        )  # fmt: skip
    return found


def _quantity(stem: str) -> str:
    """The quantity that the name of a picture ends with; empty for none. `a_temporal_energy` is no energy."""
    return max((name for name in QUANTITIES if stem.endswith(f"_{name}")), key=len, default="")


def _token_claim(said: Mapping[str, Any]) -> list[Block]:
    """What was tested of the tokens on the path, and how many tokens have massive activations."""
    found: list[Block] = []
    if said["path"] is None:
        found.append(Text(("Whether tokens on the path have more energy was not tested: too few problems.",)))
    else:
        claim, about = Claim.of(said["path"]), f"Tokens on the path of the solution (n = {said['path']['n']} problems)"
        row = [claim.claim, claim.control, claim.estimate, claim.verdict, claim.measure]
        found.append(Table(about, CLAIMS_HEAD, [row]))
    layers = [one for run in said["runs"] for one in run["massive"].values()]
    heavy, every = (sum(int(one[name]) for one in layers) for name in ("tokens", "of"))
    largest = max(float(one["largest"]) for one in layers)
    samples = counted(len(said["runs"]), "sample")
    text = (
        "Massive activations are channels of a token whose magnitude is above 100 times the median of its layer and "
        f"step. {heavy} of {every} tokens have some (all layers and steps of {samples}); the largest magnitude is "
        f"{largest:.0f} times the median."
    )
    return [*found, Text((text,))]


def _early(report: Path, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    place = report / "early"
    if not (place / "early.json").is_file():
        return []
    found, alts = _state("early", marks, bank), []
    for kind, one in read_json(place / "early.json", AGAIN)["kinds"].items():
        result = one["result"]
        low, high = result["interval"]
        alts.append(
            f"{kind}: the calibrated policy takes {result['compute']:.2f} of the compute of a finished run, with "
            f"errors on {result['risk']:.2f} [{low:.2f}, {high:.2f}] of {result['samples']} fresh problems."
        )
        found.append(Heading(f"Problems of kind {kind}"))
        found += [Table(f"{kind}: {name}", head, rows) for name, (head, *rows) in one.get("tables", {}).items()]
        found.append(Bullets(tuple(one.get("remarks", alts[-1:]))))
    caption = "Agreement with the finished run over compute, for every stopping rule. Star: the calibrated policy."
    found += _figure(place / "frontier.png", f"Curves of stopping rules. {' '.join(alts)}", caption)
    for path in sorted(place.glob("film_*.png")):
        kind = path.stem.removeprefix("film_")
        caption = f"{kind}: x0-hat at several steps; a black frame marks the step of the early answer."
        found += _figure(
            path, f"Film strips of fresh problems of kind {kind}, with the step at which each run is stopped.", caption
        )
    return found


def _ensembles(report: Path, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    place = report / "ensemble"
    if not (place / "ensemble.json").is_file():
        return []
    said, found = read_json(place / "ensemble.json", AGAIN), _state("ensemble", marks, bank)
    right, n = said["one_run"]["right"], said["test_problems"]
    alone = f"one run is right on {right['mean']:.2f} [{right['lower']:.2f}, {right['upper']:.2f}] of {n} test problems"
    for name, (head, *rows) in said.get("tables", {}).items():
        found.append(Table(f"{name} ({n} test problems)", head, rows))
    found.append(Bullets(tuple(said.get("remarks", [f"{alone[0].upper()}{alone[1:]}."]))))
    found += _figure(
        place / "ensemble.png",
        f"Accuracy over compute by number of seeds, by window of layers, and of strategies at two budgets; {alone}.",
        "Accuracy of strategies that get one answer from several noise seeds. Grey: one run.",
    )
    return found


def _interventions(report: Path, marks: Mapping[str, Mapping[str, Any]], bank: str) -> list[Block]:
    found: list[Block] = []
    paths = sorted(report.glob("causal*/claims.json"))
    if paths:
        text = (
            "An intervention changes a run while it is sampled, and counts whether the answers of the finished videos "
            "follow. It tests what a probe cannot: whether the model uses what is decodable. Every change is compared "
            "with controls. What these tests do not show is in `docs/causal.md`."
        )
        found += [Text((text,)), Table("Words of this section", ("term", "meaning"), TERMS)]
    for path in paths:
        said = read_json(path, AGAIN)
        claims = [Claim.of(saved) for saved in said["claims"]]
        about = f"{said['about']} (n = {said['n']} samples of {said['problems']} problems)"
        rows = [[c.claim, c.control, c.estimate, c.verdict, c.measure] for c in claims]
        name = str(said["about"]).rpartition(": ")[2]
        inner: list[Block] = [Heading(f"{name[:1].upper()}{name[1:]}"), *_state(path.parent.name, marks, bank)]
        changed, shown = EDITS.get(str(said["edit"]), ("", f"Results of {said['about']}."))
        if changed:
            inner.append(Text((changed,)))
        if said.get("remarks"):
            inner.append(Text((str(said["remarks"][0]),)))
        inner.append(Table(about, CLAIMS_HEAD, rows))
        told = "; ".join(
            f"{c.claim} against {c.control or 'nothing'}: {c.estimate or 'not measured'}, {c.verdict}" for c in claims
        )
        inner += _figure(
            path.parent / f"{said['edit']}.png", f"Results of {said['about']}. {told}.", f"{about}. {shown}"
        )
        inner += _figure(
            path.parent / "agreement.png",
            "The effect of a swap over the accuracy of the probe above chance, one point per cell. "
            + " ".join(text for text in said.get("remarks", []) if "correlation" in text),
            "Decodable against used: the effect of a swap over the accuracy of the probe above chance.",
        )
        if said.get("remarks"):
            inner.append(Bullets(tuple(said["remarks"][1:])))
        if said.get("conditions"):
            head, *conditions = said["conditions"]
            inner.append(
                Folded(f"All {len(conditions)} conditions", (Table(f"Conditions of {about}", head, conditions),))
            )
        found += inner
    return found


# how it was made


def _made(
    folder: Path, grid: Grid, config: Mapping[str, Any], command: str, marks: Mapping[str, Mapping[str, Any]]
) -> list[Block]:
    made = grid.provenance
    used = {str(mark["command"]): name for name, mark in marks.items() if mark.get("command")}
    commands = [command, *(one for one in used if one != command)]
    store = made.get("store") or {}
    rows = [["python", "", platform.python_version()]]
    rows += [[name, str(store.get("versions", {}).get(name, "")), version(name)] for name in LIBRARIES]
    seeds = [
        ["noise seeds and all other randomness (`seed`)", str(config["seed"])],
        ["problems (`task.seed`)", str(config["task"].get("seed", ""))],
        ["noise seeds per problem (`task.seeds`)", str(config["task"].get("seeds", ""))],
    ]
    hashes = [[f"model: {part}", str(value)] for part, value in (config.get("model") or {}).items()]
    hashes.append(["probes", str(made.get("bank", ""))])
    absent = [
        f"{about}: `python probe.py use={COMMANDS.get(name, name)} run={folder}`"
        for name, about in USES.items()
        if not any(one.name.startswith(name) for one in (folder / REPORT).glob("*/"))
    ]
    blocks: list[Block] = [
        Code("commands", "\n".join(commands)),
        Table(
            "Versions of libraries", ["library", "when activations were sampled", "when this page was written"], rows
        ),
        Table("Seeds", ["seed of", "value"], seeds),
        Table("Fingerprints of content", ["what", "fingerprint"], hashes),
        Folded(RUN_FILE, (Code(RUN_FILE, (folder / RUN_FILE).read_text(encoding="utf-8")),)),
    ]
    if absent:
        blocks.append(Bullets(tuple(f"Not run: {text}" for text in absent)))
    return blocks
