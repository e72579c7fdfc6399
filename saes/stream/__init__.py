"""Shuffled, resumable residuals, from the live model or from shards."""
