"""`python -m jaxlm.lora`: adapters folded into their weights."""
