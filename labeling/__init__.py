"""Features to names, a catalog to browse and a report."""
