"""Configs: every key, recipes and the command line, what a config must satisfy, and meshes that fit. No jax.

A recipe imports `base` and `variant` from here.
"""

from jaxlm.config.keys import base
from jaxlm.config.recipe import variant

__all__ = ["base", "variant"]
