"""The check of fused attention: works, fails, computes something else. Devices are pretended."""

import dataclasses

import pytest

from qkjax import attention, errors
from qkjax import config as config_lib
from qkjax.runs import attention_check


def make_config(wanted: str, dtype: str = "bfloat16") -> config_lib.Config:
    resolved = config_lib.resolve(config_lib.base("muon", "none", "tiny")).for_platform("gpu")
    model = dataclasses.replace(
        resolved.model, attention=wanted, dtype=dtype, sequence_length=16, head_dim=8
    )
    return dataclasses.replace(resolved, model=model)


def pretend_fused(monkeypatch, factor: float):
    """Fused kernels as XLA's attention times `factor`."""
    original = attention.causal_attention

    def attend(q, k, v, *, implementation):
        out = original(q, k, v, implementation="xla")
        return out if implementation == "xla" else out * factor

    monkeypatch.setattr(attention, "causal_attention", attend)


def test_what_works_is_used(monkeypatch):
    pretend_fused(monkeypatch, 1.0)
    for wanted, platform in (
        ("auto", "gpu"),
        ("cudnn", "gpu"),
        ("auto", "tpu"),
        ("splash", "tpu"),
    ):
        given = make_config(wanted)
        assert attention_check.settle(given, platform, pytest.fail) is given


def test_auto_falls_back_loudly_and_a_named_cudnn_is_refused():
    said = []
    settled = attention_check.settle(make_config("auto"), "gpu", said.append)
    assert settled.model.attention == "xla"
    assert len(said) == 1 and said[0].startswith("WARNING: cuDNN's fused attention does not work")
    assert "cuDNN is not detected" in said[0]  # this machine's real fault
    with pytest.raises(errors.UsageError, match=r"model\.attention: cudnn does not work here"):
        attention_check.settle(make_config("cudnn"), "gpu", said.append)


def test_splash_falls_back_and_is_refused_in_its_own_words():
    said = []
    settled = attention_check.settle(make_config("auto"), "tpu", said.append)
    assert settled.model.attention == "xla"
    assert said[0].startswith("WARNING: jax's splash attention does not work here (")
    with pytest.raises(errors.UsageError, match=r"model\.attention: splash does not work here \("):
        attention_check.settle(make_config("splash"), "tpu", said.append)
    full = dataclasses.replace(make_config("auto"), scale="full")
    with pytest.raises(errors.UsageError, match=r"splash attention .* times the bytes\. Install"):
        attention_check.settle(full, "tpu", said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("wanted", "platform", "devices"),
    [
        ("splash", "cpu", "TPUs"),
        ("splash", "gpu", "TPUs"),
        ("cudnn", "tpu", "NVIDIA GPUs"),
        ("cudnn", "cpu", "NVIDIA GPUs"),
    ],
)
def test_attention_of_other_devices_is_refused(monkeypatch, wanted, platform, devices):
    pretend_fused(monkeypatch, 1.0)
    with pytest.raises(errors.UsageError) as caught:
        attention_check.settle(make_config(wanted), platform, pytest.fail)
    assert str(caught.value) == (
        f"model.attention: {wanted} runs on {devices} only, found the platform {platform}. "
        "Use model.attention=auto."
    )


@pytest.mark.parametrize("scale", ["pilot", "full", "1b5"])
def test_a_long_run_is_not_made_slower_unasked(scale):
    given = dataclasses.replace(make_config("auto"), scale=scale)
    with pytest.raises(errors.UsageError, match=r"does not work here .* 2\.5 times slower"):
        attention_check.settle(given, "gpu", pytest.fail)
    said = []
    opened = attention_check.settle(given, "gpu", said.append, may_be_slow=True)
    assert opened.model.attention == "xla" and said[0].startswith("WARNING: ")
    asked = dataclasses.replace(make_config("xla"), scale=scale)
    assert attention_check.settle(asked, "gpu", pytest.fail) is asked


def test_other_numbers_are_a_fault(monkeypatch):
    pretend_fused(monkeypatch, 1.05)
    said = []
    assert attention_check.settle(make_config("auto"), "gpu", said.append).model.attention == "xla"
    assert "differs from XLA's by 0.0" in said[0]


def test_nothing_is_checked_where_no_fused_kernel_is_meant():
    for given, platform in (
        (make_config("auto", "float32"), "gpu"),
        (make_config("auto", "float32"), "tpu"),
        (make_config("auto"), "cpu"),
        (make_config("xla"), "gpu"),
    ):
        assert attention_check.settle(given, platform, pytest.fail) is given
