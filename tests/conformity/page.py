"""The text of docs/support.md: which pipelines are supported, and what was checked of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cosprobe.models.architectures import ARCHITECTURES, REFUSED
from cosprobe.models.schedulers import SCHEDULERS
from tests.conformity.checks import CHECKS, TOLERANCE
from tests.conformity.runs import USES
from tests.examples.families import FAMILIES

COMMANDS = "commands"
GPU = re.compile(r"<!-- gpu -->.*?<!-- /gpu -->", flags=re.DOTALL)
NO_GPU = "<!-- gpu -->\nNo GPU has confirmed this yet: `make gpu-check` writes its numbers here.\n<!-- /gpu -->"
LATER = (
    *("WanVideoToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline", "AnyFlowPipeline"),
    *("HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    *("MotifVideoPipeline", "LTXConditionPipeline", "LTX2Pipeline", "LTX2ImageToVideoPipeline"),
    *("CogVideoXVideoToVideoPipeline", "CogVideoXFunControlPipeline", "ConsisIDPipeline", "EasyAnimatePipeline"),
    *("LattePipeline", "SanaVideoPipeline", "SanaImageToVideoPipeline", "Cosmos2VideoToWorldPipeline"),
    *("Cosmos2_5_PredictBasePipeline", "Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
)

HEAD = """# Supported models

`make support` writes this page. It builds the real diffusers classes of every family at toy size, with random weights,
and tries each of them without guidance and with it. Toy models cannot solve problems, so the page shows two things:
every activation gets the right label, and capture does not change the video. Whether a trained model of the family fits
into memory, or solves a task, was not tried. [Your own model](own-model.md) says how to run one.

Names: `t2v` from text, `i2v` from an image. `wan22` is Wan2.2-A14B with its two transformers (experts), `_low` and
`_high` have one of them, `wan22_ti2v` is Wan2.2-TI2V-5B, as text-to-video and as image-to-video. `_conditioned` is LTX
0.9.1 and later, whose decoder takes a timestep. `cogvideox15` is CogVideoX 1.5. `concat` and `replace` are the two ways
in which HunyuanVideo gets its image. `_dpm` and `_ddim` have another scheduler.

"""

ADD = """
## Add a family

1. Write `cosprobe/models/architectures/NAME.py` with a subclass of `Architecture`; `wan.py` and `ltx.py` are examples.
2. `pipelines` and `transformers` name the diffusers classes; `blocks` returns the blocks in order of execution.
3. `video_tokens` and `with_video_tokens` find the video in what a block returns; take `JointBlocks` for (video, text).
4. Set `layout` if latents are not [batch, channel, frame, height, width]. Override `token_grid` and `unpacked` if they
   are tokens.
5. Guidance: take `Doubled` for one call on two halves, or override `branches` for calls without names.
6. Override `keeps_first_frame` if the image is the first latent frame and not further channels.
7. `decode` does what the pipeline does after its loop; `check_video` refuses sizes that diffusers would round.
8. Add an instance to `ARCHITECTURES`.
9. Add a toy pipeline to `tests/examples/families.py`, with its token grid in `tests/conformity/checks.py`.
10. Run `python -m tests.conformity docs/support.md NAME` until all checks hold, then `make support`.
"""


@dataclass(frozen=True)
class Row:
    """What was found for one family. numbers: of each check that holds. failed: reasons, by check."""

    name: str
    pipeline: str
    numbers: Mapping[str, float]
    failed: Mapping[str, str]


def page(rows: Sequence[Row], before: str = "") -> str:
    """The page. before: the page so far, whose numbers of a GPU are kept."""
    of_gpu = found.group() if (found := GPU.search(before)) else NO_GPU
    on_gpu = "not tried" if of_gpu == NO_GPU else "[see below](#on-a-gpu)"
    lines = [HEAD + "## What was checked", ""]
    lines += [f"| family | pipeline | {' | '.join(CHECKS)} | train.py, {', '.join(USES)} | on a GPU |"]
    lines += [f"|---|---|{'---|' * (len(CHECKS) + 2)}"]
    for row in rows:
        cells = [*(_cell(row, what) for what in (*CHECKS, COMMANDS)), on_gpu]
        lines.append(f"| {row.name} | `{row.pipeline}` | {' | '.join(cells)} |")
    lines += ["", "What the columns mean:", ""]
    lines += [f"* **{what}**: {' '.join((inspect.getdoc(check) or '').split())}" for what, check in CHECKS.items()]
    lines += [
        "* **train.py, ...**: every command runs to its end on 64 mazes, on frames that are not square. Allegro's are."
    ]
    lines += ["", f"A number is the largest difference found; up to {TOLERANCE:g} is taken for rounding.", ""]
    lines += ["## On a GPU", "", of_gpu, ""]
    lines += ["## Schedulers", "", f"{', '.join(f'`{name}`' for name in SCHEDULERS)}.", ""]
    lines += ["## Refused", "", "| pipeline | why |", "|---|---|"]
    lines += [f"| `{name}` | it {reason} |" for name, reason in REFUSED.items()]
    lines += [f"| {', '.join(f'`{name}`' for name in LATER)} | not supported yet |"]
    return "\n".join(lines) + "\n" + ADD


def _cell(row: Row, what: str) -> str:
    if what in row.failed:
        return "no"
    number = row.numbers.get(what, 0.0)
    return f"yes, {number:.0e}" if number else "yes"


def missing() -> set[str]:
    """Supported pipelines without a toy pipeline."""
    tried = {type(example.build()).__name__ for example in FAMILIES.values()}
    return {name for known in ARCHITECTURES for name in known.pipelines} - tried
