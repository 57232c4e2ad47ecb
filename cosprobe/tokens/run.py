"""`python probe.py use=tokens`: samples problems with all tokens of some layers and steps, and measures every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, UInt8

from cosprobe.activations import ActivationCache, Pooling, Sampler, capture, images
from cosprobe.behaviour import read_image
from cosprobe.cells import EMBED, Place, parse_selection
from cosprobe.config import TokensConfig
from cosprobe.errors import InputError
from cosprobe.files import size_text
from cosprobe.models import COND, architecture, first_transformer, pipeline_fingerprint, sample
from cosprobe.probes import ProbeBank
from cosprobe.runtime import enough_memory, rank_and_world, say
from cosprobe.tasks import Problem, TaskConfig, fresh_problems, has_path, in_workspace, noise_seed, on_path, with_noise
from cosprobe.tokens.measures import TokenRun, measure_layer, path_contrast
from cosprobe.tokens.report import write_tokens

MOST_LAYERS, MOST_STEPS = 5, 5  # by default


def tokens(sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: TokensConfig, seed: int, folder: Path) -> None:
    """Samples new problems, or one image of the user's, measures every token, and writes figures, arrays and a page.

    sampler: the loaded pipeline and the task of the run. task: settings of that task. bank: of the run; it names the
    model. The files are in report/tokens of `folder`, the folder of the result. With several processes, only the first
    one does anything.
    Raises InputError for another model, for layers, steps or kinds that the run does not have, for an image that cannot
    be read or has another aspect ratio, and when the memory is too small.
    """
    if rank_and_world()[0]:
        return
    bank.check_model(pipeline_fingerprint(sampler.model), "the loaded pipeline")
    for path in write_tokens(token_runs(sampler, task, use, seed), folder):
        say(f"{path}")


@enough_memory("choose fewer use.layers or use.steps")
def token_runs(sampler: Sampler, task: TaskConfig, use: TokensConfig, seed: int) -> list[TokenRun]:
    """Samples as `tokens` does, and returns the measures of every sample."""
    total, depth = sampler.config.steps, sampler.depth
    chosen = use.layers or ",".join(map(str, _spaced(depth, MOST_LAYERS)))
    layers = parse_selection(chosen, depth, "use.layers")
    steps = parse_selection(use.steps, total, "use.steps") if use.steps else _spaced(total, MOST_STEPS)
    steps = (*(step for step in steps if step < total - 1), total - 1)  # the cosine needs the last step
    if use.image:
        problems: list[Problem] = []
    else:
        kind = use.kind or sampler.task.kinds[0]
        if kind not in sampler.task.kinds:
            raise InputError(f"use.kind={kind!r}: expected one of {', '.join(sampler.task.kinds)}")
        problems = fresh_problems(sampler.task, "test", task.problems, use.problems, [kind])
    say(_sizes(sampler, min(max(1, len(problems)), sampler.config.batch), len(layers) + 1, len(steps)))
    if use.image:
        return [_own(sampler, use, layers, steps, seed)]
    return list(_of_problems(sampler, problems, layers, steps, seed))


def _spaced(count: int, most: int) -> tuple[int, ...]:
    """At most `most` evenly spaced indices, the first and the last among them."""
    return tuple(dict.fromkeys(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _sizes(sampler: Sampler, samples: int, layers: int, steps: int) -> str:
    """What is kept in memory while a batch is sampled."""
    config, grid = first_transformer(sampler.model).config, sampler.token_grid
    width = config.num_attention_heads * config.attention_head_dim
    branches = 2 if sampler.config.guided(architecture(sampler.model).guidance) else 1
    count = grid.frames * grid.rows * grid.columns
    size = (
        samples
        * layers
        * steps
        * branches
        * count
        * width
        * next(first_transformer(sampler.model).parameters()).element_size()
    )
    times = f"{samples} samples x {layers} layers x {steps} steps x {count} tokens x {width} channels"
    return f"tokens: {size_text(size)} in memory ({times}{' x 2 branches' if branches == 2 else ''})"


@torch.no_grad()
def _of_problems(
    sampler: Sampler, problems: Sequence[Problem], layers: Sequence[int], steps: Sequence[int], seed: int
) -> Iterator[TokenRun]:
    """Samples problems under capture, batch by batch."""
    for batch in sampler.batches(with_noise(problems, seed)):
        with _captured(sampler, layers, steps) as cache:
            video = np.asarray(sampler(batch))
        for i, one in enumerate(batch):
            measures, problem = _measured(cache, i), one.problem
            path, contrast = None, None
            if has_path(sampler.task, problem):
                size = measures.sizes["row"], measures.sizes["column"]
                path, workspace = (of(sampler.task, problem, *size) for of in (on_path, in_workspace))
                if path.any() and (workspace & ~path).any():
                    contrast = path_contrast(measures.energy.transpose("step", "layer", ...).values, path, workspace)
            name = f"{problem.kind}_{problem.index}"
            yield TokenRun(name, problem.prompt, measures, _bytes(video[i, -1]), path, contrast)


@torch.no_grad()
def _own(sampler: Sampler, use: TokensConfig, layers: Sequence[int], steps: Sequence[int], seed: int) -> TokenRun:
    """Samples one image of the user's. It has no known path."""
    path, problem = Path(use.image).expanduser(), sampler.task.problems("test", 1)[0]
    image = read_image(path, *images(sampler.task, [problem]).shape[2:])
    given = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with _captured(sampler, layers, steps) as cache:
        video = sample(sampler.model, sampler.config, given, [use.prompt], [noise_seed(problem, 0, seed)])
    return TokenRun(path.stem, use.prompt, _measured(cache, 0), _bytes(np.asarray(video)[0, -1]))


def _captured(sampler: Sampler, layers: Sequence[int], steps: Sequence[int]) -> AbstractContextManager[ActivationCache]:
    """A capture of all tokens."""
    return capture(sampler.model, [*map(str, layers), EMBED], Pooling("token"), ",".join(map(str, steps)))


def _measured(cache: ActivationCache, sample_index: int) -> xr.Dataset:
    """The measures of all layers of one sample of a batch, one layer at a time."""
    last = Place.of(cache.positions[-1])
    size = last.frame + 1, last.row + 1, last.column + 1
    names = sorted(cache.hook_points, key=lambda name: -1 if name == EMBED else int(name))
    found = []
    for name in names:
        states = [cache.parts[step, name, COND][sample_index, :, 0] for step in cache.steps]
        found.append(measure_layer(torch.stack(states), size))
    whole = xr.concat(found, "layer", data_vars="all")
    return whole.assign_coords(layer=names, step=list(cache.steps))


def _bytes(picture: Float[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
