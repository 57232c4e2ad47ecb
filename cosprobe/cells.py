"""Names shared by every module: axes, cells, and the syntax of selections.

Axes of tensors, in this order:
`sample`: a problem and a noise seed.
`step`: index of the sampler step, 0 = noisiest. It is never a timestep.
`hook_point`: where features come from. A layer (`"0"`, `"1"`, ...: the output of that transformer block) or one of
SOURCES.
`branch`: `cond` or `uncond`, the two evaluations of classifier-free guidance.
`position`: what features are averaged over. `all` latent frames, one latent frame (`"0"`, `"1"`, ...), a coarse cell of
the frame (`r0c1`: row 0, column 1), or one token (`f2r0c1`: latent frame 2, row 0, column 1).
`region`: one of the boxes of the image that the problem defines.
`channel`: channel of the hidden states or of the latent.

Probes are fitted to layers and compared with INPUTS and X0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cosprobe.errors import InputError

EMBED = "embed"  # input of block 0
X_T = "x_t"  # the noisy latent at the start of the step
X0 = "x0_latent"  # x0-hat, the model's estimate of the clean latent at that step
SOURCES = (EMBED, X_T, X0)

NOISE = "noise"  # the noisy latent at the start of the first step
FIRST_FRAME = "first_frame"  # the image condition, given to the transformer with the noisy latent
PROMPT = "prompt"  # mean of the prompt's token embeddings
DIFFICULTY = "difficulty"  # of the problem: size, path length, ...; it does not depend on the model
INPUTS = (NOISE, FIRST_FRAME, PROMPT, DIFFICULTY, EMBED, X_T)  # all of them exist before the first block has run

SPLIT_ORDER = ("train", "validation", "test")


@dataclass(frozen=True, order=True)
class Cell:
    """What one probe is trained on.

    step: index of the sampler step. layer: index of the transformer block. branch: `cond` or `uncond`, the two
    evaluations of classifier-free guidance. position: what features are averaged over, see above.
    """

    step: int
    layer: int
    branch: str
    position: str

    def __str__(self) -> str:
        return f"step {self.step}, layer {self.layer}, {self.branch}, {self.position}"


@dataclass(frozen=True)
class Place:
    """Where a position is in the token grid: indices of latent frame, row and column, -1 for a mean over that axis."""

    frame: int = -1
    row: int = -1
    column: int = -1

    @classmethod
    def of(cls, position: str) -> Place:
        """The place that a position names."""
        found = re.fullmatch(r"f?(?P<frame>\d+)?(r(?P<row>\d+)c(?P<column>\d+))?", position)
        named = {} if found is None else found.groupdict()
        return cls(**{axis: int(value) for axis, value in named.items() if value is not None})

    @property
    def is_token(self) -> bool:
        """Whether this is a single token."""
        return min(self.frame, self.row, self.column) >= 0


def ranges(values: Sequence[int]) -> str:
    """`0 to 19`, or the sorted values themselves when some are missing."""
    ordered = sorted(values)
    whole = len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]} to {ordered[-1]}" if whole else ", ".join(map(str, ordered))


def parse_selection(spec: str, size: int, axis: str) -> tuple[int, ...]:
    """Indices selected by `all`, `last`, `3`, `0,10,20` or `start:stop[:stride]` (stop excluded).

    spec: the text. size: number of indices of the axis. axis: name of the setting, for error messages.
    Negative numbers count from the end. Returns sorted indices without repeats.
    Raises InputError, with `axis`, the text and the valid range, for a selection that is invalid or empty.
    """
    text = str(spec).strip().strip("[]").replace(" ", "")
    chosen: set[int] = set()
    try:
        for part in text.split(","):
            if part == "all":
                chosen.update(range(size))
            elif part == "last":
                chosen.add(size - 1)
            elif ":" in part:
                fields = [int(x) if x else None for x in part.split(":")]
                if len(fields) > 3 or (fields[1] is not None and fields[1] > size):
                    raise IndexError
                chosen.update(range(size)[slice(*fields)])
            else:
                chosen.add(range(size)[int(part)])
    except IndexError:
        raise InputError(f"{axis}={spec!r}: expected indices from 0 to {size - 1} (there are {size})") from None
    except ValueError:
        raise InputError(
            f"{axis}={spec!r}: expected all, last, 3, 0,10,20 or start:stop:stride, with indices from 0 to {size - 1}"
        ) from None
    if not chosen:
        raise InputError(f"{axis}={spec!r}: selects nothing; expected indices from 0 to {size - 1}")
    return tuple(sorted(chosen))
