"""Readers, captions, concepts, and everything frozen computed once: latents and text embeddings."""
