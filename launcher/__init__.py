"""Starts sdtrain's public commands on one node, many nodes, or a SLURM cluster. Imports no torch."""
