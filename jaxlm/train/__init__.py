"""`python -m jaxlm.train`: the one training loop."""
