"""Compiler flags with which tests compile their many small programs in half the time that the default flags take.

LLVM does not optimise the code and generates it in one piece, and the older of the CPU compiler's two code generators
is used where it still exists. Operations are rounded as with the default flags, but not always in the same order. A
test about the last bit of two programs therefore compiles them with `AS_FOR_USERS`.
"""

import importlib.metadata

FLAGS = ["--xla_backend_optimization_level=0"]
# Compiler options that undo the flags that change the order of operations.
AS_FOR_USERS: dict[str, bool] = {}
# Only the versions that know these flags get them: an unknown flag ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True}
