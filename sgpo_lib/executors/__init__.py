"""Where the jobs of a batch run: one interface, on this machine, on Slurm, on Ray."""
