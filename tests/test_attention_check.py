"""The check of cuDNN's attention: works, fails, computes something else. The GPU is pretended."""

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


def pretend_cudnn(monkeypatch, factor: float):
    """cuDNN as XLA's attention times `factor`."""
    original = attention.causal_attention

    def attend(q, k, v, *, implementation):
        out = original(q, k, v, implementation="xla")
        return out * factor if implementation == "cudnn" else out

    monkeypatch.setattr(attention, "causal_attention", attend)


def test_what_works_is_used(monkeypatch):
    pretend_cudnn(monkeypatch, 1.0)
    for wanted in ("auto", "cudnn"):
        given = make_config(wanted)
        assert attention_check.settle(given, "gpu", pytest.fail) is given


def test_auto_falls_back_loudly_and_a_named_cudnn_is_refused():
    said = []
    settled = attention_check.settle(make_config("auto"), "gpu", said.append)
    assert settled.model.attention == "xla"
    assert len(said) == 1 and said[0].startswith("WARNING: cuDNN's fused attention does not work")
    assert "cuDNN is not detected" in said[0]  # this machine's real fault
    with pytest.raises(errors.UsageError, match=r"model\.attention: cudnn does not work here"):
        attention_check.settle(make_config("cudnn"), "gpu", said.append)


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
    pretend_cudnn(monkeypatch, 1.05)
    said = []
    assert attention_check.settle(make_config("auto"), "gpu", said.append).model.attention == "xla"
    assert "differs from XLA's by 0.0" in said[0]


def test_nothing_is_checked_where_cudnn_is_not_meant():
    for given, platform in (
        (make_config("auto", "float32"), "gpu"),
        (make_config("auto"), "cpu"),
        (make_config("xla"), "gpu"),
    ):
        assert attention_check.settle(given, platform, pytest.fail) is given
