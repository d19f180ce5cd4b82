"""The benchmark of loading, with reduced models in place of the full ones."""

import jax
import pytest

from ldm_jax import benchmark_load
from ldm_jax.pretrained import components
from ldm_jax.weights import prompts
from tests import pretrained_folder as reduced
from tests.drawn import count


def test_full_sizes_are_the_published_ones():
    networks = (benchmark_load.UNET, benchmark_load.XL_UNET, benchmark_load.VAE)
    made = [components.make(c["_class_name"], c, "float32") for c in networks]
    made.append(components.make("CLIPTextModel", benchmark_load.TEXT, "float32"))
    counts = [count(component.shapes) for component in made]
    assert counts == [859_520_964, 2_567_463_684, 83_653_863, 123_060_480]


@pytest.fixture
def small(monkeypatch):
    benchmark_load.FLAGS(["benchmark"])
    text = reduced.TEXT | dict(vocab_size=benchmark_load.VOCABULARY)
    for name, config in dict(UNET=reduced.UNET, VAE=reduced.VAE, TEXT=text).items():
        monkeypatch.setattr(benchmark_load, name, config)


def test_what_is_written_is_loaded(small, tmp_path, capsys):
    benchmark_load.write(tmp_path / "model")
    benchmark_load.load(tmp_path / "model")
    params, arrays = benchmark_load.read(tmp_path / "model")
    number = count(params) + count(arrays["params"]) + 1  # the scale of the latents
    assert f"| {number:,} | float16 | 1 |" in capsys.readouterr().out
    kernel = params["network"]["conv_in"]["kernel"]
    assert kernel.dtype == "float16"
    assert 0.01 < abs(jax.numpy.asarray(kernel, "float32")).mean() < 0.02
    with pytest.raises(ValueError, match="is not empty"):
        benchmark_load.write(tmp_path / "model")
    tokenizer = prompts.load(tmp_path / "model" / "tokenizer")
    assert tokenizer.backend.get_vocab_size() == benchmark_load.VOCABULARY
    assert (tokenizer.begin, tokenizer.end) == (49406, 49407)
    assert tokenizer(["a"])[0, :3].tolist() == [49406, 256 + 64, 49407]
