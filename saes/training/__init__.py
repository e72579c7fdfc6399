"""Train SAEs: what is trained, the loop, its checkpoints, and the run of `emotion-atlas train`."""
