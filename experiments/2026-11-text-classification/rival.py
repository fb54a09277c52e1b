"""TF-IDF with logistic regression (scikit-learn) on the very split of a config of ours: `pip install scikit-learn`.

    python experiments/2026-11-text-classification/rival.py configs/spam.py sms_spam_train.tsv

Prints the held-out accuracy for words and pairs of words, and for characters, each with the better of two strengths of
the regularization, chosen on a fifth of what is trained on.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from llmjax.build.corpus import make_corpus
from llmjax.build.labels import with_labels
from llmjax.config.file import load_config_file
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer

FEATURES = {
    "words": {"ngram_range": (1, 2)},
    "characters": {"analyzer": "char", "ngram_range": (1, 4)},
}
STRENGTHS = (1, 10)


def split(config_file: str, sources: str) -> tuple[list, list, list, list]:
    """(texts, labels) that are trained on, and (texts, labels) that are held out."""
    raw = load_config_file(config_file)
    raw["data"]["sources"] = sources
    # Bytes give back the texts as they are. No text is cut.
    raw["tokenizer"].update(kind="byte", vocab_size=4096)
    raw["data"]["seq_len"] = 2**14
    raw["train"]["tokens_per_update"] = 2**14
    config, derived = with_labels(*resolve_config(read_config(raw), 1))
    corpus = make_corpus(config, derived)
    assert isinstance(corpus.tokenizer, ByteTokenizer)
    held_out, parts = set(corpus.held_out_ids.tolist()), ([], [], [], [])
    for doc in range(len(corpus.store)):
        at = 2 * (doc in held_out)
        parts[at].append(corpus.tokenizer.decode(corpus.store.tokens(doc)[1:-1].tolist()))
        parts[at + 1].append(int(corpus.store.labels[doc]))
    return parts


def accuracy(features: dict, strength: float, texts: list, labels: list, others: list, right: list) -> float:
    """The accuracy on `others` of a model that is trained on `texts`."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, **features)
    model = LogisticRegression(C=strength, max_iter=1000).fit(vectorizer.fit_transform(texts), labels)
    return float(model.score(vectorizer.transform(others), right))


def main(config_file: str, sources: str) -> None:
    texts, labels, held_out, right = split(config_file, sources)
    # Copies of a text lie on the same side here, too: the hash of the text decides.
    is_tried = [hash(text) % 5 == 0 for text in texts]
    chosen_from = [[x for x, tried in zip(values, is_tried) if not tried] for values in (texts, labels)]
    tried = [[x for x, tried in zip(values, is_tried) if tried] for values in (texts, labels)]
    for name, features in FEATURES.items():
        best = max(STRENGTHS, key=lambda C: accuracy(features, C, *chosen_from, *tried))
        print(
            name, f"C={best}", f"{accuracy(features, best, texts, labels, held_out, right):.4f}", flush=True
        )
    print(f"{len(texts)} trained on, {len(held_out)} held out")


if __name__ == "__main__":
    main(*sys.argv[1:])
