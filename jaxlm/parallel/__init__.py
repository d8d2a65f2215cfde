"""Where arrays live. Knows no model."""
