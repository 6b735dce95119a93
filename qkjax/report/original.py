"""What the original PyTorch study published, and where this project differs from it: only data."""

# Post-RoPE raw PR of keys, mean over 22 layers, by tokens: 88M relu2, recipe original at
# 4,096 tokens a step, one seed; read off its plot, +-0.3.
PUBLISHED_PR: dict[int, dict[str, float]] = {
    0: {"adamw_qk": 60.8, "adamw_noqk": 60.8, "muon_qk": 60.8, "muon_noqk": 60.8},
    1_000_000: {"adamw_qk": 35.1, "adamw_noqk": 35.7, "muon_qk": 46.0, "muon_noqk": 46.1},
    4_000_000: {"adamw_qk": 34.7, "adamw_noqk": 38.0, "muon_qk": 42.1, "muon_noqk": 50.1},
    8_000_000: {"adamw_qk": 25.9, "adamw_noqk": 39.6, "muon_qk": 39.2, "muon_noqk": 50.6},
    25_000_000: {"adamw_qk": 16.2, "adamw_noqk": 32.8, "muon_qk": 30.0, "muon_noqk": 51.2},
}
HEAD_DIM, TOKENS_PER_STEP = 64, 4_096
OTHER_RESULTS = (
    "Its 20M Muon study (learning rate 0.012, 8,192 tokens a step), at 16.4M tokens: validation "
    "loss 4.233 and PR 43.5 with QK-Norm, 4.253 and 46.8 without.",
    "Its 1.5B sequel (49M tokens, PR before RoPE): 65.7 with learned gamma, 59.6 with frozen "
    "gamma, 63.3 without QK-Norm; validation loss 3.440, 3.439, 3.505. There QK-Norm had the "
    "higher PR.",
    "Its pilot repeated with the same seed differs by 1 to 3 PR at 1M tokens: as much as the "
    "smallest effect of interest here.",
)
# Subject, the original's form, ours. docs/deviations.md shows the same table.
DEVIATIONS: tuple[tuple[str, str, str], ...] = (
    (
        "RoPE",
        "interleaved pairs",
        "rotate-half, as in Llama and Qwen3: equal in distribution, since initial weights are "
        "random",
    ),
    (
        "positions",
        "predicts 2,047 of 2,048 positions",
        "records of T+1 tokens, all T positions, in both recipes",
    ),
    (
        "documents",
        "concatenated",
        "`fixed`: an end-of-text token after each; `original`: concatenated",
    ),
    (
        "validation set",
        "drawn from the training rows",
        "whole documents, held out by hash, checked by `qkjax check`",
    ),
    (
        "activations under bfloat16",
        "autocast: residual stream in float32",
        "residual stream in bfloat16; norms, softmax, loss and spectra float32",
    ),
    ("MLP", "ReLU^2 (its text says SwiGLU)", "`fixed`: SwiGLU of 1344; `original`: ReLU^2 of 2048"),
    (
        "batch, schedule, clipping",
        "4,096 tokens (certain for its AdamW arms only), constant, none",
        "`fixed`: 65,536 tokens, 2% warm-up, 20% decay, 1.0; `original`: as the original; at "
        "`small` 512 tokens in both",
    ),
    (
        "AdamW",
        "betas .9 .999, decay 0.2 on everything",
        "`fixed`: .9 .95, 0.1 on block matrices only; `original`: as the original",
    ),
    (
        "Muon",
        "Q, K, V, O as one matrix, no decay",
        "`fixed`: four matrices, decay 0.01; `original`: as the original",
    ),
    (
        "learning rates",
        "AdamW 6e-3 (25M pilot), 6e-4 (300M plan); Muon 0.024, 0.02 (in its 20M study 0.012), "
        "auxiliary 6e-3, never swept",
        "`fixed`: swept around 1.2e-3; Muon around 0.012, auxiliary 3e-3 with it; `original`: "
        "as the original",
    ),
    (
        "Newton-Schulz",
        "bfloat16",
        "`fixed`: bfloat16 on accelerators, float32 on CPU; `original`: as the original",
    ),
    ("RMSNorm eps", "1.19e-7", "`fixed`: 1e-6; `original`: as the original"),
    (
        "decay of gamma_q and gamma_k",
        "0.2, as for everything",
        "`fixed`: 0; `original`: 0.2; the controls `decayed` and `undecayed` set it",
    ),
    (
        "precision",
        "float32 weights, bfloat16 autocast",
        "bfloat16 on accelerators; on CPUs float32, in both recipes",
    ),
    (
        "text",
        "FineWeb-Edu and Cosmopedia",
        "the same by `--preset`; embedded docstrings at `tiny` and `small`; else what `--source` "
        "names",
    ),
    ("seeds", "one", "several, in pairs: arms of a seed share data order and initial values"),
)
