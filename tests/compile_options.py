"""XLA options for programs that are compiled often and run once."""

import importlib.metadata

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the option
    QUICK["xla_cpu_use_fusion_emitters"] = False
