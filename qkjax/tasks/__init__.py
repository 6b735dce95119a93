"""HellaSwag and LAMBADA: benchmarks, scores, and the models that lm-eval asks."""
