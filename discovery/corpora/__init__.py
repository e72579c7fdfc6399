"""Labelled texts: typed rows, where they come from, how they are split and checked."""
