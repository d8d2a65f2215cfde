"""`python -m jaxlm.bench`: how fast a config trains, and where the time goes."""
