"""`python -m jaxlm.verify`: a config computes the same on every mesh."""
