"""The training of a model. `llmjax.train(...)` is `llmjax.api.train`, although a folder has the same name."""

import sys
import types


class _Train(types.ModuleType):
    def __call__(self, *arguments, **named):
        from llmjax import api

        return api.train(*arguments, **named)


sys.modules[__name__].__class__ = _Train
