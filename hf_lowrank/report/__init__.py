"""Reports: data, JSON and tables."""
