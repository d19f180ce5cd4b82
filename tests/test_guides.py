"""Other guidance, grids and solvers of pretrained models: what must be the same, what differs, what is refused."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ldm_jax.pretrained import from_pretrained
from ldm_jax.pretrained.inputs import Hint
from ldm_jax.towards import Towards
from ldm_jax.training import sharding
from tests import pretrained_folder as reduced
from tests.test_pretrained import compiled, pictures
from tests.test_pretrained_edits import SMALL
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

pytestmark = pytest.mark.slow
PROMPTS = ["a cat on a mat", "red, and Blue!"]
STEPS = 2


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A model of one level."""
    folder = reduced.write(tmp_path_factory.mktemp("guides") / "sd", **SMALL)
    return from_pretrained(folder, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def draw(pipe, prompts=PROMPTS, guidance=4.0, **options):
    return pipe.text_to_image(prompts, steps=STEPS, guidance=guidance, **options)


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def differ(a, b):
    assert np.abs(a - b).max() > 1e-3


def test_numbers_that_change_nothing(pipe, caplog):
    plain = draw(pipe)
    # Projected with all of its parallel part, rescaled by nothing: classifier-free guidance.
    usual = dict(eta=1.0, rescale=0.0)

    def apg(**changed):
        return draw(pipe.guiding("apg", **usual | changed))

    same(apg(), plain)
    found = []

    def others():
        found.extend(apg(**c) for c in (dict(eta=0.0), dict(rescale=0.7)))

    assert compiled(caplog, others) == []
    differ(found[0], plain)
    differ(found[1], plain)
    same(draw(pipe.guiding(two_passes=True)), plain)


def test_perturbed_attention(pipe):
    plain = draw(pipe)
    same(draw(pipe.guiding("pag", strength=0.0)), plain)
    differ(draw(pipe.guiding("pag")), plain)


@pytest.mark.parametrize("name", ["pag", "sag"])
def test_attention_beside_a_controlnet(name, pipe, tmp_path):
    folder = reduced.write(tmp_path / "sd", **SMALL)
    level = {key: SMALL[key] for key in ("block_out_channels", "down_block_types")}
    reduced.component(tmp_path / "net", "ControlNetModel", reduced.CONTROL | level, 7)
    steered = from_pretrained(folder, controlnets=[tmp_path / "net"], mesh=pipe.mesh)
    hint = Hint(pictures() / 2 + 0.5)
    plain = draw(steered, hints=[hint])
    same(draw(steered.guiding(name, strength=0.0), hints=[hint]), plain)
    guided = draw(steered.guiding(name), hints=[hint])
    differ(guided, plain)
    silent = hint._replace(scale=0.0)
    differ(guided, draw(steered.guiding(name), hints=[silent]))
    same(draw(steered.guiding(name), hints=[silent]), draw(pipe.guiding(name)))


def test_autoguidance(pipe):
    network = jax.tree.map(lambda a: 0.9 * a, pipe.params["network"])
    weak = pipe.with_params({"unet": network})
    same(draw(pipe.guiding("auto", weak=pipe)), draw(pipe, guidance=1.0))
    differ(draw(pipe.guiding("auto", weak=weak)), draw(pipe, guidance=1.0))
    # At scale 0 it is the weaker model itself.
    same(draw(pipe.guiding("auto", weak=weak), guidance=0.0), draw(weak, guidance=1.0))
    same(draw(pipe.guiding("auto", weak=weak), guidance=1.0), draw(pipe, guidance=1.0))
    with pytest.raises(ValueError, match="not from a negative prompt"):
        draw(pipe.guiding("auto", weak=weak), negative_prompt="bad")


def test_several_prompts_in_one(pipe):
    a, b = PROMPTS
    plain, read = draw(pipe), pipe.reading(combined=True)
    for word in ("AND", "BLEND"):
        mixed = draw(read, [f"{a} {word} {b}:0", f"{b} {word} {a}"])
        same(mixed[0], plain[0])
        differ(mixed[1], plain[1])
    # Twice its guided difference is twice the scale; the mean of a prompt with itself is the prompt.
    same(draw(read, [f"{a} AND {a}"] * 2, guidance=2.0)[0], plain[0])
    same(draw(read, [f"{a} BLEND {a}:3"] * 2)[0], plain[0])
    same(draw(read), plain)
    for verb in ("explain", "diffedit", "interpolate", "prompt_to_prompt"):
        args = {"diffedit": (pictures(),), "prompt_to_prompt": (PROMPTS,)}.get(verb, ())
        with pytest.raises(ValueError, match=f"{verb} takes one prompt, and AND combines several"):
            getattr(read, verb)(["a AND b", "c"], *args)
    with pytest.raises(ValueError, match="takes no the guidance pag"):
        draw(read.guiding("pag"), ["a AND b"])


def test_grids_and_options_of_solvers(pipe, caplog):
    plain = draw(pipe, guidance=1.0)
    found = []

    def others():
        for spacing in (("leading", dict(offset=1, to_zero=False)), ("karras", dict(rho=5.0))):
            found.append(draw(pipe.on_grid(spacing[0], **spacing[1]), guidance=1.0))

    assert "jit(draw)" not in compiled(caplog, others)
    same(found[0], plain)
    differ(found[1], plain)
    # DPM-Solver of first order is DDIM.
    first = pipe.solving("dpm_solver", order=1)
    same(draw(first, guidance=1.0, solver="dpm_solver"), plain)


def test_gradients(pipe, caplog):
    """They lead to where the judge's value rises, each picture by its own text."""

    def reddish(params, wanted, x, t):
        return wanted[:, 0] * (params * (x[..., 0] - x[..., 1:].mean(-1))).mean((1, 2))

    judge = Towards(
        reddish, jnp.float32(1.0), lambda texts: np.array([[t == "red"] for t in texts], np.float32)
    )
    plain = draw(pipe, guidance=1.0)

    def led(to, pull, **options):
        return draw(pipe.guiding(towards=judge, to=to, pull=pull, **options), guidance=1.0)

    red = led(["red", "blue"], 100.0)
    value = [(x[0, ..., 0] - x[0, ..., 1:].mean(-1)).mean() for x in (red, plain)]
    assert value[0] > value[1] + 0.05
    same(red[1], plain[1])
    found = []
    assert compiled(caplog, lambda: found.append(led(["red", "red"], 0.0))) == []
    same(found[0], plain)
    differ(led("red", 100.0, through=False)[1], plain[1])
    with pytest.raises(ValueError, match="lead to 3 texts and 2 pictures are drawn"):
        led(["red"] * 3, 1.0)


JUDGE = Towards(lambda *args: 0.0, {}, lambda texts: np.zeros((len(texts), 1), np.float32))
# what is asked for, and what the error says
WRONG = [
    (lambda p: p.guiding("pga"), "there is no guidance 'pga'"),
    (lambda p: p.guiding("cfg", eta=0.1), "the guidance 'cfg' has no option 'eta'"),
    (lambda p: p.guiding(rescale=2.0), "rescale = 2.0 is out of range"),
    (lambda p: p.guiding(blocks=["mid"]), "the guidance 'cfg' has no blocks"),
    (lambda p: p.guiding("pag", blocks=["up_7"]), "no self-attention lies in the block 'up_7'"),
    (lambda p: p.guiding("sag", two_passes=True), "sag has no two passes"),
    (lambda p: p.guiding("auto"), "give one as `weak`"),
    (lambda p: p.guiding(weak=p), "give one as `weak`"),
    (lambda p: p.guiding(towards=JUDGE), "give `towards`, what judges pictures, and `to`"),
    (lambda p: p.guiding(to="a cat"), "give `towards`, what judges pictures, and `to`"),
    (lambda p: p.on_grid("kairas"), "there is no spacing 'kairas'"),
    (lambda p: draw(p.on_grid("karras", rh=2)), "the spacing 'karras' has no option 'rh'"),
    (lambda p: p.solving("ddmi"), "there is no solver 'ddmi'"),
    (lambda p: p.solving("heun", order=2), "the solver 'heun' has no option 'order'"),
    (lambda p: draw(p.guiding("zero_star", zero_steps=2)), "less than the 2 steps"),
]


@pytest.mark.parametrize(("ask", "says"), WRONG)
def test_what_is_refused(ask, says, pipe, monkeypatch):
    # As outside of pytest, where annotations are not checked.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=says) as told:
        ask(pipe)
    assert "\n" not in str(told.value)


def test_a_weaker_model_that_does_not_fit(pipe, tmp_path):
    other = reduced.write(tmp_path / "other", **SMALL)
    reduced.put(
        other / "scheduler" / "scheduler_config.json", reduced.SCHEDULER | {"beta_end": 1e-2}
    )
    weak = from_pretrained(other, mesh=pipe.mesh)
    with pytest.raises(ValueError, match="the two differ in their noise"):
        pipe.guiding("auto", weak=weak)


def test_instructions_have_guidance_of_their_own(tmp_path):
    folder = reduced.write(tmp_path / "instruct", in_channels=8, **SMALL)
    pipe = from_pretrained(folder, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ValueError, match="instruct has two scales of guidance"):
        pipe.guiding(rescale=0.5).instruct(PROMPTS, pictures())
