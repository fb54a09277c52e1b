"""The one error that users see; apart from `types` so that worker processes need not load jax for it."""


class UserError(ValueError):
    """A mistake in what the user asked for: one sentence with the key, its value, the rule it breaks and what to do."""
