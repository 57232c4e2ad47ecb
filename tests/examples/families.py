"""Real diffusers pipelines of every family at toy size, with random weights.

Each function builds one pipeline, frozen and in eval mode. `FAMILIES` has all of them, with the arguments of a direct
call. Sizes are not square, so that height and width cannot be confused. Schedulers and conditions are of the kinds of
the published models. Every pipeline can be saved with `save_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    DEFAULT_PROMPT_TEMPLATE as DEFAULT_IMAGE_PROMPT_TEMPLATE,
)
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import PreTokenizer, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from cosprobe.minimodel.encoding import TEXT_TOKENS, TEXT_WIDTH, build_text
from cosprobe.models.loading import freeze
from tests.examples.pipelines import PROMPT

PROMPTS = (PROMPT, "push the blue box onto the green cross and then stop")
NEGATIVE = "a grey box"
WORDS = [*PROMPTS, NEGATIVE, ""]  # the vocabulary of the tokenizers; any other word is <unk>
T5_WIDTH = 32
CLIP_WIDTH = 16
LATENT = 4  # latent channels of most of the autoencoders

CogVideoXScheduler = type[CogVideoXDDIMScheduler] | type[CogVideoXDPMScheduler]


def _frozen(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return freeze(pipeline)


def reloaded(folder: Path | str) -> DiffusionPipeline:
    """Loads a pipeline that was saved, frozen. Its videos are bit-equal to those of the pipeline that was saved.

    The weights are copied out of the mapped file. There, they are aligned in another way than in memory, and some
    operations then round differently. What autoencoders do not save is turned on again.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for values in (*part.parameters(), *part.buffers()):
                values.data = values.data.clone()
    if isinstance(pipeline, AllegroPipeline):
        _tiled(pipeline.vae)
    return _frozen(pipeline)


def _t5() -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    tokenizer, _ = build_text(WORDS, seed=0)
    size = T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(size)


def _image_processor(side: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _clip_vision(side: int, patch: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=patch, projection_dim=CLIP_WIDTH,
    )  # fmt: skip


# Wan: height and width are multiples of 16 (Wan2.2-TI2V: 32), frames 4k + 1. Sizes that are no multiples of 16 are an
# error. Other sizes and frames are rounded, with a warning.
# One image a call. A list of images is refused. A tensor of n images for n prompts fails, because the pipeline repeats
# it n times, and with a list of generators encodes it for each of them.


def _wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=LATENT, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.8, 1.1, 0.7],
    )  # fmt: skip


def _wan_transformer(channels: int = LATENT, **more: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=LATENT,
        text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32, **more,
    )  # fmt: skip


def _flow_unipc(shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def wan21_t2v() -> DiffusionPipeline:
    """Wan 2.1 text-to-video: one expert."""
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    return _frozen(WanPipeline(*text, _wan_vae(), _flow_unipc(3.0), transformer=_wan_transformer()))


def wan21_i2v() -> DiffusionPipeline:
    """Wan 2.1 image-to-video: every block attends to a CLIP embedding of the image as well.

    Its attention takes the last 512 tokens for the text, whatever `max_sequence_length` is, so that must be 512. The
    image has to be a PIL image: values of a tensor in [0, 1] are divided by 255 once more for CLIP.
    """
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    encoder = CLIPVisionModel(_clip_vision(side=16, patch=8))
    transformer = _wan_transformer(2 * LATENT + 4, image_dim=CLIP_WIDTH, added_kv_proj_dim=24)
    return _frozen(
        WanImageToVideoPipeline(*text, _wan_vae(), _flow_unipc(3.0), _image_processor(16), encoder, transformer)
    )


def wan22_t2v() -> DiffusionPipeline:
    """Wan2.2-T2V-A14B: two experts, which switch at timestep 875."""
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    experts = {"transformer": _wan_transformer(), "transformer_2": _wan_transformer()}
    return _frozen(WanPipeline(*text, _wan_vae(), _flow_unipc(3.0), boundary_ratio=0.875, **experts))


def wan22_t2v_low() -> DiffusionPipeline:
    """Wan2.2-T2V-A14B without its expert for high noise."""
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    return _frozen(
        WanPipeline(*text, _wan_vae(), _flow_unipc(3.0), transformer_2=_wan_transformer(), boundary_ratio=1.0)
    )


def wan22_i2v_high() -> DiffusionPipeline:
    """Wan2.2-I2V-A14B without its expert for low noise, with the scheduler of the first Wan."""
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _frozen(WanImageToVideoPipeline(*text, _wan_vae(), flow, transformer=_wan_transformer(2 * LATENT + 4)))


def wan21_t2v_dpm() -> DiffusionPipeline:
    """Wan 2.1 with DPM-Solver++."""
    pipeline = wan21_t2v()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipeline.register_modules(scheduler=DPMSolverMultistepScheduler(**flow))
    return pipeline


def wan22_i2v() -> DiffusionPipeline:
    """Wan2.2-I2V-A14B: two experts, which switch at timestep 900. No CLIP embedding."""
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    channels = 2 * LATENT + 4  # the latent, a mask with a channel for each of 4 frames, the image
    experts = {"transformer": _wan_transformer(channels), "transformer_2": _wan_transformer(channels)}
    return _frozen(WanImageToVideoPipeline(*text, _wan_vae(), _flow_unipc(3.0), boundary_ratio=0.9, **experts))


def _wan22_ti2v(kind: type[WanPipeline] | type[WanImageToVideoPipeline]) -> DiffusionPipeline:
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=LATENT, dim_mult=[1, 2, 2, 2], num_res_blocks=1, is_residual=True,
        temperal_downsample=[False, True, True], patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.8, 1.1, 0.7],
    )  # fmt: skip
    return _frozen(kind(*text, vae, _flow_unipc(5.0), transformer=_wan_transformer(), expand_timesteps=True))


def wan22_ti2v_t2v() -> DiffusionPipeline:
    """Wan2.2-TI2V-5B without an image: a timestep for each token, all the same."""
    return _wan22_ti2v(WanPipeline)


def wan22_ti2v_i2v() -> DiffusionPipeline:
    """Wan2.2-TI2V-5B with an image, which replaces the first latent frame. The timestep of its tokens is 0.

    The transformer has no extra input channels for the image.
    """
    return _wan22_ti2v(WanImageToVideoPipeline)


# LTX: height and width are multiples of 32 (others are an error), frames 8k + 1 (others are rounded down, without a
# warning).
# An image for every prompt. One image for several prompts works with one generator, but not with a list of generators.
# With timestep conditioning, image-to-video fails in decoding for any list of generators: it is passed to torch.randn.


def _ltx(kind: type[LTXPipeline] | type[LTXImageToVideoPipeline], timestep_conditioning: bool) -> DiffusionPipeline:
    torch.manual_seed(0)
    tokenizer, encoder = _t5()
    conditioned: dict[str, Any] = {
        "timestep_conditioning": True, "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 1, 1, 1), "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False, False, False, False), "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
    }  # fmt: skip
    plain: dict[str, Any] = {"decoder_block_out_channels": (8, 8, 8, 8), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        **(conditioned if timestep_conditioning else plain),
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.3, 8))  # buffers, not settings: 0 and 1 unless they are loaded
    vae.latents_std.copy_(torch.linspace(0.5, 1.2, 8))
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=3, caption_channels=T5_WIDTH,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return _frozen(kind(scheduler, vae, encoder, tokenizer, transformer))


def ltx_t2v(timestep_conditioning: bool = False) -> DiffusionPipeline:
    """LTX-Video from text. The loop has packed latents [batch, token, channel].

    timestep_conditioning: the decoder denoises as well, as from version 0.9.1 on. The call then takes `decode_timestep`
    and `decode_noise_scale`.
    """
    return _ltx(LTXPipeline, timestep_conditioning)


def ltx_i2v(timestep_conditioning: bool = False) -> DiffusionPipeline:
    """LTX-Video from an image, which is the first latent frame and is kept. The timestep of its tokens is 0."""
    return _ltx(LTXImageToVideoPipeline, timestep_conditioning)


# CogVideoX: height and width are multiples of 16. Diffusers asks for multiples of 8, then the patches fail. Frames
# 8k + 1: others are changed without a warning, such as 13 to 16, because the decoder takes latent frames in pairs.
# CogVideoX 1.5 adds a latent frame in front if their number is odd. It is in the latents, and is cut before decoding.
# An image for every prompt. One image for several prompts fails.


def _cogvideox(
    kind: type[CogVideoXPipeline] | type[CogVideoXImageToVideoPipeline], scheduler: CogVideoXScheduler,
    snr_shift: float, scaling: float, inverted: bool = False, **transformer: Any,
) -> DiffusionPipeline:  # fmt: skip
    torch.manual_seed(0)
    tokenizer, encoder = _t5()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=LATENT, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, scaling_factor=scaling, invert_scale_latents=inverted,
    )  # fmt: skip
    sides = {"sample_height": 8, "sample_width": 12, "sample_frames": 9}
    channels = LATENT if kind is CogVideoXPipeline else 2 * LATENT
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=LATENT, time_embed_dim=16,
        text_embed_dim=T5_WIDTH, num_layers=3, max_text_seq_length=TEXT_TOKENS, **(sides | transformer),
    )  # fmt: skip
    noise = scheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        snr_shift_scale=snr_shift,
    )  # fmt: skip
    return _frozen(kind(tokenizer, encoder, vae, model, noise))


def cogvideox_t2v(scheduler: CogVideoXScheduler = CogVideoXDDIMScheduler) -> DiffusionPipeline:
    """CogVideoX 1.0 from text. With DDIM it is like CogVideoX-2b, with DPM like 5b, which has rotary positions.

    2b has fixed positions. They allow one number of text tokens, 32.
    """
    if scheduler is CogVideoXDDIMScheduler:
        return _cogvideox(CogVideoXPipeline, scheduler, 3.0, 1.15258426)
    return _cogvideox(CogVideoXPipeline, scheduler, 1.0, 0.7, use_rotary_positional_embeddings=True)


def cogvideox_i2v(scheduler: CogVideoXScheduler = CogVideoXDPMScheduler) -> DiffusionPipeline:
    """CogVideoX-5b-I2V: rotary and learned positions. The latter allow one size and one number of text tokens, 32.

    For any number of frames but 9, diffusers puts fixed positions in their place, without a warning.
    """
    return _cogvideox(
        CogVideoXImageToVideoPipeline, scheduler, 1.0, 0.7, use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )  # fmt: skip


def cogvideox15_t2v(scheduler: CogVideoXScheduler = CogVideoXDPMScheduler) -> DiffusionPipeline:
    """CogVideoX 1.5 from text: patches of two latent frames."""
    return _cogvideox(
        CogVideoXPipeline, scheduler, 1.0, 0.7, inverted=True, use_rotary_positional_embeddings=True, patch_size_t=2,
        patch_bias=False, sample_height=16, sample_width=16,
    )  # fmt: skip


def cogvideox15_i2v(scheduler: CogVideoXScheduler = CogVideoXDPMScheduler) -> DiffusionPipeline:
    """CogVideoX 1.5 from an image, with an embedding of the offset 2.0, which the pipeline always passes."""
    return _cogvideox(
        CogVideoXImageToVideoPipeline, scheduler, 1.0, 0.7, inverted=True, use_rotary_positional_embeddings=True,
        patch_size_t=2, patch_bias=False, sample_height=16, sample_width=16, ofs_embed_dim=16,
    )  # fmt: skip


# Mochi: height and width are multiples of 16. Diffusers asks for multiples of 8, then the patches fail. Frames 6k + 1
# (others are rounded down, without a warning). At least 2 steps: the schedule divides by half of them.


def mochi() -> DiffusionPipeline:
    """Mochi 1. Its last block has no text output and returns the text as it came.

    The scheduler counts sigma upwards from 0, noise, to 1, and the transformer predicts data minus noise.
    """
    torch.manual_seed(0)
    tokenizer, encoder = _t5()
    vae = AutoencoderKLMochi(  # 12 latent channels are written into the pipeline, groups of 32 into the norms
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False, False, False, False, False),
    )  # fmt: skip
    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=T5_WIDTH, time_embed_dim=16, max_sequence_length=TEXT_TOKENS,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.pos_frequencies)  # 0 unless they are loaded: no positions
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return _frozen(MochiPipeline(scheduler, vae, encoder, tokenizer, transformer))


# HunyuanVideo: height and width are multiples of 16 (others are an error), frames 4k + 1 (others are rounded down,
# without a warning).
# An image for every prompt. One image for several prompts fails. Guidance of image-to-video fails for several prompts:
# the negative prompts get one black image for all of them. Images go through CLIP, as in `wan21_i2v`.

LLAMA_WIDTH = 24
LLAMA_SPECIAL = (
    "<pad>", "<unk>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>",
)  # fmt: skip
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<unk>")
LLAMA_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"


def _word_tokenizer(
    texts: Sequence[str], special: Sequence[str], split: PreTokenizer, template: str, pad: str
) -> PreTrainedTokenizerFast:
    """A tokenizer over the pieces that `split` finds in `texts`. special: the first tokens. template: around a text."""
    pieces = {piece.lower() for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {piece: i for i, piece in enumerate([*special, *sorted(pieces - set(special))])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = Lowercase(), split
    core.add_special_tokens(list(special))
    around = [(token, vocabulary[token]) for token in template.split() if token in special]
    core.post_processor = TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, unk_token="<unk>", padding_side="right")


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word. Like the tokenizer of Llama 3, it has 95 and 103 tokens for what diffusers writes
    before a prompt and cuts off again, and the image is token 5.
    """
    templates = [t["template"] for t in (DEFAULT_PROMPT_TEMPLATE, DEFAULT_IMAGE_PROMPT_TEMPLATE)]
    between = "|".join(re.escape(mark) for mark in (*LLAMA_SPECIAL, "{}"))
    texts = [part for template in templates for part in re.split(between, template)]
    texts += [f"{space}{word}" for text in WORDS for word in text.split() for space in ("", " ")]
    split = Split(Regex(LLAMA_WORDS), behavior="isolated")
    return _word_tokenizer(texts, LLAMA_SPECIAL, split, "<|begin_of_text|> $A", pad="<pad>")


def _clip_text() -> tuple[CLIPTextModel, PreTrainedTokenizerFast]:
    template = "<|startoftext|> $A <|endoftext|>"
    tokenizer = _word_tokenizer(WORDS, CLIP_SPECIAL, WhitespaceSplit(), template, pad="<|endoftext|>")
    size = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=CLIP_WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(size), tokenizer


def _llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(  # the hidden states two layers before the last are taken
        vocab_size=len(tokenizer), hidden_size=LLAMA_WIDTH, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=5,
    )  # fmt: skip


def _hunyuan_parts(**transformer: Any) -> dict[str, Any]:
    encoder_2, tokenizer_2 = _clip_text()
    return {
        "transformer": HunyuanVideoTransformer3DModel(
            out_channels=LATENT, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2,
            num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=LLAMA_WIDTH, pooled_projection_dim=CLIP_WIDTH,
            rope_axes_dim=(4, 4, 4), **transformer,
        ),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=LATENT, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": encoder_2,
        "tokenizer_2": tokenizer_2,
    }  # fmt: skip


def hunyuan_t2v() -> DiffusionPipeline:
    """HunyuanVideo from text: 2 blocks of two streams, 2 of one, and `guidance_scale` as an embedding.

    Real guidance has to be asked for with `true_cfg_scale` and a negative prompt.
    """
    torch.manual_seed(0)
    tokenizer = _llama_tokenizer()
    parts = _hunyuan_parts(in_channels=LATENT, guidance_embeds=True)
    return _frozen(HunyuanVideoPipeline(LlamaModel(_llama_config(tokenizer)), tokenizer, **parts))


def _hunyuan_i2v(**transformer: Any) -> DiffusionPipeline:
    """The Llava encoder has the 576 image tokens that the pipeline expects, from an image of 24 x 24 pixels."""
    torch.manual_seed(0)
    tokenizer = _llama_tokenizer()
    llava = LlavaConfig(
        vision_config=_clip_vision(side=24, patch=1), text_config=_llama_config(tokenizer),
        image_token_index=LLAMA_SPECIAL.index("<image>"),
    )  # fmt: skip
    llava.pad_token_id = 0
    encoder = LlavaForConditionalGeneration(llava)
    parts = _hunyuan_parts(**transformer)
    return _frozen(HunyuanVideoImageToVideoPipeline(encoder, tokenizer, image_processor=_image_processor(24), **parts))


def hunyuan_i2v_concat() -> DiffusionPipeline:
    """HunyuanVideo-I2V with the image and a mask as extra channels. The first 4 frames of the video are cut off."""
    return _hunyuan_i2v(in_channels=2 * LATENT + 1, guidance_embeds=False, image_condition_type="latent_concat")


def hunyuan_i2v_replace() -> DiffusionPipeline:
    """HunyuanVideo-I2V with the image in place of the first latent frame, and other modulation for its tokens."""
    return _hunyuan_i2v(in_channels=LATENT, guidance_embeds=True, image_condition_type="token_replace")


# Allegro: frames 24 + 16k, height 128 + 16j, width 128 + 48k at this tile of 128 pixels (of the published model, with
# tiles of 320 pixels: height 320 + 400j, width 320 + 240k). Its decoder works on tiles. What no tile covers stays grey,
# without a warning: a video smaller than a tile is grey all over. The overlap is fixed, and a tile has to be larger.


def _tiled(vae: AutoencoderKLAllegro) -> None:
    vae.enable_tiling()
    vae.enable_slicing()


def allegro() -> DiffusionPipeline:
    """Allegro, with an ancestral scheduler: every step draws noise from the generator.

    Tiling has to be on for decoding, and slicing for decoding more than one video. Neither is saved with the pipeline.
    """
    torch.manual_seed(0)
    tokenizer, encoder = _t5()
    vae = AutoencoderKLAllegro(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=LATENT, sample_size=128
    )
    _tiled(vae)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=LATENT, out_channels=LATENT, num_layers=3,
        cross_attention_dim=24, sample_height=16, sample_width=22, sample_frames=6, caption_channels=T5_WIDTH,
    )  # fmt: skip
    return _frozen(AllegroPipeline(tokenizer, encoder, vae, transformer, EulerAncestralDiscreteScheduler()))


# SkyReels-V2: sizes and frames as for Wan.


def _skyreels_transformer(channels: int = LATENT, **more: Any) -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=LATENT,
        text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32, **more,
    )  # fmt: skip


def skyreels_t2v() -> DiffusionPipeline:
    """SkyReels-V2 from text."""
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    return _frozen(SkyReelsV2Pipeline(*text, _skyreels_transformer(), _wan_vae(), _flow_unipc(8.0)))


def skyreels_i2v() -> DiffusionPipeline:
    """SkyReels-V2 from an image, with its CLIP embedding as in Wan 2.1: `max_sequence_length` must be 512."""
    torch.manual_seed(0)
    text = build_text(WORDS, seed=0)
    transformer = _skyreels_transformer(2 * LATENT + 4, image_dim=CLIP_WIDTH, added_kv_proj_dim=24)
    encoder = CLIPVisionModelWithProjection(_clip_vision(side=16, patch=8))
    return _frozen(
        SkyReelsV2ImageToVideoPipeline(*text, encoder, _image_processor(16), transformer, _wan_vae(), _flow_unipc(5.0))
    )


@dataclass(frozen=True)
class Example:
    """One family.

    build: makes the pipeline. takes_image: the call takes `image`. height, width, frames: a valid toy size, in pixels.
    call: more arguments that a direct call needs at toy size. guided, unguided: turn guidance on and off.
    """

    build: Callable[[], DiffusionPipeline]
    takes_image: bool
    height: int
    width: int
    frames: int
    call: dict[str, Any] = field(default_factory=lambda: {"max_sequence_length": TEXT_TOKENS})
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})

    def arguments(self, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """The arguments of a direct call, without `image`, `generator` and steps.

        A negative prompt is repeated for every prompt: not every pipeline does that.
        """
        guidance = dict(self.guided if guided else self.unguided)
        if "negative_prompt" in guidance:
            guidance["negative_prompt"] = [guidance["negative_prompt"]] * len(prompts)
        size = {"height": self.height, "width": self.width, "num_frames": self.frames}
        return {"prompt": list(prompts), **size, **self.call, **guidance}


_LTX_DECODE = {"max_sequence_length": TEXT_TOKENS, "decode_timestep": 0.05, "decode_noise_scale": 0.025}
_TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": NEGATIVE}

FAMILIES: dict[str, Example] = {
    "wan21_t2v": Example(wan21_t2v, False, 32, 48, 9),
    "wan21_i2v": Example(wan21_i2v, True, 32, 48, 9, {"max_sequence_length": 512}),
    "wan21_t2v_dpm": Example(wan21_t2v_dpm, False, 32, 48, 9),
    "wan22_t2v": Example(wan22_t2v, False, 32, 48, 9),
    "wan22_t2v_low": Example(wan22_t2v_low, False, 32, 48, 9),
    "wan22_i2v_high": Example(wan22_i2v_high, True, 32, 48, 9),
    "wan22_i2v": Example(wan22_i2v, True, 32, 48, 9),
    "wan22_ti2v_t2v": Example(wan22_ti2v_t2v, False, 64, 96, 9),
    "wan22_ti2v_i2v": Example(wan22_ti2v_i2v, True, 64, 96, 9),
    "ltx_t2v": Example(ltx_t2v, False, 64, 96, 17),
    "ltx_i2v": Example(ltx_i2v, True, 64, 96, 17),
    "ltx_t2v_conditioned": Example(lambda: ltx_t2v(timestep_conditioning=True), False, 64, 96, 17, _LTX_DECODE),
    "ltx_i2v_conditioned": Example(lambda: ltx_i2v(timestep_conditioning=True), True, 64, 96, 17, _LTX_DECODE),
    "cogvideox_t2v": Example(cogvideox_t2v, False, 32, 48, 9),
    "cogvideox_t2v_dpm": Example(lambda: cogvideox_t2v(CogVideoXDPMScheduler), False, 32, 48, 9),
    "cogvideox_i2v": Example(cogvideox_i2v, True, 64, 96, 9),
    "cogvideox_i2v_ddim": Example(lambda: cogvideox_i2v(CogVideoXDDIMScheduler), True, 64, 96, 9),
    "cogvideox15_t2v": Example(cogvideox15_t2v, False, 32, 48, 9),
    "cogvideox15_t2v_ddim": Example(lambda: cogvideox15_t2v(CogVideoXDDIMScheduler), False, 32, 48, 9),
    "cogvideox15_i2v": Example(cogvideox15_i2v, True, 32, 48, 9),
    "cogvideox15_i2v_ddim": Example(lambda: cogvideox15_i2v(CogVideoXDDIMScheduler), True, 32, 48, 9),
    "mochi": Example(mochi, False, 32, 48, 13),
    "hunyuan_t2v": Example(hunyuan_t2v, False, 32, 48, 9, guided=_TRUE_CFG, unguided={"true_cfg_scale": 1.0}),
    "hunyuan_i2v_concat": Example(
        hunyuan_i2v_concat, True, 32, 48, 9, guided=_TRUE_CFG, unguided={"true_cfg_scale": 1.0}
    ),
    "hunyuan_i2v_replace": Example(
        hunyuan_i2v_replace, True, 32, 48, 9, guided=_TRUE_CFG, unguided={"true_cfg_scale": 1.0}
    ),
    "allegro": Example(allegro, False, 128, 176, 24, {"max_sequence_length": TEXT_TOKENS, "clean_caption": False}),
    "skyreels_t2v": Example(skyreels_t2v, False, 32, 48, 9),
    "skyreels_i2v": Example(skyreels_i2v, True, 32, 48, 9, {"max_sequence_length": 512}),
}
