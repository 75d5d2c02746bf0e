"""The scripts of barrier_diffusers; in an installed package they are barrier_diffusers.scripts."""
