"""What examples/ says runs: scripts as they stand, notebooks cell by cell."""

import json
import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def test_the_notebook_reads_a_published_run(tmp_path, capsys, monkeypatch):
    """From the folder where Jupyter opens it; the ratio by hand is the recorded one."""
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads((EXAMPLES / "read_a_run.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # nothing of one machine is committed
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    names = runpy.run_path(str(script))
    recorded = names["summary"]["pr/key/post_rope/raw"]
    assert names["by_hand"] == pytest.approx(recorded, rel=2**-10)  # float16 has 11 bits
    assert f"recorded {recorded:.2f}" in capsys.readouterr().out
    assert names["spectra"]["key_post_rope_raw"].shape == (4, 2, 64)


@pytest.mark.long
def test_muon_trains_a_model_of_flax_nnx(capsys):
    names = runpy.run_path(str(EXAMPLES / "muon_in_flax_nnx.py"))
    printed = capsys.readouterr().out
    start, end = map(float, re.findall(r"\d\.\d+", printed)[:2])
    assert end < start / 4, printed
    kernels = {layer: getattr(names["net"], layer).kernel[...] for layer in ("up", "down")}
    assert {layer: names["rule"](k) for layer, k in kernels.items()} == {
        "up": "muon",
        "down": "adamw",
    }


@pytest.mark.long
def test_the_participation_ratio_of_torch_vectors(capsys):
    pytest.importorskip("torch")
    names = runpy.run_path(str(EXAMPLES / "participation_ratio_in_torch.py"))
    keys = names["keys"].double()
    assert keys.shape == (512, 2, 32)
    s = names["torch"].linalg.svdvals(keys[:, 1] - keys[:, 1].mean(0))
    assert f"head 1: raw {names['raw']:.1f}, centred {s.sum() ** 2 / (s**2).sum():.1f} of 32" in (
        capsys.readouterr().out
    )
