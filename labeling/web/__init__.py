"""Pages to browse a catalog with; served on this machine, nothing is fetched from elsewhere."""
