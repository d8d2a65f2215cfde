"""`python -m jaxlm.tune`: a search over a space of configs."""
