"""Build a fleet with one command: each target in a clone of its own, here or on a Slurm cluster."""
