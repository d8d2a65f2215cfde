"""`python -m jaxlm.fitting`: which of several runs underfits, and which overfit."""
