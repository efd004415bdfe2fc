"""Submitting work: one executor interface for this machine and for SLURM, through submitit; leases on work folders."""
