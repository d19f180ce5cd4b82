"""The same model in PyTorch: diffusers' and transformers' networks with our weights, by our tables.

The library itself imports neither; they are looked for by name when a comparison is asked for.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.measure.models import Subject

NAMES = ("torch", "diffusers", "transformers")


def libraries() -> tuple[Any, Any, Any]:
    """torch, diffusers and transformers.

    Raises:
      ValueError: one of them is not installed.
    """
    try:
        return tuple(importlib.import_module(name) for name in NAMES)
    except ImportError as error:
        raise ValueError(
            f"--against diffusers needs the parity extra, pip install 'ldm_jax[parity]' ({error})"
        ) from error


def check(subject: Subject, solver: str) -> None:
    """Raises: ValueError: a comparison that cannot be made."""
    if solver != "ddim":
        raise ValueError(f"diffusers' loop is written here for ddim, and not for {solver!r}")
    if "text_encoder" not in subject.made:
        raise ValueError(f"the model {subject.name!r} reads no text; compare one that does")
    libraries()


def check_training(subject: Subject) -> None:
    """Raises: ValueError: a comparison that cannot be made."""
    if subject.model.fields != ("tokens",) or "unet" not in subject.made:
        raise ValueError(
            f"{subject.name!r} reads {list(subject.model.fields)}; training is measured here for models in diffusers' "
            "layout that read tokens alone, such as 'sd15'"
        )


def parts(
    subject: Subject, dtype: str, conds: Any, args: dict[str, Any], steps: int, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """{"text": ..., "loop": ..., "decode": ..., "together": ...}, as `programs.programs`, each a run that waits.

    `conds` are the condition and the null condition that the loop reads; `args` has the token ids of each encoder
    ("ids"), the loop's "start", its "scale" and, for models that read them, "sizes".
    """
    torch, diffusers, transformers = libraries()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    nets = {}
    params = subject.component_params()
    for name, component in subject.made.items():
        nets[name] = _network(torch, diffusers, transformers, component, params[name], where, kind)
    unet, vae = nets["unet"], nets["vae"]
    decode_latents = vae.decode
    if compiled:
        unet = torch.compile(unet, mode="max-autotune", fullgraph=True)
        decode_latents = torch.compile(vae.decode, mode="max-autotune", fullgraph=True)
    noise = diffusers.DDIMScheduler.from_config(dict(subject.noise))
    noise.set_timesteps(steps)

    def tensor(array, dtype=kind):
        return torch.from_numpy(np.array(array, np.float32)).to(where, dtype)

    start = tensor(np.moveaxis(np.asarray(args["start"]), -1, 1))
    scale = args["scale"]
    guided = scale != 1
    halves = conds if guided else conds[:1]
    tokens = torch.cat([tensor(half.tokens) for half in halves])
    more = {}
    if conds[0].vector is not None:
        projection = subject.made["text_encoder_2"].config["projection_dim"]
        sizes = tensor(np.tile(args["sizes"], (len(halves), 1)))
        pooled = torch.cat([tensor(half.vector[:, :projection]) for half in halves])
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    ids = [torch.from_numpy(np.array(rows, np.int64)).to(where) for rows in args["ids"]]
    encoders = [nets[name] for name in sorted(nets) if name.startswith("text_encoder")]

    def wait(result):
        if where == "cuda":
            torch.cuda.synchronize()
        return result

    @torch.inference_mode()
    def text():
        # The condition and the null condition, as one batch.
        both = [rows.repeat(2 if guided else 1, 1) for rows in ids]
        every = zip(encoders, both, strict=True)
        return wait([net(rows, output_hidden_states=len(ids) > 1)[0] for net, rows in every])

    @torch.inference_mode()
    def loop():
        z = start
        for t in noise.timesteps:
            x = torch.cat([z] * len(halves))
            out = unet(x, t, encoder_hidden_states=tokens, return_dict=False, **more)[0]
            if guided:
                positive, negative = out.chunk(2)
                out = negative + scale * (positive - negative)
            z = noise.step(out, t, z, return_dict=False)[0]
        return wait(z)

    @torch.inference_mode()
    def decode(z=start):
        factor = subject.made["vae"].scale
        return wait(decode_latents(z.to(kind) / factor, return_dict=False)[0])

    def together():
        text()
        return decode(loop())

    return {"text": text, "loop": loop, "decode": decode, "together": together}


class Training(NamedTuple):
    """A network in torch that is trained: {"loss": ..., "gradient": ..., "step": ...}, each a run that waits.

    "loss" and "gradient" return the loss; the gradient is then in `gradients`, by names of ours.
    """

    parts: dict[str, Callable[[], Any]]
    gradients: Callable[[], dict[str, np.ndarray]]


def training(
    subject: Subject, dtype: str, given: Any, settings: dict[str, Any], compiled: bool, fused: bool
) -> Training:
    """The mean squared error of the noise, and AdamW with these settings; parameters are in float32.

    `given` has the latents "x0", the noise "eps", steps "t" of the table, and the condition "cond".
    """
    torch, diffusers, transformers = libraries()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    component, params = subject.made["unet"], subject.component_params()["unet"]
    made = _network(torch, diffusers, transformers, component, params, where, torch.float32)
    made = made.train().requires_grad_(True)
    net = torch.compile(made) if compiled else made
    optimizer = torch.optim.AdamW(made.parameters(), fused=fused, **settings)
    noise = diffusers.DDIMScheduler.from_config(dict(subject.noise))

    def tensor(array):
        return torch.from_numpy(np.array(array)).to(where)

    x0, eps = (tensor(np.moveaxis(np.asarray(given[name]), -1, 1)) for name in ("x0", "eps"))
    t, tokens = tensor(given["t"]).long(), tensor(given["cond"].tokens)
    half = torch.autocast(where, getattr(torch, dtype), enabled=dtype != "float32")

    def wait(result):
        if where == "cuda":
            torch.cuda.synchronize()
        return result

    def error():
        with half:
            x_t = noise.add_noise(x0, eps, t)
            out = net(x_t, t, encoder_hidden_states=tokens, return_dict=False)[0]
        return torch.nn.functional.mse_loss(out.float(), eps)

    @torch.no_grad()
    def loss():
        return wait(error())

    def gradient():
        optimizer.zero_grad(set_to_none=True)
        value = error()
        value.backward()
        return wait(value.detach())

    def step():
        gradient()
        optimizer.step()
        wait(None)

    def gradients():
        return {name: p.grad.float().cpu().numpy() for name, p in made.named_parameters()}

    return Training({"loss": loss, "gradient": gradient, "step": step}, gradients)


def array(result: Any) -> np.ndarray:
    """In float32, with channels last: those of pictures; those of tokens are."""
    found = result.float().cpu().numpy()
    return np.moveaxis(found, 1, -1) if found.ndim == 4 else found


def _network(torch, diffusers, transformers, component, params, where, kind):
    library = {"diffusers": diffusers, "transformers": transformers}[component.library]
    of = getattr(library, component.kind)
    if component.library == "transformers":
        own_ids = dict(bos_token_id=0, pad_token_id=1)  # no matter here, but checked
        config = own_ids | {k: v for k, v in component.config.items() if k != "architectures"}
        net = of(of.config_class(**config))
    else:
        net = of.from_config(dict(component.config))
    own = net.state_dict()
    exported = component.export(jax.tree.map(lambda leaf: np.array(leaf, np.float32), params))
    # Newer releases of transformers leave the first part of the names of `CLIPTextModel` away.
    named = {k if k in own else k.removeprefix("text_model."): v for k, v in exported.items()}
    absent = [name for name in own.keys() - named.keys() if "position_ids" not in name]
    if strange := sorted([*(named.keys() - own.keys()), *absent]):
        raise ValueError(
            f"{component.kind} of the installed {component.library} has other tensors than ours: {strange[:5]}; "
            "install another release"
        )
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in named.items()}
    net.load_state_dict(tensors, strict=False)
    net = net.to(where, kind).eval().requires_grad_(False)
    return net.to(memory_format=torch.channels_last) if where == "cuda" else net
