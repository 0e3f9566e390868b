"""How tests compile: tiny programs are compiled far more often than they run, so nothing is optimised.

Imports nothing of JAX: whoever sets XLA_FLAGS needs this before.
"""

import importlib.metadata

FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Modules of one program would be split among threads that these machines do not have.
    "--xla_cpu_parallel_codegen_split_count=1",
]
# The emitters by MLIR take twice as long to compile a train step; jaxlib 0.12 has no others.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for a process with this many CPU devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *FLAGS])
