"""What drives several stages: workflows, sweeps, tracking, and the settings of a whole script."""
