"""Thin adapter: BARRIER on class-conditional DDPMs. The method itself is in barrier_diffusers."""
