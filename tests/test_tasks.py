"""Tasks of our own models: identities that hold for any parameters, what is kept, what compiles anew, wrong input."""

import contextlib
import dataclasses
import functools
import re

import numpy as np
import pytest
from PIL import Image

from ldm_jax import build, media, tasks
from ldm_jax.latent_diffusion import torus
from tests import tiny
from tests.test_pipeline_sampling import model
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

RED, BLUE = "a red square", "a blue square"


@functools.cache
def sampling(**override):
    return build.sampling(tiny.shared_model("text"), model(), **override)


def pictures(n=2):
    return list(np.random.default_rng(0).uniform(-1, 1, (n, 16, 16, 3)).astype(np.float32))


def draw(task="text", how=None, **given):
    how = how or sampling()
    batch, seeds, made, _ = build.ask(model(), how, task, **given)
    (drawn,) = model().drawer(how)(batch, seeds, task=made)
    return drawn


def program(how, **given):
    made = build.ask(model(), how, **given).task
    return tasks.make_sampler(model().model, model().shape, how, made)


@pytest.mark.slow
def test_at_full_strength_nothing_is_left_of_a_picture_and_no_strength_compiles_anew():
    given = dict(prompts=[RED, BLUE], images=pictures(), seed=3)
    whole = draw("image_to_image", strength=1.0, **given)
    np.testing.assert_allclose(whole.x, draw(prompts=[RED, BLUE], seed=3).x, atol=1e-5)
    sampler = program(sampling(), task="image_to_image", **given)
    compiled = sampler._cache_size()
    half = draw("image_to_image", strength=0.5, **given)
    other = draw("image_to_image", strength=0.5, **given | {"images": pictures(4)[2:]})
    assert sampler._cache_size() == compiled
    assert np.abs(half.x - whole.x).max() > 1e-2
    assert np.abs(half.x - other.x).max() > 1e-2


@pytest.mark.slow
def test_what_the_mask_leaves_out_stays_to_the_bit():
    mask = np.zeros((16, 16), np.float32)
    mask[3:9, 5:11] = 1
    given = dict(prompts=[RED, BLUE], images=pictures())
    drawn = draw("inpaint", masks=[mask], **given)
    sampler = program(sampling(), task="inpaint", masks=[mask], **given)
    compiled = sampler._cache_size()
    np.testing.assert_array_equal(drawn.x[:, mask == 0], np.stack(pictures())[:, mask == 0])
    assert np.abs(drawn.x - pictures())[:, mask == 1].max() > 1e-2
    moved = draw("inpaint", masks=[mask.T], strength=0.8, **given)
    assert sampler._cache_size() == compiled
    np.testing.assert_array_equal(moved.x[:, mask.T == 0], np.stack(pictures())[:, mask.T == 0])


@pytest.mark.slow
def test_outpainting_keeps_the_picture_and_repeats_steps_in_windows():
    drawn = draw(
        "outpaint", prompts=[RED, BLUE], images=pictures(), margins=(0, 0, 4, 8), repaint=(2, 2)
    )
    assert drawn.x.shape == (2, 16, 28, 3)
    np.testing.assert_array_equal(drawn.x[:, :, 4:20], np.stack(pictures()))
    assert np.isfinite(drawn.x).all()


@pytest.mark.slow
def test_an_edit_finds_no_mask_between_a_prompt_and_itself():
    plain = sampling(guidance=1.0)
    given = dict(images=pictures(), source=[RED], how=plain)
    same = draw("edit", prompts=[RED], **given)
    np.testing.assert_array_equal(same.x, np.stack(pictures()))
    assert not same.mask.any()
    other = draw("edit", prompts=[BLUE], limit=1.5, **given)
    kept = other.mask[..., 0] == 0
    assert 0 < kept.mean() < 1
    np.testing.assert_array_equal(other.x[kept], np.stack(pictures())[kept])
    assert np.abs(other.x - pictures()).max() > 1e-2


@pytest.mark.slow
def test_prompt_to_prompt_draws_the_source_as_it_is_alone():
    alone = draw(prompts=[RED, BLUE], seed=5).x
    drawn = draw("prompt_to_prompt", prompts=[RED, RED], source=[RED, BLUE], seed=5)
    np.testing.assert_allclose(drawn.source, alone, atol=1e-5)
    np.testing.assert_allclose(drawn.x[0], alone[0], atol=1e-5)  # from a prompt to itself
    assert np.abs(drawn.x[1] - drawn.source[1]).max() > 1e-4
    # With no step of the source's attention left, the edited prompt is drawn as it is alone.
    free = draw("prompt_to_prompt", prompts=[BLUE, BLUE], source=[RED], seed=5, cross=0.0, own=0.0)
    np.testing.assert_allclose(free.x[1], alone[1], atol=1e-5)


@pytest.mark.slow
def test_an_interpolation_has_both_ends():
    way = draw("interpolate", prompts=[RED, BLUE], seed=2, frames=4).x
    ends = draw(prompts=[RED, BLUE], seed=2).x
    np.testing.assert_allclose(way[[0, -1]], ends, atol=1e-5)
    assert np.abs(np.diff(way, axis=0)).max((1, 2, 3)).min() > 1e-4


@pytest.mark.slow
def test_weights_make_words_act_more_or_less():
    given = dict(prompts=[RED], source=[RED], seed=5, how=sampling(guidance=2.0))
    plain = draw("prompt_to_prompt", **given).x
    np.testing.assert_allclose(
        draw("prompt_to_prompt", weights={"Red": 1.0}, **given).x, plain, atol=1e-6
    )
    more = draw("prompt_to_prompt", weights={"red": 4.0}, **given)
    np.testing.assert_allclose(more.source, plain, atol=1e-5)
    assert np.abs(more.x - plain).max() > 1e-4


def codes(images):
    """What the codec leaves of pictures that it samples with the keys of seeds 0, 1 ...: the task's own rows."""
    made = draw(
        "image_to_image",
        how=sampling(steps=40, guidance=1.0),
        images=images,
        strength=0.03,
        prompts=[RED],
    )
    return made.x


@pytest.mark.slow
def test_what_is_inverted_comes_back_and_another_prompt_changes_it():
    given = dict(images=pictures(), source=[RED], strength=0.5)
    fine = sampling(steps=40, guidance=1.0, solver="ddim")
    same = draw("invert", prompts=[RED], how=fine, **given).x
    kept = codes(pictures())
    # DDIM inversion has the error of its steps; noise of this level is far from the data.
    noisy = draw("image_to_image", how=fine, prompts=[RED], images=pictures(), strength=0.5).x
    assert np.abs(same - kept).mean() < 0.3 * np.abs(noisy - kept).mean()
    exact = sampling(steps=8, guidance=1.0, solver="ddpm")
    back = draw("edit_friendly", prompts=[RED], how=exact, **given).x
    few = draw("edit_friendly", prompts=[RED], how=exact, **given | {"strength": 0.25}).x
    np.testing.assert_allclose(back, few, atol=1e-4)  # both are the data, through the codec
    other = draw("edit_friendly", prompts=[BLUE], how=exact, **given).x
    assert np.abs(other - back).max() > 1e-3


@pytest.mark.slow
def test_a_second_pass_is_larger_and_keeps_what_was_drawn():
    images = [np.full((16, 16, 3), c, np.float32) for c in (-0.5, 0.5)]
    given = dict(prompts=[RED, BLUE], images=images, size=(24, 32))
    drawn = draw("high_resolution", strength=0.25, **given).x
    assert drawn.shape == (2, 24, 32, 3)
    assert np.abs(drawn - draw("high_resolution", strength=1.0, **given).x).max() > 1e-3


@pytest.mark.slow
def test_on_a_torus_no_place_is_an_edge():
    """What is drawn from shifted noise is what was drawn, shifted (by whole latents of the coarsest level)."""
    of, cond = torus(model().model), model().model.condition(model().params, model().prompts([RED]))
    z = np.random.default_rng(0).normal(size=(1, *model().shape)).astype(np.float32)
    for read in (
        lambda z: of.raw(model().params)(z, np.full(1, 0.5), cond),
        lambda z: of.codec.decode(model().arrays, z),
    ):
        out = np.asarray(read(z))
        moved = np.asarray(read(np.roll(z, 2, axis=2)))
        step = 2 * out.shape[2] // z.shape[2]
        np.testing.assert_allclose(moved, np.roll(out, step, axis=2), atol=1e-5)
    one, plain = (draw(task, prompts=[RED]).x for task in ("seamless", "text"))
    assert np.abs(one - plain).max() > 1e-3


def test_pictures_are_read_like_data(tmp_path):
    Image.fromarray(np.full((30, 40, 3), 255, np.uint8)).save(tmp_path / "a.jpg")
    given = dict(task="image_to_image", prompts=[RED], n=2, images=[tmp_path / "a.jpg"])
    asked = build.ask(model(), sampling(), **given)
    assert asked.task.rows["x"].shape == (2, 16, 16, 3)
    np.testing.assert_allclose(asked.task.rows["x"], 1.0, atol=0.02)
    assert asked.captions == [RED, RED]
    wide = build.ask(model(), sampling(), "panorama", prompts=[RED], size=(16, 32)).task
    assert wide.space == (model().shape[0], 2 * model().shape[1])


WRONG = {
    "did you mean 'inpaint'": dict(task="inpant"),
    "needs --image": dict(task="image_to_image"),
    "needs --mask": dict(task="inpaint", images=pictures(1)),
    "needs --source": dict(task="edit", images=pictures(1)),
    "takes no --mask; it belongs to inpaint, edit": dict(
        task="image_to_image", images=pictures(1), masks=[np.ones((16, 16))]
    ),
    "strength=1.5 must be": dict(task="image_to_image", images=pictures(1), strength=1.5),
    "strength=0.0 must be": dict(task="image_to_image", images=pictures(1), strength=0.0),
    "mask of 8x16 pixels does not fit pictures of 16x16": dict(
        task="inpaint", images=pictures(1), masks=[np.ones((8, 16))]
    ),
    "a mask is empty": dict(task="inpaint", images=pictures(1), masks=[np.zeros((16, 16))]),
    "the nearest that works is 16x32": dict(task="panorama", size=(9, 33)),
    "must be 4 numbers": dict(task="outpaint", images=pictures(1), margins=(8, 8)),
    "there is no picture": dict(task="image_to_image", images=["nowhere.png"]),
    "jump=9 and times=2": dict(
        task="inpaint", images=pictures(1), masks=[np.ones((16, 16))], repaint=(9, 2)
    ),
    "2 images do not fit 3 samples": dict(
        task="image_to_image", prompts=[RED, RED, RED], images=pictures()
    ),
    "one or two prompts and at least two frames": dict(task="interpolate", prompts=[RED] * 3),
    "the word 'blu' is in none of the prompts; did you mean": dict(
        task="prompt_to_prompt", prompts=[BLUE], source=[RED], weights={"blu": 2.0}
    ),
    "needs --size": dict(task="high_resolution", images=pictures(1)),
    "takes no --weight; it belongs to prompt_to_prompt": dict(weights={"red": 2.0}),
    "use --solver ddpm": dict(task="edit_friendly", images=pictures(1), source=[RED]),
    "cross=2.0 must be": dict(task="prompt_to_prompt", source=[RED], cross=2.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_one_sentence_before_any_compile(message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        build.ask(model(), sampling(), **{"prompts": [RED]} | WRONG[message])


def test_an_unconditional_model_follows_no_prompts():
    with_text, how = model(), sampling()
    without = with_text.model._replace(conditioner=None)
    of = dataclasses.replace(with_text, model=without, texts={})
    for task, given in (
        ("edit", dict(source=[RED], images=pictures(1))),
        ("prompt_to_prompt", dict(source=[RED])),
        ("interpolate", {}),
    ):
        with pytest.raises(ValueError, match=r"reads none|unconditional"):
            build.ask(of, how, task, **given)
    asked = build.ask(of, how, "image_to_image", images=pictures(3))
    assert len(asked.seeds) == 3
    assert not asked.captions


def test_heat_maps_need_cross_attention():
    of = model().model
    blind = of._replace(network=of.network.clone(attention=(0, 0), middle=0))
    how = sampling(heatmaps=True)
    with pytest.raises(ValueError, match="no cross-attention"):
        dataclasses.replace(model(), model=blind).drawer(how)


@pytest.mark.parametrize(
    ("solver", "told"),
    [("ddpm", True), ("ddim", False), ({"name": "ddim", "eta": 0.5}, True), ("heun", False)],
)
def test_a_solver_that_adds_noise_is_known(solver, told):
    how = sampling_of(solver)
    assert how.stochastic == told
    given = dict(prompts=[RED], source=[RED], images=pictures(1))
    with pytest.raises(ValueError, match="use --solver dd") if told else contextlib.nullcontext():
        build.ask(model(), how, "invert", **given)


def sampling_of(solver):
    return build.sampling(tiny.shared_model("text"), model(), solver=solver)


def test_a_stochastic_solver_says_which_seed_it_takes(capsys):
    flags = ("--workdir", tiny.shared_model("text"), "--prompt", RED, "--task", "paint")
    for more, told in (
        (("--solver", "ddpm"), True),
        (("--solver", "ddpm", "--seed", 3), False),
        ((), False),
    ):
        assert tiny.call("sample", *flags, *more) == 2  # of the task, which is looked at after it
        assert ("seeds are 0, 1 ..." in capsys.readouterr().err) == told


def test_sample_py_draws_a_task(tmp_path, capsys):
    media.save_png(tmp_path / "a.png", media.to_uint8(pictures(1)[0]))
    flags = ("--workdir", tiny.shared_model("text"), "--out", tmp_path / "out", "--prompt", RED)
    edit = ("--image", tmp_path / "a.png", "--strength", 0.5)
    assert tiny.call("sample", *flags, "--task", "image_to_image", *edit) == 0
    about = media.read_png_text(tmp_path / "out" / "00000.png")
    assert (about["task"], about["prompt"]) == ("image_to_image", RED)
    capsys.readouterr()
    assert tiny.call("sample", *flags, "--task", "panorama", "--size", "16,x") == 2
    assert "--size=16,x must be whole numbers" in capsys.readouterr().err
    assert tiny.call("sample", *flags, "--weight", "red") == 2
    assert "--weight=red must be a word and a number" in capsys.readouterr().err
    assert tiny.call("sample", *flags, "--task", "paint") == 2
    assert "did you mean 'inpaint'" in capsys.readouterr().err
