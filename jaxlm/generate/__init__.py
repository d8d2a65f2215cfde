"""`python -m jaxlm.generate`, and `jaxlm.load`: a trained model that writes and answers."""
