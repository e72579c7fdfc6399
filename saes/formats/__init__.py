"""The file formats of SAEs, one a module; each reads what is on disk into sae-lens's terms."""
