"""`python -m llmjax`: the same as `python -m llmjax.main`."""

from llmjax.main import console

if __name__ == "__main__":
    console()
