"""Train a small Stable Diffusion from scratch (VAE, text encoder, UNet) and save a genuine StableDiffusionPipeline.

Stages: VAE on pixels -> its posteriors cached -> text encoder and UNet trained together on noise prediction, with an
exponential moving average -> pipeline folder. A stage whose result is already in output_dir is not run again.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from barrier_diffusers.data import (
    cached_tensors,
    encode_moments,
    fingerprint,
    image_batches,
    load_image_text,
    tokenize,
)
from barrier_diffusers.noising import sample_latents
from barrier_diffusers.training import run_script


@dataclass
class VaeConfig:
    """The autoencoder: 32 x 32 pixels <-> 4 x 8 x 8 latents with three levels."""

    block_out_channels: list[int] = field(default_factory=lambda: [24, 48, 64])  # halves the side at each step but one
    latent_channels: int = 4
    max_train_steps: int = 1600
    train_batch_size: int = 64
    learning_rate: float = 2e-3  # peak of the one-cycle schedule
    kl_weight: float = 1e-5  # per latent element; keeps the latents near a unit Gaussian without blurring


@dataclass
class TextConfig:
    """The CLIP text encoder, and the words its tokenizer keeps whole."""

    hidden_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_length: int = 24  # tokens; every prompt is padded to this
    extra_words: list[str] = field(
        default_factory=lambda: [
            "shoe",
            "clothes",
            "garment",
            "clothing",
            "top",
            "picture",
            "drawing",
            "image",
            "an",
            "the",
        ]
    )  # kept as one token besides the captions' words; all other text falls back to byte pieces
    vocabulary_package: str = "open_clip"  # installed package that carries CLIP's byte-pair merges


@dataclass
class UnetConfig:
    """The noise predictor and its training."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])
    layers_per_block: int = 1
    attention_head_dim: int = 4  # number of heads: diffusers' historical name
    norm_num_groups: int = 16
    max_train_steps: int = 5000
    train_batch_size: int = 128
    learning_rate: float = 1.5e-3  # peak of the one-cycle schedule
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    caption_dropout: float = 0.1  # share of captions replaced by "" for classifier-free guidance


@dataclass
class TrainConfig:
    """Everything the recipe depends on."""

    train_data_dir: str = "runs/fashion_mnist"  # folder or hub name with an image and a caption column
    output_dir: str = "assets/fashion_sd"  # becomes the pipeline folder
    work_dir: str = "runs/fashion_sd_work"  # trained VAE, cached latents, logs
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int = 32
    seed: int = 0
    report_to: str = "tensorboard"
    save_dtype: str = "float16"  # of the written weights
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Warm up over 10 % of the steps, then anneal to zero."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)


def endless(loader: DataLoader):
    """Batches for ever, reshuffled every epoch."""
    while True:
        yield from loader


def train_vae(accelerator: Accelerator, config: TrainConfig, dataset: Dataset) -> AutoencoderKL:
    """Fit the autoencoder on mean absolute + squared error; scaling_factor is set to 1 / std of the latents."""
    settings = config.vae
    levels = len(settings.block_out_channels)
    vae = AutoencoderKL(
        sample_size=config.resolution,
        latent_channels=settings.latent_channels,
        block_out_channels=tuple(settings.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
    )
    rows = image_batches(dataset, config.image_column, config.resolution)
    loader = DataLoader(rows, batch_size=settings.train_batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    schedule = one_cycle(optimizer, settings.learning_rate, settings.max_train_steps)
    model, optimizer, loader = accelerator.prepare(vae.to(memory_format=torch.channels_last), optimizer, loader)
    progress = tqdm(range(settings.max_train_steps), desc="VAE", disable=not accelerator.is_local_main_process)
    for step, batch in zip(progress, endless(loader), strict=False):
        pixels = batch["pixels"]
        posterior = accelerator.unwrap_model(model).encode(pixels).latent_dist
        reconstruction = accelerator.unwrap_model(model).decode(posterior.sample()).sample
        squared = F.mse_loss(reconstruction, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = squared + 0.2 * F.l1_loss(reconstruction, pixels) + settings.kl_weight * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            accelerator.log({"vae/mse": squared.item(), "vae/kl": kl.item()}, step=step)
            progress.set_postfix(mse=f"{squared.item():.4f}", kl=f"{kl.item():.1f}")
    return accelerator.unwrap_model(model).eval()


def cut_clip_vocabulary(config: TextConfig, captions: list[str], folder: Path) -> CLIPTokenizer:
    """CLIP's own tokenizer with only the merges that the captions' words use; every other text becomes byte pieces.

    Byte-pair encoding applies the lowest-ranked merge first, so a word whose merges are all kept splits exactly as
    with the full vocabulary.
    """
    spec = importlib.util.find_spec(config.vocabulary_package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: CLIP's vocabulary is missing: pip install --no-deps open-clip-torch")
    vocabulary = Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    ranked = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    rank = {pair: index for index, pair in enumerate(ranked)}
    words = {word for text in captions for word in text.replace("-", " - ").split()} | set(config.extra_words)
    used: set[tuple[str, ...]] = set()
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = [
                (rank.get(pair, len(rank)), index) for index, pair in enumerate(zip(pieces, pieces[1:], strict=False))
            ]
            best, index = min(pairs)
            if best == len(rank):
                break
            used.add(ranked[best])
            pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
    merges = sorted(used, key=rank.__getitem__)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=config.max_length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text transformer with random weights for this tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(config: TrainConfig) -> UNet2DConditionModel:
    """A UNet with self- and cross-attention at every level, as Stable Diffusion's."""
    levels = len(config.unet.block_out_channels)
    return UNet2DConditionModel(
        sample_size=config.resolution // 2 ** (len(config.vae.block_out_channels) - 1),
        in_channels=config.vae.latent_channels,
        out_channels=config.vae.latent_channels,
        block_out_channels=tuple(config.unet.block_out_channels),
        layers_per_block=config.unet.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=config.text.hidden_size,
        attention_head_dim=config.unet.attention_head_dim,
        norm_num_groups=config.unet.norm_num_groups,
    )


def train_text_to_image(
    accelerator: Accelerator,
    config: TrainConfig,
    moments: Tensor,
    captions: list[str],
    tokenizer,
    scheduler,
    scale: float,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Noise prediction on cached latents; returns the averaged (EMA) text encoder and UNet."""
    settings = config.unet
    distinct = ["", *sorted(set(captions))]
    position = {text: index for index, text in enumerate(distinct)}
    token_ids = tokenize(tokenizer, distinct).to(accelerator.device)
    rows = TensorDataset(moments, torch.tensor([position[text] for text in captions]))
    loader = DataLoader(rows, batch_size=settings.train_batch_size, shuffle=True, drop_last=True)
    text_encoder = build_text_encoder(config.text, tokenizer).train()
    unet = build_unet(config).to(memory_format=torch.channels_last).train()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = one_cycle(optimizer, settings.learning_rate, settings.max_train_steps)
    averages = [
        EMAModel(m.parameters(), decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
        for m in (unet, text_encoder)
    ]
    unet, text_encoder, optimizer, loader = accelerator.prepare(unet, text_encoder, optimizer, loader)
    for average in averages:
        average.to(accelerator.device)
    progress = tqdm(range(settings.max_train_steps), desc="UNet", disable=not accelerator.is_local_main_process)
    running = 0.0
    for step, (batch_moments, caption_ids) in zip(progress, endless(loader), strict=False):
        latents = sample_latents(batch_moments, scale)
        drop = torch.rand(len(caption_ids), device=latents.device) < settings.caption_dropout
        used, inverse = caption_ids.masked_fill(drop, 0).unique(return_inverse=True)
        embeddings = text_encoder(token_ids[used]).last_hidden_state[inverse]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
        loss = F.mse_loss(prediction, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for average, model in zip(averages, (unet, text_encoder), strict=True):
            average.step(model.parameters())
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0:
            accelerator.log({"unet/loss": running, "unet/lr": schedule.get_last_lr()[0]}, step=step)
            progress.set_postfix(loss=f"{running:.4f}")
    models = [accelerator.unwrap_model(model).eval() for model in (text_encoder, unet)]
    for average, model in zip(reversed(averages), models, strict=True):
        average.copy_to(model.parameters())
    return models[0], models[1]


def main(config: TrainConfig) -> None:
    """VAE -> latents -> text encoder and UNet -> pipeline folder."""
    accelerator = Accelerator(log_with=config.report_to, project_dir=config.work_dir)
    dataset = load_image_text(config.train_data_dir, config.split, config.image_column, config.caption_column)
    output, work = Path(config.output_dir), Path(config.work_dir)
    accelerator.init_trackers("logs")
    set_seed(config.seed)
    if not (work / "vae" / "config.json").is_file():
        vae = train_vae(accelerator, config, dataset)
        if accelerator.is_main_process:
            vae.save_pretrained(work / "vae")
        accelerator.wait_for_everyone()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(accelerator.device).eval().requires_grad_(False)
    name = f"moments-{fingerprint(dataset._fingerprint, asdict(config.vae), config.seed)}.safetensors"
    moments = cached_tensors(
        work / name, lambda: {"moments": encode_moments(vae, dataset, config.image_column, config.resolution)}
    )["moments"]
    scale = 1 / sample_latents(moments[: 2**14], 1.0, torch.Generator().manual_seed(config.seed)).std().item()
    vae.register_to_config(scaling_factor=scale)
    captions = list(dataset[config.caption_column])
    tokenizer = cut_clip_vocabulary(config.text, sorted(set(captions)), work / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    set_seed(config.seed + 1)
    text_encoder, unet = train_text_to_image(accelerator, config, moments, captions, tokenizer, scheduler, scale)
    if accelerator.is_main_process:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(getattr(torch, config.save_dtype)).save_pretrained(output)
        (output / "training_config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        print(f"pipeline saved in {output}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, TrainConfig)
