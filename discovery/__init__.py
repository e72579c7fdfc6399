"""Latents against concepts: alignment, contrastive vectors, comparison and causal tests."""
