"""The front door of the house: the HTTP interface, the command `gateway`, and `up`, which starts everything else."""
