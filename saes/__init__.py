"""Text to residual-stream activations to sparse-autoencoder latents."""
