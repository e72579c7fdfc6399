"""Text to rows of tokens on disk."""
