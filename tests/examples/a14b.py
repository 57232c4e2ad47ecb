"""The configuration files of Wan2.2-I2V-A14B, as its authors publish them, without weights.

`python -m tests.examples.a14b docs/wan22.md` writes the plan of a run with it between the comments of that page.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from cosprobe.command import load
from cosprobe.config import TrainRun
from cosprobe.plan import make_plan
from cosprobe.tasks import draw_samples, with_margin

BEGIN, END = "<!-- plan -->", "<!-- /plan -->"

TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 40,
    "attention_head_dim": 128, "in_channels": 36, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
    "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
    "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
}  # fmt: skip
FILES = {
    "model_index.json": {
        "_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9, "image_encoder": [None, None],
        "image_processor": [None, None], "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
    "transformer/config.json": TRANSFORMER,
    "transformer_2/config.json": TRANSFORMER,
    "vae/config.json": {
        "_class_name": "AutoencoderKLWan", "base_dim": 96, "dim_mult": [1, 2, 4, 4], "z_dim": 16, "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    },
    "text_encoder/config.json": {
        "model_type": "umt5", "architectures": ["UMT5EncoderModel"], "d_model": 4096, "d_ff": 10240, "d_kv": 64,
        "num_heads": 64, "num_layers": 24, "vocab_size": 256384, "feed_forward_proj": "gated-gelu",
    },
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"},
    "scheduler/scheduler_config.json": {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": 3.0, "num_train_timesteps": 1000, "solver_order": 2,
    },
}  # fmt: skip


def write(folder: Path) -> Path:
    """Writes the files to a folder and returns it."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))
    return folder


def with_plan(page: str) -> str:
    """The page with the plan of its first command, without what depends on the machine."""
    command = next(line for line in page.splitlines() if line.startswith("python train.py plan=true"))
    with TemporaryDirectory() as folder:
        settings = [*shlex.split(command)[3:], f"pipeline.path={write(Path(folder))}"]
        run = load(TrainRun, settings)
        task = with_margin(run.task.build(), run.pipeline.height, run.pipeline.width)
        plan = make_plan(run, task, draw_samples(task, run.task, run.seed))
    lines = "\n".join(line for line in str(plan).splitlines() if not line.startswith("warning"))
    return re.sub(f"{BEGIN}.*?{END}", f"{BEGIN}\n```text\n{lines}\n```\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(with_plan(Path(sys.argv[1]).read_text()))
