"""The benchmark against diffusers: the same results, then times of both."""

import pytest

from ldm_jax.measure import models, sampler
from tests.tiny_benchmark import SMALLEST

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


def test_both_give_the_same_and_are_timed_in_turn(monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "smallest", lambda: SMALLEST)
    given = ["--model=smallest", "--steps=2", "--repeats=3", "--against=diffusers"]
    for name in sampler.FLAGS:
        sampler.FLAGS[name].unparse()
    sampler.FLAGS(["benchmark", *given])
    subject = models.subject("smallest", "float32")
    result = sampler.run(subject, [2])
    ours, theirs = result["rows"]
    assert (ours["by"], theirs["by"]) == ("ldm_jax", "diffusers")
    errors = [
        float(line.split()[-1])
        for line in capsys.readouterr().err.splitlines()
        if "relative error" in line
    ]
    assert len(errors) == 3  # text, loop, decode
    assert max(errors) < 1e-5
    assert all(theirs["ratio"][part] > 0 for part in sampler.PARTS)
    assert "of ours, by pairs" in sampler.table(result)
    monkeypatch.setitem(sampler.AGREE, "float32", 0.0)
    with pytest.raises(ValueError, match="gives something else than ours"):
        sampler.run(subject, [2])
