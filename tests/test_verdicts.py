"""Verdicts on synthetic studies whose truth is known."""

import pathlib

import synthetic_study
from synthetic_study import PR

from qkjax.study import results, verdicts


def test_h1_of_a_clear_effect(tmp_path: pathlib.Path):
    arms = synthetic_study.arms(adamw_qk={PR: 16.0}, muon_qk={PR: 30.0})
    synthetic_study.write(tmp_path, arms, noise={metric: 0.3 for metric in arms["adamw_qk"]})
    judged = verdicts.judge(results.load_study(tmp_path))
    assert judged.verdict("H1").status == "supported"
