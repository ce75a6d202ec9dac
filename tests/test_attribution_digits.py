"""The attribution example on digits, with fewer retrained models: it asserts what it shows, and here is what it must
show.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "attribution.py"


def test_attribution_agrees_with_retraining(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("PERSAMPLE_ATTRIBUTION_MODELS", "60")
    shown = runpy.run_path(str(EXAMPLE))
    lds, auc = shown["lds"], shown["auc"]
    assert lds["empirical Fisher, 0.001"] >= max(0.45, lds["grad-dot"] + 0.15)
    assert abs(lds["random"]) <= 0.05 < lds["grad-cos"] < lds["TRAK, 512 projected"]
    assert min(auc.values()) >= 0.97
    assert shown["together"] >= 0.98
    assert "linear datamodelling score" in capsys.readouterr().out
