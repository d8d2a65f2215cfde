"""`python -m jaxlm.fitting`: which of several runs underfit, and which overfit."""
