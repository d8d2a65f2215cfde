"""jaxlm: language models in JAX, from raw text to a trained model that writes. `lm = jaxlm.load(WORKDIR)`."""

__version__ = "0.1.0"


def load(path, **options):
    """See jaxlm.lm.load. Imported on use: the command line stays fast."""
    from jaxlm.lm import load

    return load(path, **options)
