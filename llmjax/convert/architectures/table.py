"""The families of models of `transformers` that can be read and written, by the names of their classes.

Two tables for a class have a further word in their names (`Architecture.title`)."""

from llmjax.convert.architectures.bert import BERT, BERT_MODEL
from llmjax.convert.architectures.contract import Architecture
from llmjax.convert.architectures.gemma import GEMMA2, GEMMA3
from llmjax.convert.architectures.gpt2 import GPT2
from llmjax.convert.architectures.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from llmjax.convert.architectures.marian import MARIAN
from llmjax.convert.architectures.mixtures import MIXTRAL, OLMOE, QWEN3_MOE
from llmjax.convert.architectures.olmo2 import OLMO2
from llmjax.convert.architectures.t5 import T5, T5_GATED

# In this order they are tried for a model that is to be written.
TABLES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GPT2,
    GEMMA2,
    GEMMA3,
    OLMO2,
    MIXTRAL,
    OLMOE,
    QWEN3_MOE,
    BERT,
    BERT_MODEL,
    T5,
    T5_GATED,
    MARIAN,
)
ARCHITECTURES: dict[str, Architecture] = {architecture.title: architecture for architecture in TABLES}
