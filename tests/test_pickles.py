"""Files of torch, written by hand: what is read, and that nothing in them is run."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.weights import pickles

# A little assembler for pickles (the opcodes are those of `pickletools`).


def name(dotted):
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def code(value):
    """The program that makes a value; one that is a program already (bytes) stays as it is."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(code, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(code(k) + code(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(code, value)) + b"e"
    return pickle.dumps(value, 2)[2:-1]


def call(function, *args):
    return code(function) + code(args) + b"R"


def storage(kind, key, count):
    return code(("storage", name(f"torch.{kind}Storage"), key, "cpu", count)) + b"Q"


def tensor(stored, offset, shape, strides):
    ordered = call(name("collections.OrderedDict"))
    return call(
        name("torch._utils._rebuild_tensor_v2"), stored, offset, shape, strides, False, ordered
    )


def program(value):
    return b"\x80\x02" + code(value) + b"."


def zipped(path, value, storages=(), **extra):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(value))
        for key, array in dict(storages).items():
            archive.writestr(f"archive/data/{key}", np.asarray(array).tobytes())
        for key, content in extra.items():
            archive.writestr(f"archive/{key}", content)
    return path


def older(path, value, storages, magic=pickles.MAGIC, version=1001):
    parts = [
        program(magic),
        program(version),
        program({"protocol_version": version, "little_endian": True, "type_sizes": {}}),
        program(value),
        program(list(storages)),
        *(struct.pack("<q", a.size) + a.tobytes() for a in storages.values()),
    ]
    path.write_bytes(b"".join(parts))
    return path


ARRAY = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize("write", [zipped, older])
def test_tensors_with_their_strides_offsets_and_shared_storages(write, tmp_path):
    def view(offset, shape, strides):
        return code(("storage", name("torch.FloatStorage"), "0", "cpu", 24, *extra)) + b"Q", (
            offset,
            shape,
            strides,
        )

    extra = (None,) if write is older else ()
    views = {
        "whole": (0, (2, 3, 4), (12, 4, 1)),
        "turned": (0, (4, 6), (1, 4)),
        "part": (5, (2, 2), (6, 2)),
        "scalar": (23, (), ()),
        "repeated": (3, (3, 2), (0, 1)),
        "empty": (24, (0, 3), (3, 1)),
    }
    value = {key: tensor(view(*v)[0], *v) for key, v in views.items()}
    read = pickles.read(write(tmp_path / "a.ckpt", value, {"0": ARRAY}))
    assert {key: t.shape for key, t in read.items()} == {key: v[1] for key, v in views.items()}
    expected = {
        "whole": ARRAY.reshape(2, 3, 4),
        "turned": ARRAY.reshape(6, 4).T,
        "part": [[5, 7], [11, 13]],
        "scalar": 23,
        "repeated": [[3, 4]] * 3,
        "empty": np.zeros((0, 3)),
    }
    for key, array in expected.items():
        got = np.asarray(read[key])
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, array)
        assert got.flags.c_contiguous
        assert got.flags.owndata


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Double", np.float64),
        ("Half", np.float16),
        ("BFloat16", ml_dtypes.bfloat16),
        ("Long", np.int64),
        ("Int", np.int32),
        ("Short", np.int16),
        ("Char", np.int8),
        ("Byte", np.uint8),
        ("Bool", np.bool_),
    ],
)
def test_types(kind, dtype, tmp_path):
    array = (np.arange(6) % 5).astype(dtype)
    value = {"x": tensor(storage(kind, "7", 6), 0, (6,), (1,))}
    x = np.asarray(pickles.read(zipped(tmp_path / "a.bin", value, {"7": array}))["x"])
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, array)


def test_what_a_trainer_left_beside_the_weights_is_inert(tmp_path):
    # As in the checkpoint of Stable Diffusion 1.4: a class of pytorch_lightning as a key, a numpy scalar, objects.
    lightning = name("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    scalar = call(
        name("numpy.core.multiarray.scalar"), call(name("numpy.dtype"), "f8", 0, 1), "bytes"
    )
    thing = name("some.Thing") + code((1,)) + b"\x81" + code({"a": 1}) + b"b"  # NEWOBJ, BUILD
    listing = name("some.List") + code(()) + b"R" + b"(" + code(1) + code(2) + b"e"
    weights = call(name("collections.OrderedDict"))
    weights += b"(" + code("w") + tensor(storage("Float", "0", 24), 0, (24,), (1,)) + b"u"
    weights += code({"_metadata": {}}) + b"b"
    value = {
        "epoch": 3,
        "callbacks": {lightning: {"best": scalar}},
        "hyper_parameters": [thing, listing],
        "state_dict": weights,
    }
    read = pickles.read(zipped(tmp_path / "a.ckpt", value, {"0": ARRAY}))
    assert list(read) == ["w"]
    np.testing.assert_array_equal(read["w"], ARRAY)


def marks(tmp_path):
    """Programs that would leave a file, in the ways that a pickle has."""
    mark = str(tmp_path / "mark")
    system = call(name("os.system"), f"touch {mark}")
    opened = call(name("builtins.open"), mark, "w")
    code_of = call(name("builtins.eval"), f"open({mark!r}, 'w')")
    function = name("builtins.exec")
    return {
        "os.system": system,
        "builtins.open": opened,
        "builtins.eval": code_of,
        "posix.system": call(name("posix.system"), f"touch {mark}"),
        "subprocess.Popen": call(name("subprocess.Popen"), ["touch", mark]),
        "getattr of a module": call(
            call(name("builtins.getattr"), name("os.path"), "join"), f"touch {mark}"
        ),
        "INST": b"(" + code(f"touch {mark}") + b"ios\nsystem\n",
        "OBJ": b"(" + name("os.system") + code(f"touch {mark}") + b"o",
        "NEWOBJ": name("subprocess.Popen") + code((["touch", mark],)) + b"\x81",
        "STACK_GLOBAL": code("os") + code("system") + b"\x93" + code((f"touch {mark}",)) + b"R",
        "dotted": code("builtins") + code("exec") + b"\x93" + code((f"open({mark!r},'w')",)) + b"R",
        "BUILD": function + code(()) + b"R" + code({"__setstate__": system}) + b"b",
        "in a tensor": tensor(system, 0, (1,), (1,)),
        "in a parameter": call(name("torch._utils._rebuild_parameter"), system, True, ()),
        "extension": b"\x82\x01" + code((f"touch {mark}",)) + b"R",
        "torch's own loader": call(name("torch.load"), mark),
    }


@pytest.mark.parametrize("kind", marks(__import__("pathlib").Path("/")))
@pytest.mark.parametrize("write", [zipped, older])
def test_nothing_is_run(kind, write, tmp_path):
    evil = marks(tmp_path)[kind]
    for value in ({"w": evil}, {"state_dict": {"w": evil}}, evil):
        with pytest.raises(ValueError, match=r"no tensors|instead of a dict|more than tensors"):
            pickles.read(write(tmp_path / "evil.ckpt", value, {}))
    good = tensor(storage("Float", "0", 24), 0, (24,), (1,))
    if kind not in ("in a tensor", "extension"):  # which cannot be read at all
        beside = {"callbacks": [evil], "state_dict": {"w": good}}
        assert list(pickles.read(zipped(tmp_path / "b.ckpt", beside, {"0": ARRAY}))) == ["w"]
    assert not (tmp_path / "mark").exists()


def test_the_name_of_what_is_no_tensor_is_told(tmp_path):
    value = {"w": call(name("os.system"), "true"), "x": {"y": 1}, "step": 5}
    with pytest.raises(ValueError, match=r"3 entries .*'w': os.system.*'x': dict.*'step': 5"):
        pickles.read(zipped(tmp_path / "a.ckpt", value))
    with pytest.raises(ValueError, match=r"holds my.Model instead of a dict"):
        pickles.read(zipped(tmp_path / "a.ckpt", call(name("my.Model"))))
    value = {"w": tensor(storage("ComplexFloat", "0", 1), 0, (1,), (1,))}
    with pytest.raises(ValueError, match=r"torch.ComplexFloatStorage"):
        pickles.read(zipped(tmp_path / "a.ckpt", value))


@pytest.mark.parametrize(
    "view",
    [
        (1, (24,), (1,)),
        (0, (5, 5), (5, 1)),
        (0, (2,), (24,)),
        (0, (2,), (1, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, ("2",), (1,)),
    ],
)
def test_a_tensor_must_lie_within_its_storage(view, tmp_path):
    value = {"w": tensor(storage("Float", "0", 24), *view)}
    with pytest.raises(ValueError, match="cannot be read as a file of torch"):
        pickles.read(zipped(tmp_path / "a.ckpt", value, {"0": ARRAY}))


def test_files_that_are_cut_off_or_of_another_kind_are_told(tmp_path):
    value = {"w": tensor(storage("Float", "0", 24), 0, (24,), (1,))}
    with pytest.raises(FileNotFoundError, match=r"no file .*none.ckpt"):
        pickles.read(tmp_path / "none.ckpt")
    for write in (zipped, older):
        whole = write(tmp_path / "whole.ckpt", value, {"0": ARRAY}).read_bytes()
        for length in (0, 3, 40, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut.ckpt").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"cut.ckpt cannot be read .*download it anew"):
                pickles.read(tmp_path / "cut.ckpt")
    for content in (b"not at all", b"\x08\0\0\0\0\0\0\0{}      ", b"PK\x03\x04"):
        (tmp_path / "other.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"other.ckpt cannot be read as a file of torch"):
            pickles.read(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="magic"):
        pickles.read(older(tmp_path / "a.ckpt", value, {"0": ARRAY}, magic=1))
    with pytest.raises(ValueError, match="version is 1002"):
        pickles.read(older(tmp_path / "a.ckpt", value, {"0": ARRAY}, version=1002))
    with pytest.raises(ValueError, match="24"):
        pickles.read(older(tmp_path / "a.ckpt", value, {"0": ARRAY[:-1]}))
    with pytest.raises(ValueError, match="little-endian"):
        pickles.read(zipped(tmp_path / "a.ckpt", value, {"0": ARRAY}, byteorder=b"big"))
    short = pickles.read(zipped(tmp_path / "a.ckpt", value, {"0": ARRAY[:-1]}))
    with pytest.raises(ValueError, match="no whole storage 'data/0'"):
        np.asarray(short["w"])
    without = pickles.read(zipped(tmp_path / "a.ckpt", value))
    with pytest.raises(ValueError, match="no whole storage 'data/0'"):
        np.asarray(without["w"])
