"""What is wrong with a pretrained model's files is told in one sentence, before a tensor is read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.pretrained import from_pretrained
from ldm_jax.training import sharding
from ldm_jax.weights import files
from tests import pretrained_folder as reduced

MESH = sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reduced.write(tmp_path_factory.mktemp("reduced") / "sd")


@pytest.fixture
def copy(folder, tmp_path):
    """A folder that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path, **changes):
    """Changes keys of a JSON file; None leaves a key out."""
    content = json.loads(path.read_text()) | changes
    reduced.put(path, {key: value for key, value in content.items() if value is not None})


TOKENS = "text_model.embeddings.token_embedding.weight"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def lying(path, **changes):
    """Changes the entry of one tensor in the header of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["conv_in.weight"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def rewritten(path, change):
    tensors = {name: np.asarray(tensor) for name, tensor in files.read(path).items()}
    files.write(path, change(tensors))


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def typed(name, dtype):
    return lambda tensors: tensors | {name: tensors[name].astype(dtype)}


def indexed(path, target):
    path.rename(path.with_name("moved.safetensors"))
    reduced.put(
        path.with_name(f"{path.name}.index.json"), dict(weight_map={"conv_in.weight": target})
    )


# name: what is done to a folder, the error, what it says
SPOILT = {
    "no index": (
        lambda at: (at / "model_index.json").unlink(),
        FileNotFoundError,
        "no model_index.json",
    ),
    "an index that is no JSON": (
        lambda at: (at / "model_index.json").write_text("{"),
        ValueError,
        "model_index.json is no JSON",
    ),
    "an index that leads outside": (
        lambda at: edit(at / "model_index.json", **{"../unet": ["diffusers", "UNet2DModel"]}),
        ValueError,
        r"'../unet'; that is no folder",
    ),
    "an unknown class": (
        lambda at: edit(at / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"]),
        ValueError,
        "class FluxTransformer2DModel is not known",
    ),
    "an unknown component": (
        lambda at: (
            edit(at / "model_index.json", prior=["diffusers", "PriorTransformer"]),
            reduced.put(at / "prior" / "config.json", {}),
        ),
        ValueError,
        "component 'prior' is not known here",
    ),
    "a component that is left out": (
        lambda at: edit(at / "model_index.json", vae=[None, None]),
        ValueError,
        "component 'vae' is missing",
    ),
    "no tokenizer": (
        lambda at: edit(at / "model_index.json", tokenizer=[None, None]),
        ValueError,
        r"lacks \['tokenizer'\]",
    ),
    "no config": (
        lambda at: (at / "vae" / "config.json").unlink(),
        FileNotFoundError,
        "no config.json in .*vae",
    ),
    "a setting that we lack": (
        lambda at: edit(at / "unet" / "config.json", act_fn="mish"),
        ValueError,
        "act_fn = 'mish'",
    ),
    "a setting that is unknown": (
        lambda at: edit(at / "unet" / "config.json", new_feature=3),
        ValueError,
        r"new_feature = 3 \(unknown\)",
    ),
    "a setting that contradicts the weights": (
        lambda at: edit(at / "unet" / "config.json", cross_attention_dim=48),
        ValueError,
        "tensors have another shape",
    ),
    "a scheduler that is unknown": (
        lambda at: edit(at / "scheduler" / "scheduler_config.json", _class_name="NewScheduler"),
        ValueError,
        "class 'NewScheduler' is unknown",
    ),
    "no weights": (
        lambda at: (at / "vae" / WEIGHTS).unlink(),
        FileNotFoundError,
        f"holds no {WEIGHTS}",
    ),
    "a truncated file": (
        lambda at: (at / "unet" / WEIGHTS).write_bytes((at / "unet" / WEIGHTS).read_bytes()[:-9]),
        ValueError,
        "cannot be read as safetensors .*truncated",
    ),
    "a header that claims more than there is": (
        lambda at: lying(at / "unet" / WEIGHTS, shape=[16, 4, 3, 30]),
        ValueError,
        "cannot be read as safetensors",
    ),
    "a header that claims another type": (
        lambda at: lying(at / "unet" / WEIGHTS, dtype="F64"),
        ValueError,
        "cannot be read as safetensors",
    ),
    "integers for weights": (
        lambda at: rewritten(at / "unet" / WEIGHTS, typed("conv_in.weight", np.int8)),
        ValueError,
        "'conv_in.weight' int8",
    ),
    "missing tensors": (
        lambda at: rewritten(at / "text_encoder" / "model.safetensors", without(TOKENS)),
        ValueError,
        f"1 tensors are missing: '{TOKENS}'",
    ),
    "tensors of something else": (
        lambda at: rewritten(
            at / "vae" / WEIGHTS, lambda tensors: tensors | {"more": np.ones(2, np.float32)}
        ),
        ValueError,
        "1 tensors are not used: 'more'",
    ),
    "an index of files that leads outside": (
        lambda at: indexed(at / "unet" / WEIGHTS, "../x.safetensors"),
        ValueError,
        r"'../x.safetensors', which is no .safetensors file beside it",
    ),
    "an index that names itself": (
        lambda at: indexed(at / "unet" / WEIGHTS, f"{WEIGHTS}.index.json"),
        ValueError,
        "which is no .safetensors file beside it",
    ),
    "an index with an absolute path": (
        lambda at: indexed(at / "unet" / WEIGHTS, str(at / "unet" / "moved.safetensors")),
        ValueError,
        "which is no .safetensors file beside it",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_folder_is_told_in_one_sentence(what, copy, monkeypatch):
    spoil, error, says = SPOILT[what]
    spoil(copy)

    def read(*args, **kwargs):
        raise AssertionError("a tensor was read before all was checked")

    monkeypatch.setattr(files.Stored, "__array__", read)
    with pytest.raises(error, match=says) as told:
        from_pretrained(copy, mesh=MESH)
    assert "\n" not in str(told.value)


def test_what_cannot_be_loaded_is_told(folder, tmp_path):
    for wrong in ("float64", "half a float", jnp.int8):
        with pytest.raises(ValueError, match="is not among"):
            from_pretrained(folder, dtype=wrong)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="give a `revision`"):
        from_pretrained("owner/name-that-is-no-folder")
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        from_pretrained(folder, controlnets=[tmp_path])
    with pytest.raises(ValueError, match="is unknown; choose"):
        from_pretrained(folder, rules=((".*", "everywhere"),))
    with pytest.raises(ValueError, match=r"rules \['no/such/.*'\] match no parameter"):
        from_pretrained(folder, rules=(("no/such/.*", "fsdp"), (".*", "replicate")))
