"""Tiny random pipelines of every architecture, from the libraries' own classes; nothing is downloaded."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    KolorsPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_encoders import (
    bert,
    bert_tokenizer,
    byt5_tokenizer,
    chatglm,
    chatglm_tokenizer,
    clip,
    clip_tokenizer,
    gemma2,
    glm,
    llama,
    mistral3,
    qwen2_5_vl,
    qwen3,
    t5,
    t5_tokenizer,
    umt5,
    word_tokenizer,
)
from transformers import CLIPTextModelWithProjection

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
LATENTS = {"in_channels": 4, "out_channels": 4}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def vae(channels=4, levels=3, **changes):
    """Three levels, so 4 pixels a side for each latent position; four levels, 8 pixels."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": (8,) * levels, "latent_channels": channels, "norm_num_groups": 4, "sample_size": 32}
    return AutoencoderKL(**sizes, **kinds, **changes).eval()


def flux_vae(channels, levels=3):
    """The scale and shift that Flux's has, and many have taken from it."""
    return vae(channels, levels, shift_factor=0.1159, scaling_factor=0.3611, **NO_QUANT)


def unet(width, **changes):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
        **changes,
    ).eval()


def sd(prediction_type="epsilon"):
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(8),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        **NO_CHECKER,
    )


def sd_velocity():
    return sd("v_prediction")


def sdxl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 12),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            20,
            **added,
            projection_class_embeddings_input_dim=12 + 6 * 4,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def sd3(with_t5=True, dual_attention_layers=(0,), qk_norm="rms_norm"):
    """SD3.5's layout; SD3 itself has no second attention and no norm of queries and keys."""
    return StableDiffusion3Pipeline(
        vae=vae(4, shift_factor=0.0609, scaling_factor=1.5305, **NO_QUANT),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection, 12),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            **LATENTS,
            num_layers=3,
            **HEADS,
            joint_attention_dim=20,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            pos_embed_max_size=8,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd3_plain():
    """SD3 medium's layout, without T5."""
    return sd3(with_t5=False, dual_attention_layers=(), qk_norm=None)


def flux(guidance_embeds=True):
    """Flux dev's layout: three double and two single blocks, embedded guidance, dynamic shifting."""
    return FluxPipeline(
        vae=flux_vae(2),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=8,
            num_layers=3,
            num_single_layers=2,
            **HEADS,
            joint_attention_dim=20,
            pooled_projection_dim=8,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def flux_schnell():
    pipeline = flux(guidance_embeds=False)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    return pipeline


def chroma():
    """Flux's layout without pooled text and guidance."""
    return ChromaPipeline(
        vae=flux_vae(2),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=ChromaTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=1,
            **HEADS,
            joint_attention_dim=20,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def flux2_vae():
    """Latents that are not of mean 0 and variance 1 before its batch norm."""
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=2,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def flux2_transformer(width, guidance_embeds):
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=width,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    ).eval()


def flux2():
    """Flux.2 dev's layout."""
    return Flux2Pipeline(
        vae=flux2_vae(),
        text_encoder=mistral3(8),
        tokenizer=word_tokenizer("left"),
        transformer=flux2_transformer(24, guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def flux2_klein():
    """Flux.2 klein's layout."""
    return Flux2KleinPipeline(
        vae=flux2_vae(),
        text_encoder=qwen3(8, layers=27),
        tokenizer=word_tokenizer(),
        transformer=flux2_transformer(24, guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def qwen_image():
    """A VAE of videos, with statistics per channel."""
    return QwenImagePipeline(
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.5, -1.0, 0.25, 0.0],
            latents_std=[2.0, 1.0, 4.0, 0.5],
        ).eval(),
        text_encoder=qwen2_5_vl(),
        tokenizer=word_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            **HEADS,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


def z_image():
    return ZImagePipeline(
        vae=flux_vae(4),
        text_encoder=qwen3(8),
        tokenizer=word_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[2, 2, 4],
            axes_lens=[128, 32, 32],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def lumina2():
    return Lumina2Pipeline(
        vae=flux_vae(4, levels=4),
        text_encoder=gemma2(8),
        tokenizer=word_tokenizer(),
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 16, 16),
            cap_feat_dim=8,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def cogview4():
    return CogView4Pipeline(
        vae=vae(4, **NO_QUANT),
        text_encoder=glm(8),
        tokenizer=word_tokenizer("left"),
        transformer=CogView4Transformer2DModel(
            **LATENTS,
            num_layers=2,
            **HEADS,
            text_embed_dim=8,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
            rope_axes_dim=(8, 8),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


def pixart_transformer(sample_size, heads=2, **changes):
    return PixArtTransformer2DModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=heads,
        cross_attention_dim=8 * heads,
        caption_channels=20,
        norm_num_groups=4,
        **changes,
    ).eval()


def pixart_sigma():
    return PixArtSigmaPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=pixart_transformer(32, use_additional_conditions=False),
        scheduler=DPMSolverMultistepScheduler(),
    )


def pixart_alpha():
    """The one of 1024 pixels, which is told size and aspect ratio."""
    return PixArtAlphaPipeline(
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=pixart_transformer(128, heads=3),
        scheduler=DPMSolverMultistepScheduler(),
    )


def sana():
    """A deep-compression VAE and a solver with the sigmas of flow matching."""
    halves = {f"{half}_block_types": "ResBlock" for half in ("encoder", "decoder")}
    halves |= {f"{half}_block_out_channels": (8, 8, 8) for half in ("encoder", "decoder")}
    halves |= {f"{half}_layers_per_block": (1, 1, 1) for half in ("encoder", "decoder")}
    halves |= {f"{half}_qkv_multiscales": ((), (), ()) for half in ("encoder", "decoder")}
    return SanaPipeline(
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            upsample_block_type="interpolate",
            downsample_block_type="stride_conv",
            scaling_factor=0.41407,
            **halves,
        ).eval(),
        text_encoder=gemma2(8),
        tokenizer=word_tokenizer(),
        transformer=SanaTransformer2DModel(
            sample_size=32,
            patch_size=1,
            **LATENTS,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=8,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )


def hunyuan_dit():
    return HunyuanDiTPipeline(
        vae=vae(levels=4, scaling_factor=0.13025),
        text_encoder=bert(8),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5(24),
        tokenizer_2=t5_tokenizer(),
        transformer=HunyuanDiT2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=4,
            **HEADS,
            hidden_size=16,
            cross_attention_dim=8,
            cross_attention_dim_t5=24,
            pooled_projection_dim=4,
        ).eval(),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False),
        **NO_CHECKER,
    )


def auraflow():
    return AuraFlowPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=umt5(),
        tokenizer=t5_tokenizer(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            **LATENTS,
            num_mmdit_layers=2,
            num_single_dit_layers=1,
            **HEADS,
            joint_attention_dim=20,
            caption_projection_dim=16,
            pos_embed_max_size=256,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def hunyuan_image(guidance_embeds=True):
    """Two text encoders, of which the second reads what the prompt puts in quotes."""
    return HunyuanImagePipeline(
        vae=AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.75289,
        ).eval(),
        text_encoder=qwen2_5_vl(),
        tokenizer=word_tokenizer(),
        text_encoder_2=t5(12, vocabulary=400),
        tokenizer_2=byt5_tokenizer(),
        transformer=HunyuanImageTransformer2DModel(
            **LATENTS,
            num_layers=2,
            num_single_layers=1,
            num_refiner_layers=1,
            **HEADS,
            guidance_embeds=guidance_embeds,
            text_embed_dim=16,
            text_embed_2_dim=12,
            rope_axes_dim=(4, 4),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def hidream():
    """Two CLIPs, T5 and Llama; a mixture of experts. The pipeline makes images of this one size."""
    return HiDreamImagePipeline(
        vae=flux_vae(4),
        text_encoder=clip(CLIPTextModelWithProjection, 8, length=128),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 12, length=128),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(20),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama(8),
        tokenizer_4=word_tokenizer(),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            **LATENTS,
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            caption_channels=[20, 8],
            text_emb_dim=20,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(2, 2, 4),
            max_resolution=(128, 128),
            llama_layers=[0, 1],
        ).eval(),
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )


def kolors():
    """SDXL's UNet, whose attention reads a projection of ChatGLM's states."""
    return KolorsPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=chatglm(8),
        tokenizer=chatglm_tokenizer(),
        unet=unet(
            16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
            encoder_hid_dim=8,
            encoder_hid_dim_type="text_proj",
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.014),
    )


TODAY = (
    chroma,
    flux2,
    flux2_klein,
    qwen_image,
    z_image,
    lumina2,
    cogview4,
    pixart_alpha,
    pixart_sigma,
    sana,
    hunyuan_dit,
    auraflow,
    hunyuan_image,
    hidream,
    kolors,
)
BUILDERS = {build.__name__: build for build in (sd, sd_velocity, sdxl, sd3, sd3_plain, flux, flux_schnell, *TODAY)}


def build(name):
    """The pipeline called `name`, the same at every call."""
    torch.manual_seed(0)
    return BUILDERS[name]()
