"""`python -m jaxlm.evaluate`: figures of merit of a trained model."""
