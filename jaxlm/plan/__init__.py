"""`python -m jaxlm.plan`: the real step, compiled for a pod that is not here."""
