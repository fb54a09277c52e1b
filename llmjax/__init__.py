"""llmjax: train large language models in JAX. From Python: `llmjax.train(...)` and `llmjax.load(...)`, see `api.py`."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load` and `Run`, on demand, because jax takes seconds to import; `train` is a folder, see its `__init__.py`."""
    if name == "train":
        import importlib

        return importlib.import_module("llmjax.train")
    if name in ("load", "Run"):
        from llmjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'llmjax' has no attribute {name!r}")
