"""A causal language model: its text, its residual stream, and edits of it."""
