"""Probes and grids on the Hugging Face Hub, or in a folder of the same layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.files import make_folder, whole_file
from cosprobe.probes import ProbeBank, load_probes
from cosprobe.reporting import headline, markdown_table
from cosprobe.runs import find_result

PROBES, GRID, MAP, CARD = "probes", "report/grid.nc", "map.png", "README.md"
FILES = [f"{PROBES}/bank.safetensors", f"{PROBES}/bank.json", GRID, MAP, CARD]


def push_to_hub(run: Path | str, name: str, private: bool = True, token: str | None = None) -> str:
    """Uploads the probes and the grid of a finished run, with a card that shows the map. Returns the address.

    run: a run folder, or the folder of a result. name: of the repository, `OWNER/NAME`; it is created if it is not
    there. private: visibility of a new repository. token: default that of `hf auth login`. `export` writes the same
    files into a folder. They name the model by the hash of its files, and no paths of this machine.
    Raises InputError when the run is not finished, and when the Hub refuses.
    """
    with TemporaryDirectory() as folder:
        export(run, folder)
        api = HfApi(token=token)
        try:
            address = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload probes and their grid")
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"name={name!r}: the Hub refused: {' '.join(str(error).split())}") from error
    return str(address)


def export(run: Path | str, folder: Path | str) -> Path:
    """Writes the files that `push_to_hub` uploads into a folder, and returns it.

    Raises InputError when the run is not finished, or its probes and grid do not belong together.
    """
    source, folder = find_result(run), Path(folder)
    bank, grid = _together(load_probes(source), Grid.load(source), str(source))
    make_folder(folder / PROBES)
    for file in FILES[:2]:
        with whole_file(folder / file) as part:
            shutil.copyfile(source / file, part)
    grid.save(folder / GRID)
    with whole_file(folder / MAP) as part:
        headline(grid).savefig(part, format="png")
    with whole_file(folder / CARD) as part:
        part.write_text("\n".join(card(bank, grid)) + "\n", encoding="utf-8")
    return folder


def from_pretrained(name: Path | str, revision: str | None = None, token: str | None = None) -> tuple[ProbeBank, Grid]:
    """Loads probes and their grid from the Hub, or from a folder written by `export`. Nothing is unpickled.

    name: `OWNER/NAME` or a folder. revision: branch, tag or commit; default the newest. token: for private
    repositories.
    Raises InputError when there is no such repository or it cannot be reached, when files are missing or damaged, and
    when the probes and the grid do not belong together.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(
                f"name={str(name)!r}: neither a folder nor a repository that can be reached; expected OWNER/NAME of "
                f"probes on the Hub, or a folder written by export: {' '.join(str(error).split())[:200]}"
            ) from error
    return _together(ProbeBank.load(folder / PROBES), Grid.load(folder), str(name))


def card(bank: ProbeBank, grid: Grid) -> list[str]:
    """Lines of the card: what was probed, the map, the best cells, and how to load them."""
    best = [grid.best(name) for name in grid.targets]
    rows = [
        [f"`{one.target}`", f"step {one.cell.step}, layer {one.cell.layer}",
         f"{one.accuracy:.2f} [{one.lower:.2f}, {one.upper:.2f}]", f"{one.p:.3f}"]
        for one in best
    ]  # fmt: skip
    tags = "cosprobe, linear-probes, interpretability, video-diffusion"
    return [
        "---", "library_name: cosprobe", f"tags: [{tags}]", "---", "",
        "# Linear probes of a video diffusion transformer", "",
        f"Probes of {len(bank.cells)} cells (layers x denoising steps). `probes/bank.json` has the settings, and the "
        "hashes of the files of the model.",
        "Accuracy is measured on held-out problems; best cells are chosen on validation.", "",
        f"![Map of skill]({MAP})", "",
        *markdown_table(["target", "best cell", "accuracy [95 %]", "p_evidence"], *rows), "",
        "```python", "from cosprobe import from_pretrained", "", 'bank, grid = from_pretrained("OWNER/NAME")', "```",
    ]  # fmt: skip


def _together(bank: ProbeBank, grid: Grid, where: str) -> tuple[ProbeBank, Grid]:
    """Both. Raises InputError unless the grid was made with these probes."""
    if grid.provenance.get("bank") != bank.fingerprint:
        raise InputError(f"{where!r}: the grid was made with other probes than those beside it; export the run again")
    return bank, grid
