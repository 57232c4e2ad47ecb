"""Words shared by every module: axes, cells, and the grammar of selections.

Axes, in the order tensors carry them: `sample` (a problem and a noise seed), `step` (index of the sampler
step, 0 = noisiest; never a timestep), `site`, `branch` (`cond`/`uncond`), `place`, `region`, `channel`.
A site is where features come from: a layer (`"0"`, `"1"`, ... = output of that transformer block), or one of SOURCES.
Probes are fitted to layers. INPUTS and X0 are what they are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosprobe.errors import InputError

EMBED = "embed"  # input of block 0
X_T = "x_t"  # the noisy latent the step starts from
X0 = "x0_latent"  # the clean latent estimated at that step
SOURCES = (EMBED, X_T, X0)

NOISE = "noise"  # the latent the first step starts from
FIRST_FRAME = "first_frame"  # the image condition given beside the noisy latent
PROMPT = "prompt"  # mean of the prompt's token embeddings
NUISANCE = "nuisance"  # the problem's difficulty (size, path length, ...), nothing of the model
INPUTS = (NOISE, FIRST_FRAME, PROMPT, NUISANCE, EMBED, X_T)  # all that can be known before the first block has run

SPLIT_ORDER = ("train", "validation", "test")


@dataclass(frozen=True, order=True)
class Cell:
    """The unit a probe is trained on. `step` is a sampler step index, `site` a layer number or a source."""

    step: int
    site: str
    branch: str
    place: str

    @property
    def is_layer(self) -> bool:
        return self.site.isdigit()

    def __str__(self) -> str:
        return f"step {self.step}, {self.site}, {self.branch}, {self.place}"


def parse_selection(spec: str, size: int, axis: str) -> tuple[int, ...]:
    """Indices named by `all`, `last`, `3`, `0,10,20` or `start:stop[:stride]` (stop excluded).

    Negative numbers count from the end. Returns sorted indices without repeats.
    Raises ValueError naming `axis`, the text and the valid range.
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
        raise InputError(f"{axis}={spec!r}: expected indices from 0 to {size - 1}; there are {size}") from None
    except ValueError:
        raise InputError(
            f"{axis}={spec!r}: expected all, last, 3, 0,10,20 or start:stop:stride, with indices from 0 to {size - 1}"
        ) from None
    if not chosen:
        raise InputError(f"{axis}={spec!r}: selects nothing; expected indices from 0 to {size - 1}")
    return tuple(sorted(chosen))
