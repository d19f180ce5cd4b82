"""Repositories by name: what is asked of the library that fetches them, which is put in place of the real one."""

import fnmatch
import sys
import types
from pathlib import Path

import pytest

from ldm_jax.pretrained import sources

NAME = "owner/model-v1.5"


def test_a_revision_is_fetched_and_no_code_with_it(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        held = ("unet/config.json", "unet/model.safetensors", "tokenizer/merges.txt")
        left = ("unet/model.bin", "pipeline.py", "model.ckpt")
        assert all(any(fnmatch.fnmatch(f, p) for p in allow_patterns) for f in held)
        assert not any(fnmatch.fnmatch(f, p) for f in left for p in allow_patterns)
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert sources.local(NAME, "0123abc") == tmp_path
    assert asked == [(NAME, "0123abc")]
    # What lies here is not fetched.
    assert sources.local(tmp_path, None) == Path(tmp_path)
    with pytest.raises(ValueError, match="give a `revision`"):
        sources.local(NAME, None)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        sources.local("no/such/folder", "0123abc")
    assert len(asked) == 1


def test_the_library_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        sources.local(NAME, "0123abc")
