"""The Chinese reviews with lines split at random, so that copies of held-out reviews are trained on: what not to do."""

from ml_collections import ConfigDict

from configs import sentiment_zh


def get_config() -> ConfigDict:
    c = sentiment_zh.get_config()
    # Lines of a label, a tab and a review, shuffled; the first fifth in one file and the others in another.
    c.classification.update(label_from="field")
    c.data.update(
        sources=("train.tsv",), held_out_sources=("test.tsv",), split_on="", columns=("label", "text")
    )
    return c
