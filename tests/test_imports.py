"""The architecture, walked with ast: a module imports lower layers only, and configs stay above them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ldm_jax"
LAYERS = {
    "types": 0,
    "tree": 0,
    "tiles": 0,
    "heap": 0,
    "markdown": 0,
    "flops": 0,
    "combined": 0,
    "nn": 1,
    "diffusion": 1,
    "metrics": 3,
    "models": 2,
    "conditioners": 3,
    "codec": 3,
    "media": 2,
    "weights": 3,
    "data": 2,
    "latent_diffusion": 4,
    "guided": 5,
    "foresee": 2,
    "towards": 6,
    "heatmaps": 6,
    "training": 5,
    "tasks": 7,
    "pipeline": 8,
    "pretrained": 8,
    "quality": 9,
    "build": 10,
    "cli": 10,
    "measure": 11,
}
ENTRY = 12  # benchmark, demo, evaluate, ...
NEVER = {"torch", "tensorflow", "transformers", "diffusers"}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """The dotted names that a file imports, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_lower_layers_only(path):
    own = part_of(path)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in NEVER, f"{path} imports {name}"
        if parts[0] == "ldm_jax" and len(parts) > 1 and own != "__init__" and parts[1] != own:
            assert LAYERS.get(parts[1], ENTRY) < LAYERS.get(own, ENTRY), f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_build_reads_configs(path):
    if part_of(path) != "build":
        names = set(imports(path))
        if part_of(path) not in LAYERS:  # an entry point may have a flag that names a config
            names -= {"ml_collections.config_flags"}
        assert "ml_collections" not in {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "part", ["data", "metrics/shape_reader.py", "weights/prompts.py", "weights/byte_pairs.py"]
)
def test_data_workers_do_not_import_jax(part):
    for path in MODULES:
        if str(path.relative_to(ROOT)).startswith(part):
            assert not {"jax", "flax"} & {name.split(".")[0] for name in imports(path)}, path


def test_no_heavy_framework_at_run_time():
    code = f"""
import sys, train, sample
import ldm_jax.build, ldm_jax.pretrained, ldm_jax.data.shapes, ldm_jax.evaluate, ldm_jax.benchmark, ldm_jax.demo
print(sorted({NEVER!r} & set(sys.modules)))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True
    )
    # And no device is touched by an import: settings and `jax.distributed` come before the first.
    assert done.stdout.split() == ["[]", "False"], done.stdout + done.stderr
