"""How tests have their many small programs compiled: in half the time that a user's takes.

Code is generated without LLVM's optimisations, in one piece, and by the older of the CPU compiler's two ways where it
still has it.
Both round like the other way, but not always in the same order: where a test's claim is about the last bit of two
programs, it compiles them with `AS_FOR_USERS`.
"""

import importlib.metadata

FLAGS = ["--xla_backend_optimization_level=0"]
AS_FOR_USERS: dict[str, bool] = {}  # compiler options
if importlib.metadata.version("jaxlib").startswith("0.10."):  # an unknown flag ends the process
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True}
