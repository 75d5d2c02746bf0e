"""A tiny random CLIP, saved as a folder."""

import torch
from short_runs import BASE
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer


def save_clip(path):
    """CLIP's architecture in small, with the embedded pipeline's tokenizer and 8 text positions."""
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **width,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**width, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.save_pretrained(path)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(path)
