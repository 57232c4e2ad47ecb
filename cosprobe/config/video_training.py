"""Settings of the training of video models: the mini model and LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosprobe.errors import InputError


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
        _check_clips(self.clips, self.lengths)
        if any(length % 4 != 1 or length < 5 for length in self.lengths):
            raise InputError(f"experiment.lengths={self.lengths}: expected 4k + 1 frames, at least 5")
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
        for name in ("rank", "card"):
            if getattr(self, name) < 1:
                raise InputError(f"experiment.{name}={getattr(self, name)}: expected at least 1")
        _check_clips(self.clips, self.lengths)


def _check_clips(clips: list[int], lengths: list[int]) -> None:
    if len(clips) != len(lengths):
        raise InputError(f"experiment.clips={clips}: expected one number for each of lengths={lengths}")
