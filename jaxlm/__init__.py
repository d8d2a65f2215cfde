"""jaxlm: language models in JAX, from raw text to a trained model that writes. `lm = jaxlm.load(WORKDIR)`."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`jaxlm.load`, imported on use: the command line stays fast."""
    if name != "load":
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    from jaxlm.generate.lm import load

    return load
