"""A class-conditional diffusion pipeline in pixel space: a UNet2DModel, a scheduler and the names of its labels.

    pipeline = ClassConditionalDDPMPipeline.from_pretrained("assets/fashion_ddpm")
    pipeline(["sneaker", "bag"], generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)]).images

Load a folder with this class's own `from_pretrained`. diffusers does not know the class, so `DiffusionPipeline` cannot
load the folder by itself; it would need the code passed as `custom_pipeline`, and no code is stored in the folder.

Shapes: B images, C channels, S image side, P patch side.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt")


class ClassConditionalDDPMPipeline(DiffusionPipeline):
    """Samples images of given labels, with classifier-free guidance towards them.

    The UNet has one class embedding more than there are labels: the last one stands for "no label". With patch_size P
    the UNet sees each P x P patch of pixels as channels, (P^2 C, S / P, S / P): a fixed orthonormal re-ordering under
    which white noise stays white noise, P^2 times cheaper at the finest level.

    Args:
        unet: with `num_class_embeds` = number of labels + 1.
        scheduler: any scheduler of diffusers with epsilon or velocity prediction, e.g. DDPM or DDIM.
        labels: names in the order of the class embedding; default "0", "1", ...
        patch_size: P.

    Raises:
        ValueError: a UNet without class embedding, or labels that do not fit it.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: Any, labels: list[str] | None = None, patch_size: int = 1):
        super().__init__()
        num_classes = unet.config.num_class_embeds
        if num_classes is None or unet.class_embedding is None:
            raise ValueError("the UNet has no class embedding: build it with num_class_embeds = labels + 1")
        names = [str(index) for index in range(num_classes - 1)] if labels is None else list(labels)
        if len(names) != num_classes - 1:
            raise ValueError(
                f"{len(names)} labels for {num_classes} class embeddings; there must be one embedding more (no label)"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"a label is named twice: {', '.join(names)}")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(labels=names, patch_size=patch_size)

    @property
    def labels(self) -> list[str]:
        """The labels' names, in the order of the class embedding."""
        return list(self.config.labels)

    @property
    def null_label(self) -> int:
        """The class embedding that stands for no label."""
        return len(self.config.labels)

    @property
    def resolution(self) -> int:
        """S, in pixels."""
        return self.unet.config.sample_size * self.config.patch_size

    @property
    def num_channels(self) -> int:
        """C of the images."""
        return self.unet.config.in_channels // self.config.patch_size**2

    def to_patches(self, pixels: Tensor) -> Tensor:
        """(B, C, S, S) -> what the UNet sees, (B, P^2 C, S / P, S / P)."""
        return F.pixel_unshuffle(pixels, self.config.patch_size)

    def to_pixels(self, patches: Tensor) -> Tensor:
        """The inverse of `to_patches`."""
        return F.pixel_shuffle(patches, self.config.patch_size)

    def label_ids(self, labels: Sequence[str | int]) -> Tensor:
        """Rows of the class embedding (B,) for names or numbers of labels.

        Raises:
            ValueError: a label that there is not.
        """
        known = {name: index for index, name in enumerate(self.labels)}
        ids = [known.get(label, -1) if isinstance(label, str) else int(label) for label in labels]
        for label, index in zip(labels, ids, strict=True):
            if not 0 <= index < len(known):
                raise ValueError(f"no label {label!r}; the pipeline has {', '.join(known)}")
        return torch.tensor(ids, dtype=torch.long)

    @torch.no_grad()
    def __call__(
        self,
        labels: str | int | Sequence[str | int],
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image per label.

        Args:
            guidance_scale: 1 is no guidance, larger is closer to what tells the label from the others.
            generator: one for all, or a list with one per image, which makes each image independent of its batch.
            output_type: "pil", "np" (B, S, S, C) in [0, 1], or "pt" (B, C, S, S) in [0, 1].

        Raises:
            ValueError: an unknown label or output type, or a list of generators of another length.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}")
        chosen = [labels] if isinstance(labels, str | int) else list(labels)
        if isinstance(generator, list) and len(generator) != len(chosen):
            raise ValueError(f"{len(generator)} generators for {len(chosen)} labels: pass one each")
        device, dtype = self._execution_device, self.unet.dtype
        ids_B = self.label_ids(chosen).to(device)
        guided = guidance_scale != 1
        if guided:
            ids_B = torch.cat([torch.full_like(ids_B, self.null_label), ids_B])
        shape = (len(chosen), self.unet.config.in_channels, *(self.unet.config.sample_size,) * 2)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        # DDIM with clip_sample: the noise must follow the clipped x_0, or else guided images come out spoiled
        wanted = {"generator": generator, "use_clipped_model_output": True}
        known = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in wanted.items() if name in known}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, timestep).to(dtype)
            inputs = torch.cat([scaled, scaled]) if guided else scaled
            prediction = self.unet(inputs, timestep, class_labels=ids_B).sample.float()
            if guided:
                empty, labelled = prediction.chunk(2)
                prediction = empty + guidance_scale * (labelled - empty)
            x = self.scheduler.step(prediction, timestep, x, **extra).prev_sample
        pixels = (self.to_pixels(x) / 2 + 0.5).clamp(0, 1)
        images: Any = pixels
        if output_type != "pt":
            images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
