"""Settings of the training of video models: the mini model and LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosprobe.bounds import LARGEST_SEED, MANY, check_bounds
from cosprobe.errors import InputError

LONGEST = 1001  # frames of a training clip


@dataclass
class AutoencoderConfig:
    """Size and training of the autoencoder."""

    base_dim: int = 16
    "Channels of the first layer."
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4])
    "Channels of each resolution, as multiples of `base_dim`."
    z_dim: int = 12
    "Channels of the latent."
    patch_size: int = 2
    "Side in pixels of the patches that are folded into channels first."
    stages: list[list[int]] = field(default_factory=lambda: [[1, 32, 1400], [5, 12, 900], [17, 8, 1000]])
    "[longest, batch, steps] of each stage; longest = 1: single frames, else whole videos of up to 4k + 1 frames."
    lr: float = 4e-4
    "Learning rate. Above 1e-3 the reconstruction error stays at that of a grey image."
    warmup: int = 100
    "Steps of linear warm-up."
    kl: float = 2e-6
    "Weight of the KL term. At 1e-5, eight of twelve latent channels became unused."
    emphasis: float = 8.0
    "Weight of pixels that differ from the first frame; they are a small part of a video."
    families: list[str] = field(default_factory=list)
    "Tasks to train on (repeat a name to weight it); empty: all tasks of the model, equally."
    start: str = ""
    "`pipeline.path` to start from, such as `mini`; empty: random weights. Unused channels are initialised again."

    def __post_init__(self) -> None:
        _check_stages("experiment.autoencoder", self.stages, "[longest, batch, steps]", self.start)
        check_bounds(
            "experiment.autoencoder.", self, base_dim=(1, 4096), dim_mult=(1, 64), z_dim=(1, 4096), patch_size=(1, 16),
            lr=(1e-9, 10.0), warmup=(0, MANY), kl=(0.0, 1e6), emphasis=(0.0, 1e6),
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Training steps of all stages."""
        return sum(steps for _, _, steps in self.stages)


@dataclass
class FlowConfig:
    """Settings of flow matching.

    Short clips come first, because the tasks are learned on them at a third of the cost of 13 frames. The usual length
    of 13 frames comes last.
    """

    stages: list[list[int]] = field(default_factory=lambda: [[5, 6000], [17, 600], [13, 3000]])
    "[longest, steps] of each stage; half of the batches hold clips of the longest length, the others shorter ones."
    batch: int = 32
    "Clips per batch, all of one length."
    lr: float = 1.5e-3
    "Learning rate of AdamW, for all parameters except the matrices of blocks."
    muon_lr: float = 0.02
    "Learning rate of `torch.optim.Muon`, for the matrices of blocks; 0: AdamW for all parameters."
    weight_decay: float = 0.01
    "Weight decay."
    warmup: int = 100
    "Steps of linear warm-up."
    decay_from: float = 0.6
    "Share of the steps after which the rate decays linearly to zero."
    shift: float = 3.0
    "Time shift of flow matching."
    emphasis: float = 5.0
    "Weight of tokens that may change in the video; other tokens have weight 1."
    dropout: float = 0.1
    "Share of samples with the empty prompt, which makes guidance possible."
    ema: float = 0.998
    "Decay of the running average of the weights."
    start: str = ""
    "`pipeline.path` of the transformer to start from, such as `mini`; empty: random weights."
    compile: bool = True
    "Compile the transformer: half a minute per length, then steps take a third less time."

    def __post_init__(self) -> None:
        _check_stages("experiment.flow", self.stages, "[longest, steps]", self.start)
        check_bounds(
            "experiment.flow.", self, batch=(1, 10_000), lr=(1e-9, 10.0), muon_lr=(0.0, 10.0), weight_decay=(0.0, 10.0),
            warmup=(0, MANY), decay_from=(0.0, 1.0), shift=(1e-3, 1e3), emphasis=(0.0, 1e6), dropout=(0.0, 1.0),
            ema=(0.0, 1.0),
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Training steps of all stages."""
        return sum(steps for _, steps in self.stages)


@dataclass
class MiniConfig:
    """Settings of the mini model. The autoencoder and the flow can each start from an earlier model (`start`)."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    families: list[str] = field(
        default_factory=lambda: ["maze", "maze", "maze", "hide", "select", "select", "line", "line"]
    )
    "Tasks to learn (repeat a name to weight it)."
    lengths: list[int] = field(default_factory=lambda: [5, 9, 13, 17])
    "Numbers of frames, 4k + 1."
    clips: list[int] = field(default_factory=lambda: [65_536, 8_192, 12_288, 8_192])
    "Number of training clips of each length, shared by the tasks."
    layers: int = 8
    "Number of blocks of the transformer."
    heads: int = 4
    "Attention heads of a block."
    head_dim: int = 32
    "Channels of a head."
    ffn: int = 384
    "Hidden width of the feed-forward layers."
    solve_every: int = 1000
    "Steps of flow matching between measurements of accuracy on validation problems."
    card: list[int] = field(default_factory=lambda: [512, 96, 500])
    "Problems of each kind for the model card: at 13 frames, at each other length, and of reconstructed videos."
    seed: int = 0
    "Random seed."

    def __post_init__(self) -> None:
        _check_clips(self.families, self.clips, self.lengths)
        check_bounds(
            "experiment.", self, layers=(1, 1000), heads=(1, 1000), head_dim=(1, 10_000), ffn=(1, 10**6),
            solve_every=(1, MANY), card=(0, MANY), seed=(0, LARGEST_SEED),
        )  # fmt: skip
        if len(self.card) != 3 or min(self.card[0], self.card[2]) < 1:
            raise InputError(
                f"experiment.card={self.card}: expected three numbers of problems, the first and last at least 1"
            )


def _flow() -> FlowConfig:
    return FlowConfig(stages=[[5, 1500]], lr=3e-3, muon_lr=0.0, warmup=20, compile=False)


@dataclass
class AdapterConfig:
    """Settings of LoRA adapters."""

    families: list[str] = field(default_factory=lambda: ["hide"])
    "Tasks to learn (repeat a name to weight it)."
    lengths: list[int] = field(default_factory=lambda: [5])
    "Numbers of frames, 4k + 1."
    clips: list[int] = field(default_factory=lambda: [4096])
    "Number of training clips of each length, shared by the tasks."
    rank: int = 16
    "Rank of the updates."
    layers: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    )
    "Names of the linear layers that get an update."
    flow: FlowConfig = field(default_factory=_flow)
    card: int = 64
    "Number of unseen problems of each kind on which the model is compared with and without the adapter."
    seed: int = 0
    "Random seed."

    def __post_init__(self) -> None:
        check_bounds("experiment.", self, rank=(1, 10_000), card=(1, MANY), seed=(0, LARGEST_SEED))
        _check_clips(self.families, self.clips, self.lengths)
        if not self.layers:
            raise InputError("experiment.layers=[]: expected names of linear layers")


def _check_clips(families: list[str], clips: list[int], lengths: list[int]) -> None:
    if not families:
        raise InputError("experiment.families=[]: expected at least one task")
    if not lengths or any(length % 4 != 1 or not 5 <= length <= LONGEST for length in lengths):
        raise InputError(f"experiment.lengths={lengths}: expected 4k + 1 frames, from 5 to {LONGEST}")
    if len(clips) != len(lengths) or not all(1 <= count <= MANY for count in clips):
        raise InputError(f"experiment.clips={clips}: expected a number, 1 or more, for each of lengths={lengths}")


def _check_stages(group: str, stages: list[list[int]], form: str, start: str) -> None:
    """Raises InputError for stages of another form, and for none without weights to start from."""
    if not stages and not start:
        raise InputError(
            f"{group}.stages=[]: expected stages {form}, or {group}.start, a model to start from; without either, the "
            "weights would be random"
        )
    if any(len(stage) != form.count(",") + 1 or not all(1 <= n <= MANY for n in stage) for stage in stages):
        raise InputError(f"{group}.stages={stages}: expected a list of {form} with numbers from 1 to {MANY}")
