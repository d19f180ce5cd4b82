"""The benchmark against diffusers: the same results, then times of both."""

import pytest

from ldm_jax.measure import comparison, models, sampler, train
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
    monkeypatch.setitem(comparison.AGREE, "float32", 0.0)
    with pytest.raises(ValueError, match="gives something else than ours"):
        sampler.run(subject, [2])


def test_training_gives_the_same_loss_gradient_and_loss_after_a_step(monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "smallest", lambda: SMALLEST)
    for name in train.FLAGS:
        train.FLAGS[name].unparse()
    train.FLAGS(["benchmark", "--model=smallest", "--repeats=2", "--against=diffusers"])
    result = train.run(models.subject("smallest", "float32"), [2])
    errors = [
        float(line.split()[-1])
        for line in capsys.readouterr().err.splitlines()
        if "relative error" in line
    ]
    assert len(errors) == 6  # loss, gradient, loss after a step, with both kinds of AdamW
    assert max(errors) < 1e-3
    assert [row["by"] for row in result["rows"]] == [
        "ldm_jax",
        "diffusers",
        "diffusers, fused AdamW",
    ]
    for row in result["rows"][1:]:
        assert all(row["ratio"][part] > 0 for part in train.PARTS)
    assert "of ours, by pairs" in train.table(result)
