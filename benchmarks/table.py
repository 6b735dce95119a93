"""A measurement as text."""

from benchmarks import interleave, subjects
from qkjax import flops


def format_table(measured: interleave.Measurement) -> str:
    """What was measured, one row a variant, and what the noise allows to say."""
    request = measured.request
    subject = subjects.subject(request.subject)
    clock = "CPU time, one core" if request.platform == "cpu" else "wall time"
    shape = ", ".join(f"{k} {v}" for k, v in subjects.describe(request.config).items())
    agreed = ", ".join(f"{name} {value:.6g}" for name, value in measured.agreed.items())
    header = [
        "variant",
        f"s/{subject.unit}",
        f"/ {measured.reference}",
        "verdict",
        "peak GB",
        "first s",
    ]
    header += list(rates(measured, 1.0))
    rows = [header]
    for name, outcome in measured.outcomes.items():
        rows.append(
            [
                name,
                f"{outcome.seconds:.4g}",
                f"{outcome.ratio:.3f}",
                verdict(outcome.ratio, measured.noise),
                f"{outcome.peak_bytes / 1e9:.2f}",
                f"{outcome.first_seconds:.1f}",
                *rates(measured, outcome.seconds).values(),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if measured.net_ratio is not None:
        assert subject.net is not None
        whole, start = subject.net
        lines.append(f"{whole} less {start}: {measured.net_ratio:.3f} of {measured.reference}")
    return "\n".join(
        [
            f"{request.subject}: {clock}; {request.rounds} rounds of 2 blocks of "
            f"{measured.repetitions}; medians",
            shape,
            f"all agree on {agreed}",
            *lines,
            f"noise floor {measured.noise:.3f}: ratios nearer to 1 are equal",
        ]
    )


def rates(measured: interleave.Measurement, seconds: float) -> dict[str, str]:
    """Tokens/s of steps that take so long, and MFU where the device's peak is known."""
    config = measured.request.config
    if subjects.subject(measured.request.subject).unit != "step":
        return {}
    tokens = config.train.tokens_per_step / seconds
    found = {"tokens/s": f"{tokens:,.0f}"}
    peak = measured.device and flops.peak_flops(measured.device)
    if peak:
        for name, causal in (("MFU (PaLM)", False), ("MFU (causal)", True)):
            work = flops.training_flops_per_token(config.model, measured.parameters, causal=causal)
            found[name] = f"{tokens * work / peak:.1%}"
    return found


def verdict(ratio: float, noise: float) -> str:
    if abs(ratio - 1) <= noise:
        return "equal"
    return "faster" if ratio < 1 else "slower"
